"""Preprocess a corpus: workers, journal, outputs."""
