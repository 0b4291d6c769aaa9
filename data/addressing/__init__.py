"""Arithmetic on sample numbers: apportionment, permutations, windows."""
