"""Routing vectors on a map (t-SNE), and how separable groups of them are."""

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

from moe_lens.errors import MoELensError
from moe_lens.metrics.resampling import bootstrap_interval

EQUAL = 1e-9
"""Rates that differ by less are the same, but for rounding."""
COMPONENTS = 50
"""Axes that t-SNE starts from, as van der Maaten and Hinton (2008) reduce to before it."""


def routing_map(vectors: pd.DataFrame, *, by: str = "task", perplexity: float = 30.0, seed: int = 0) -> pd.DataFrame:
    """Every example as a point, near those that activate experts alike: columns `by`, id, x, y (Figure 4).

    vectors: what `RoutingVectors.table` gave, with the group of each example, such as its data set, in the column `by`.
    t-SNE keeps neighbours, not distances or sizes; `separability` says what is there without it.
    Raises MoELensError where all examples have equal vectors.
    """
    wide = by_example(vectors, by)
    matrix, names = wide.to_numpy(), wide.index.to_frame(index=False)
    if np.ptp(matrix, axis=0).max() < EQUAL:
        raise MoELensError(
            f"there is nothing to draw: all {len(matrix)} examples take the experts alike; take more experts, or "
            "examples before these are masked"
        )
    if not 1 <= perplexity < len(matrix):
        raise MoELensError(f"perplexity must lie between 1 and the {len(matrix)} examples; got {perplexity}")
    if min(matrix.shape) > COMPONENTS:
        matrix = PCA(COMPONENTS, random_state=seed).fit_transform(matrix)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(matrix)
    return names.assign(x=points[:, 0], y=points[:, 1])


def separability(
    vectors: pd.DataFrame, *, by: str = "task", neighbours: int = 5, permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How separable the groups of routing vectors are, in the vectors' own space: one row.

    Columns: examples, groups, silhouette (the mean over examples, -1 to 1) and knn_accuracy (how often most of an
    example's nearest neighbours, itself left out, are of its group; of tied groups the one with the nearest member)
    each with its 95 % interval over examples in _low and _high; chance and p_value, the mean accuracy with
    the groups shuffled, and how often a shuffle does as well.
    Raises MoELensError for less than two groups or a group of one example.
    """
    wide = by_example(vectors, by)
    matrix, names = wide.to_numpy(), wide.index.to_frame(index=False)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(matrix))  # or else equally near ones would be told apart by the order of the groups
    matrix, names = matrix[order], names.iloc[order]
    groups, labels = np.unique(names[by].to_numpy(), return_inverse=True)
    if len(groups) < 2 or np.bincount(labels).min() < 2 or not 1 <= neighbours < len(matrix):
        raise MoELensError(
            f"expected two or more groups of two or more examples and fewer neighbours ({neighbours}) than examples; "
            f"got {names[by].value_counts().to_dict()}"
        )
    near = NearestNeighbors(n_neighbors=neighbours).fit(matrix).kneighbors(return_distance=False)  # without itself
    hits = _vote(labels[near], len(groups)) == labels
    shuffled = []
    for _ in range(permutations):
        other = rng.permutation(labels)
        shuffled.append((_vote(other[near], len(groups)) == other).mean())
    row: dict[str, float] = {"examples": len(matrix), "groups": len(groups)}
    scores = {"silhouette": (silhouette_samples(matrix, labels), (-1, 1)), "knn_accuracy": (hits, (0, 1))}
    for name, (values, bounds) in scores.items():
        interval = bootstrap_interval(values, bounds=bounds, resamples=2000, seed=seed)
        row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    at_least = np.count_nonzero(np.array(shuffled) >= hits.mean() - 1e-12)
    return pd.DataFrame([row | {"chance": np.mean(shuffled), "p_value": (1 + at_least) / (1 + permutations)}])


def _vote(near: np.ndarray, n_groups: int) -> np.ndarray:
    """The group most frequent among neighbours [example, neighbour], nearest first; of tied groups the nearest's."""
    votes = (near[:, :, None] == np.arange(n_groups)).astype(float)
    earlier = np.linspace(0.1, 0, near.shape[1])[None, :, None] / near.shape[1]  # decides ties only
    first = (votes * earlier).max(1)
    winners: np.ndarray = (votes.sum(1) + first).argmax(1)
    return winners


def by_example(vectors: pd.DataFrame, by: str) -> pd.DataFrame:
    """Routing vectors with a row for each example, told by `by` and id, and a column for each layer and expert."""
    if by not in vectors.columns:
        raise MoELensError(f"expected the group of each example in a column {by!r}; got {list(vectors.columns)}")
    if vectors.duplicated([by, "id", "layer", "expert"]).any():
        raise MoELensError("an example's id repeats within its group; give every example an id of its own")
    wide = vectors.pivot(index=[by, "id"], columns=["layer", "expert"], values="rate")
    if wide.isna().any(axis=None):
        raise MoELensError("expected every example to have the same experts; measure all with equal settings")
    return wide
