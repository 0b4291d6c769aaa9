"""Emulation of number formats."""
