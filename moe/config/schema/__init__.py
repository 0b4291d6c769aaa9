"""Settings groups and values computed from them."""
