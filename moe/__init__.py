"""The model and its training, on megatron-core.

Imports point one way: config < plan < host < layers, routing < training < convert, analysis.
"""

from moetron.moe.host.usable import guard_imports

guard_imports()  # before any module here imports megatron-core
