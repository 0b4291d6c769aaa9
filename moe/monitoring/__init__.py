"""Console output and metrics of a run."""
