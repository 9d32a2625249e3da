"""Pairs of experts as rows of a table."""

import numpy as np
import pandas as pd


def pairs_table(layer: int, values: dict[str, np.ndarray]) -> pd.DataFrame:
    """Matrices [expert, other] of a layer as rows of different experts: layer, expert, other, and a column of each."""
    size = len(next(iter(values.values())))
    expert, other = np.nonzero(~np.eye(size, dtype=bool))
    columns = {"layer": layer, "expert": expert, "other": other}
    return pd.DataFrame(columns | {name: matrix[expert, other] for name, matrix in values.items()})
