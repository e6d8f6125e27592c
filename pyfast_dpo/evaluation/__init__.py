"""What a run shows of a model: held-out preferences, displaced likelihood, curves."""
