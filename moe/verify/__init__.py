"""Compare layouts and check a configuration without training."""
