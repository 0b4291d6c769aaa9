"""Arithmetic behind sample numbers: shares, orders, windows."""
