"""Support for unmodified megatron-core on CPU and gloo, and device-agnostic helpers."""
