"""Measurements of a trained policy: win rates, intervals, pictures."""
