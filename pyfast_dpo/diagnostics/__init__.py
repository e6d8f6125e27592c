"""What a run shows of itself: the table of metrics, warnings, curves, held-out preferences."""
