"""Generate text and score it."""
