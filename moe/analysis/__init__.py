"""Analysis of runs: curves, routing, evaluation, ablations, report page."""
