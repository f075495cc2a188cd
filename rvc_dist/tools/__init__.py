"""Tools around a run: each readable alone."""
