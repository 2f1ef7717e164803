"""Training labels as arrays: transformed rewards of groups, margins of pairs."""
