"""The report page of a run, or of several to compare."""
