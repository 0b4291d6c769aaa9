"""Real text for the quick start and the examples: collected where it lies, never committed."""
