"""Numbered training samples from shards: stages, blends, addresses."""
