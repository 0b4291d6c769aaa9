"""Calculation of a recipe's parameters, FLOPs, memory and peak throughput."""
