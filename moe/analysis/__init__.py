"""What a run shows: curves, how its routers choose, the report page."""
