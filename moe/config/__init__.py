"""Settings: one typed source for every knob, its flag, its YAML key, its help and its checks."""
