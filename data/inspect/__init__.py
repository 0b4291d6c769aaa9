"""Reports on shards and samples for people, n-gram baselines."""
