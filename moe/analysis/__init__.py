"""What a run shows: curves now; saturation, co-activation and specialisation belong here."""
