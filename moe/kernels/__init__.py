"""GPU kernels in Triton and their equivalents in torch operations."""
