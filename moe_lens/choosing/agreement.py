"""How far a choice of experts can be relied on: what returns under resampling, and how far two choices agree."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from moe_lens.experts import ExpertSet
from moe_lens.metrics import rank_correlation


def returning(parts: Sequence[pd.DataFrame], size: int, *, resamples: int = 200, seed: int = 0) -> np.ndarray:
    """Of the `size` highest of each layer the share that returns when the data are drawn anew, [resample].

    parts: the score measured on each of several parts of the data, columns layer, expert, score, in one order. A
    resample draws as many of them with replacement (a bootstrap over parts); its score, as that of all, is their mean.
    """
    whole = np.stack([part["score"].to_numpy() for part in parts])  # [part, expert of any layer]
    first, rng = parts[0], np.random.default_rng(seed)
    chosen = ExpertSet.top(first.assign(score=whole.mean(0)), size)
    drawn = rng.integers(len(parts), size=(resamples, len(parts)))
    tops = (ExpertSet.top(first.assign(score=whole[places].mean(0)), size) for places in drawn)
    return np.array([chosen.overlap(top) for top in tops])


def agreement_table(tables: Mapping[str, pd.DataFrame], sets: Mapping[str, ExpertSet]) -> pd.DataFrame:
    """One row per pair of names: first, second, rank_correlation of the scores, jaccard of the sets.

    tables: columns layer, expert, score. rank_correlation: see `moe_lens.metrics`; the mean over layers. jaccard: the
    experts that both sets have over those that one of them has.
    """
    rows = []
    for first, second in combinations(sets, 2):
        effects = tables[second][["layer", "expert", "score"]].rename(columns={"score": "effect"})
        row = {"first": first, "second": second, "rank_correlation": rank_correlation(tables[first], effects)}
        rows.append(row | {"jaccard": sets[first].jaccard(sets[second])})
    return pd.DataFrame(rows, columns=["first", "second", "rank_correlation", "jaccard"])
