"""Which expert of another model does what an expert does: experts matched one to one, and how far two models are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from moe_lens.errors import MoELensError


def match_experts(similarity: np.ndarray) -> np.ndarray:
    """For each expert of the first model the one of the second, one to one with the highest summed similarity.

    similarity: [expert, expert of the other]. int64 [expert], -1 for those left over where the other has fewer
    (Hungarian method, Kuhn 1955).
    """
    matches = np.full(len(similarity), -1)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    matches[rows] = columns
    return matches


def matches_table(layer: int, by: str, similarity: np.ndarray) -> pd.DataFrame:
    """One row per expert of the first model: layer, by, expert, match, similarity, same, average, moved.

    match: as `match_experts` gives it, and its similarity. same: that of the expert of the same number. average: of all
    of the other model's experts. moved: whether the match has another number.
    """
    matches, experts = match_experts(similarity), np.arange(len(similarity))
    there = experts[matches >= 0]
    common = np.minimum(there, similarity.shape[1] - 1)
    return pd.DataFrame(
        {
            "layer": layer,
            "by": by,
            "expert": there,
            "match": matches[there],
            "similarity": similarity[there, matches[there]],
            "same": np.where(there < similarity.shape[1], similarity[there, common], np.nan),
            "average": similarity[there].mean(1),
            "moved": matches[there] != there,
        }
    )


def matched_by_tokens(first: pd.DataFrame, second: pd.DataFrame, *, n_experts: int) -> pd.DataFrame:
    """The experts of two models matched by the tokens that select them: `matches_table` of each layer, by "tokens".

    first, second: what `SelectedExperts.table` gave for each model on the same examples. The similarity of two experts
    is the cosine N_ij / sqrt(N_i N_j), N_ij being the tokens that select i in the first model and j in the second: 1
    for the same tokens, 0 for none in common, and for an expert that is never selected.
    Raises MoELensError for tables of other tokens.
    """
    parts, size = [], max(n_experts, 1 + int(second["expert"].max()))
    for layer, own in first.groupby("layer"):
        one, other = (
            _selected(part, count) for part, count in ((own, n_experts), (second[second["layer"] == layer], size))
        )
        if not one.tokens.equals(other.tokens):
            raise MoELensError("expected the same tokens in both tables; measure both models on the same examples")
        together = (one.experts.T @ other.experts).toarray()
        alone = np.sqrt(np.outer(one.experts.sum(0), other.experts.sum(0)))
        similarity = np.divide(together, alone, out=np.zeros(together.shape), where=alone > 0)
        parts.append(matches_table(int(layer), "tokens", similarity))
    return pd.concat(parts, ignore_index=True)


def signature_distance(
    first: Mapping[str, pd.DataFrame], second: Mapping[str, pd.DataFrame], *, n_experts: int
) -> pd.DataFrame:
    """How far two models' experts are from each other by what they are used for, whatever their numbers.

    first, second: by data set what `SelectedExperts.table` gave for each model.

    An expert's specialisation is its activation rate on each data set, its collaboration the probabilities that a token
    of it selects each other expert, the highest first. A model's signature is the set of these; the distance of two is
    Wasserstein's, the mean over experts, matched so that it is lowest, of the mean difference of their numbers.

    One row per layer and profile: layer, profile, distance, same (that mean for experts of the same number), floor (the
    distance of either model from itself, one half of its texts from the other, the mean of both models: what texts
    alone bring; NaN where all are in one half).
    """
    rows = []
    for layer in sorted(set(next(iter(first.values()))["layer"])):
        models = [
            [_selected(table[table["layer"] == layer], n_experts) for table in tables.values()]
            for tables in (first, second)
        ]
        for profile, make in PROFILES.items():
            one, other = (make([part.experts for part in own]) for own in models)
            halves = [[make([part.half(side) for part in own]) for side in (0, 1)] for own in models]
            row = {"layer": int(layer), "profile": profile, "distance": _wasserstein(one, other)}
            row |= {"same": float(np.abs(one - other).mean())}
            rows.append(row | {"floor": float(np.mean([_wasserstein(*two) for two in halves]))})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Selected:
    """The experts of a layer that tokens select: tokens (id and position) in order, experts [token, expert], 0 or 1."""

    tokens: pd.MultiIndex
    experts: "sparse.csr_array"

    def half(self, side: int) -> "sparse.csr_array":
        """The rows of one half of the texts, by a hash of their id."""
        sides = np.array([sha256(str(name).encode()).digest()[0] % 2 for name in self.tokens.get_level_values("id")])
        return self.experts[sides == side]


def _selected(table: pd.DataFrame, n_experts: int) -> _Selected:
    every = pd.MultiIndex.from_frame(table[["id", "position"]])
    tokens = every.unique().sort_values()
    places = tokens.get_indexer(every), table["expert"].to_numpy(np.int64)
    return _Selected(tokens, sparse.csr_array((np.ones(len(table)), places), (len(tokens), n_experts)))


def _specialisation(parts: Sequence["sparse.csr_array"]) -> np.ndarray:
    """The activation rate of each expert on each data set, [expert, data set]; NaN for data without tokens."""
    rates = [part.sum(0) / (part.shape[0] or np.nan) for part in parts]
    return np.stack(rates, axis=1)


def _collaboration(parts: Sequence["sparse.csr_array"]) -> np.ndarray:
    """P(another | expert), the highest first, [expert, another]; 0 for an expert that is never selected.

    NaN without any tokens.
    """
    together = sum((part.T @ part).toarray() for part in parts)
    alone = together.diagonal()[:, None]
    given = np.divide(together, alone, out=np.full(together.shape, 0.0 if alone.any() else np.nan), where=alone > 0)
    others = given[~np.eye(len(given), dtype=bool)].reshape(len(given), -1)
    return -np.sort(-others, axis=1)


PROFILES: Mapping[str, Callable[[Sequence["sparse.csr_array"]], np.ndarray]] = {
    "specialisation": _specialisation,
    "collaboration": _collaboration,
}


def _wasserstein(first: np.ndarray, second: np.ndarray) -> float:
    """Of two sets of as many profiles, [expert, number] each."""
    apart = np.abs(first[:, None] - second[None]).mean(-1)
    if not np.isfinite(apart).all():
        return float("nan")
    return float(apart[linear_sum_assignment(apart)].mean())
