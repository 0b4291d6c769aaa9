"""What lets unmodified megatron-core run on CPU and gloo, and device-agnostic helpers."""
