"""States of number formats in a checkpoint: FP8 scales, moments of narrow types."""
