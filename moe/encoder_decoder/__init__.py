"""Encoder-decoder (T5, Switch, ST-MoE) from megatron-core's transformer blocks."""
