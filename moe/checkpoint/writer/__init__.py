"""Process that writes a rank's checkpoints, and the memory that it shares with the rank."""
