"""Collectors of local text for the quick start and the examples; the text is never committed."""
