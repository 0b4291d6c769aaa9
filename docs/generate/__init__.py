"""Generators of pages and figures: ``python -m docs.generate`` writes all of them."""
