"""Report page of one run or of several runs."""
