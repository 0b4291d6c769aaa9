"""Losses on preferences between answers."""
