"""FP8 products: on tensor cores, or emulated."""
