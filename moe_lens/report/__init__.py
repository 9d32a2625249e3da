"""A run directory as a page of figures and numbers."""
