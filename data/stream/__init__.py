"""Numbered training samples from shards: stages, blends, objectives."""
