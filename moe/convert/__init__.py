"""To and from other formats of checkpoints: HuggingFace folders, dense to mixture."""
