"""Settings, with their flags, YAML keys, help and checks."""
