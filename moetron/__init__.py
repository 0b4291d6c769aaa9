"""The import root: ``moetron.moe``, ``moetron.data`` and ``moetron.tokenizers``.

The code lives in the checkout's top-level folders ``moe/``, ``data/`` and ``tokenizers/``. None of
them may be imported by its bare name: ``tokenizers`` is HuggingFace's package, and a second copy of
a module would bring second copies of its classes. A wheel maps the folders below ``moetron``
(``package_dir`` in setup.py); a checkout is joined to this package's search path here.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pretrain_moe.py").is_file() and (_checkout / "moe" / "__init__.py").is_file():
    __path__.append(str(_checkout))
