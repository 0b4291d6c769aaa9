"""Ablations: comparison of recipe variants over several seeds."""
