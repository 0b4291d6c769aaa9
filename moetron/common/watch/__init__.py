"""Watch over this process: what it does, and the limits that the system sets it."""
