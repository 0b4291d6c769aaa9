"""Comparison of layouts, and a check of a configuration without training."""
