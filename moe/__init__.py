"""The model and its training, on megatron-core.

Imports point one way: config < plan < host < layers, routing < training < convert, analysis.
"""
