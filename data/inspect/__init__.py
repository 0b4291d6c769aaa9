"""Text reports on shards and samples, and n-gram baselines."""
