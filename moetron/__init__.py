"""Import root of ``moetron.moe``, ``moetron.data`` and ``moetron.tokenizers``.

The code is in the checkout's folders ``moe/``, ``data/`` and ``tokenizers/``. Never import them by
their bare names: ``tokenizers`` is HuggingFace's package, and a second copy of a module has second
copies of its classes. A wheel maps the folders below ``moetron`` (``package_dir`` in
setup.py); for a checkout, this file adds it to the package's search path.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pretrain_moe.py").is_file() and (_checkout / "moe" / "__init__.py").is_file():
    __path__.append(str(_checkout))
