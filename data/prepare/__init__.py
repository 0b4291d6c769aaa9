"""Preprocessing of a corpus: workers, journal, outputs."""
