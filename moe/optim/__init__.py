"""Optimizers that megatron-core lacks."""
