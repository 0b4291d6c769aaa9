"""What differs between the supported versions of megatron-core."""
