"""States in a checkpoint beside weights: FP8 scales, moments of narrow types, of routers."""
