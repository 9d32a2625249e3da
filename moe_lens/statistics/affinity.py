"""Whether experts that the router asks for alike are selected together: its rows beside co-activation."""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from moe_lens.statistics.coactivation import CoActivation
from moe_lens.statistics.jackknife import Sums, with_interval

NUMBERS = ("correlation", "nearest", "average")
PERMUTATIONS = 1000


def router_affinity(statistic: CoActivation, rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """How far the cosine of two experts' router rows ranks pairs as their co-activation P(j given i) does (GatePro).

    rows: as `router_similarity` gives them.

    One row per layer: layer, pairs, correlation (Spearman's, over the ordered pairs of different experts that were
    selected), its 95 % interval over texts (`with_interval`) in _low and _high, p_value (two-sided, of rows that are
    dealt to the experts at random: Mantel's test, since pairs of one expert depend on each other), nearest (the mean P
    of each expert's most alike other, given it) and average (of all others).
    """
    parts, rng = [], np.random.default_rng(seed)
    for layer, tensors in statistic.layer_sums().items():
        sums = {name: part.numpy() for name, part in tensors.items()}
        listed = rows[rows["layer"] == layer]
        alike = np.full(sums["together"].shape[1:], np.nan)
        alike[listed["expert"], listed["other"]] = listed["similarity"]

        def numbers(part: Sums, alike: np.ndarray = alike) -> dict[str, np.ndarray]:
            probability, own = _selected(part["together"], alike)
            nearest = np.where(np.eye(len(own), dtype=bool), -np.inf, own).argmax(1)
            found = _correlation(_ranks(probability), _ranks(own)), probability[np.arange(len(own)), nearest].mean()
            return dict(zip(NUMBERS, (*map(np.asarray, found), _pairs(probability).mean()), strict=True))

        found = with_interval(numbers, sums, size="together")
        probability, own = map(_ranks, _selected(sums["together"].sum(0), alike))
        orders = (rng.permutation(len(own)) for _ in range(PERMUTATIONS))
        shuffled = np.array([_correlation(probability, own[np.ix_(order, order)]) for order in orders])
        value, low, high = (float(part) for part in found["correlation"])
        at_least = np.count_nonzero(np.abs(shuffled) >= abs(value) - 1e-12)
        row = {"layer": layer, "pairs": len(own) * (len(own) - 1), "correlation": value}
        row |= {"correlation_low": max(low, -1.0), "correlation_high": min(high, 1.0)}
        row["p_value"] = (1 + at_least) / (1 + PERMUTATIONS)
        row |= {name: float(found[name][0]) for name in NUMBERS[1:]}
        parts.append(row)
    table = pd.DataFrame(parts)
    table.attrs = dict(statistic.settings)
    return table


def _selected(together: np.ndarray, alike: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(other given expert) and the cosines of the experts that were selected, [expert, other] each."""
    alone = together.diagonal()
    there = np.flatnonzero(alone)
    return together[np.ix_(there, there)] / alone[there, None], alike[np.ix_(there, there)]


def _ranks(matrix: np.ndarray) -> np.ndarray:
    """The ranks of what is off the diagonal, in its places."""
    ranks = np.zeros(matrix.shape)
    ranks[~np.eye(len(matrix), dtype=bool)] = rankdata(_pairs(matrix))
    return ranks


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Of the ranks of pairs; NaN where either are all the same."""
    ranks = _pairs(first), _pairs(second)
    return float("nan") if 0 in (ranks[0].std(), ranks[1].std()) else float(np.corrcoef(*ranks)[0, 1])


def _pairs(matrix: np.ndarray) -> np.ndarray:
    """What is off the diagonal of a matrix [expert, other]."""
    flat: np.ndarray = matrix[~np.eye(len(matrix), dtype=bool)]
    return flat
