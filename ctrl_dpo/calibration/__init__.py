"""Calibration beyond a prompt's own draws: pooling over prompts, importance weights, errors."""
