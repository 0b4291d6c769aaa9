"""The model and its training, on megatron-core.

Imports point one way, see ``FLOORS`` in tests/unit/test_structure.py.
"""

from moetron.moe.host.usable import guard_imports

guard_imports()  # before any module here imports megatron-core
