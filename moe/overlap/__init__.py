"""Parts of layers that schedules need to overlap communication with computation."""
