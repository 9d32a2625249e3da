"""Which experts: scores that rank them, selections that name them, and the masking run."""
