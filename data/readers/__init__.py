"""Readers of raw text from all supported formats, in chunks of rows."""
