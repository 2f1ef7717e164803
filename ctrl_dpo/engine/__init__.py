"""Everything that touches torch: models, batches, log-probabilities, losses, generation."""
