"""Exact theory on the calibrated scale: procedures, policies, optima. NumPy and SciPy only."""
