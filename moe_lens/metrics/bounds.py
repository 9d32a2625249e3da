"""What values can be at least and at most."""

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-float("inf"), float("inf"))
"""The bounds of values that have none."""
