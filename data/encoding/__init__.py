"""Text to token ids, filters and deduplication."""
