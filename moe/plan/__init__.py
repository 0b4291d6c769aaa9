"""Parameters, FLOPs, memory and throughput of a recipe, by arithmetic alone."""
