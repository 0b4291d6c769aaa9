"""Emulated number formats."""
