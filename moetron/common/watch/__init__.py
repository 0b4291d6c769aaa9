"""Watch over this process: what it does, its limits, and who can reach it."""
