"""What the tables of the docs are printed with: rows as Markdown, and means over seeds with their spread."""

from collections.abc import Iterable

import pandas as pd

from moe_lens.metrics import SUPPORTING, UNBOUNDED, mean_reach
from moe_lens.metrics.bounds import Bounds


def over_seeds(values: pd.Series, form: str = ".2f", *, bounds: Bounds = UNBOUNDED) -> str:
    """The mean over seeds, where they differ as printed with Student's 95 % interval: "0.30 [0.10, 0.50]".

    Of fewer than five seeds with the lowest and the highest that was seen, "0.20 (0.10 to 0.30)": others may well lie
    outside. bounds: beyond which no value can lie, nor an end.
    """
    mean, low, high = values.mean(), values.min(), values.max()
    if low == high or len(values) < SUPPORTING:
        told = [format(value, form) for value in (mean, low, high)]
        return told[0] if told[1] == told[2] else f"{told[0]} ({told[1]} to {told[2]})"
    reach = mean_reach(values)
    return f"{mean:{form}} [{max(mean - reach, bounds[0]):{form}}, {min(mean + reach, bounds[1]):{form}}]"


def markdown(rows: Iterable[Iterable[object]]) -> str:
    """Rows, the first of them the head, as a Markdown table; fractions with three digits."""
    cells = [[format(cell, ".3g") if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    head, *lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|---" * len(cells[0]) + "|", *lines])
