"""Maps and separability of routing vectors: clusters that are there are found, and noise is at chance."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import silhouette_score

from moe_lens.errors import MoELensError
from moe_lens.metrics import routing_map, separability


def vectors(centres: dict[str, float], *, examples: int = 20, seed: int = 0) -> pd.DataFrame:
    """Groups of examples of 12 rates each, around a centre per group."""
    rng = np.random.default_rng(seed)
    parts = []
    for task, centre in centres.items():
        rates = rng.normal(centre, 0.1, (examples, 12))
        ids, experts = np.indices(rates.shape)
        columns = {"task": task, "id": ids.ravel().astype(str), "layer": 1, "expert": experts.ravel()}
        parts.append(pd.DataFrame(columns | {"rate": rates.ravel(), "tokens": 9}))
    return pd.concat(parts, ignore_index=True)


APART, MIXED = {"a": 0.0, "b": 1.0, "c": 2.0}, {"a": 0.0, "b": 0.0, "c": 0.0}


def test_groups_that_are_apart_are_told_apart():
    row = separability(vectors(APART), permutations=200).iloc[0]
    assert (row["examples"], row["groups"]) == (60, 3)
    assert row["knn_accuracy"] == row["knn_accuracy_high"] == 1
    assert row["knn_accuracy_low"] == pytest.approx(0.025 ** (1 / 60))  # Clopper and Pearson's, of 60 of 60
    assert row["p_value"] == pytest.approx(1 / 201)
    assert row["chance"] == pytest.approx(1 / 3, abs=0.05)
    wide = vectors(APART).pivot(index=["task", "id"], columns="expert", values="rate")
    assert row["silhouette"] == pytest.approx(silhouette_score(wide, wide.index.get_level_values("task")))
    assert row["silhouette_low"] < row["silhouette"] < row["silhouette_high"]


def test_groups_that_are_one_are_at_chance():
    row = separability(vectors(MIXED), permutations=200).iloc[0]
    assert row["p_value"] > 0.05
    assert abs(row["silhouette"]) < 0.1
    assert row["knn_accuracy_low"] < row["chance"] + 0.1


def test_neighbours_are_counted_without_the_example_itself():
    line = pd.DataFrame(
        {"task": list("aabb"), "id": list("wxyz"), "layer": 0, "expert": 0, "rate": [0.0, 1.0, 1.9, 9.0], "tokens": 1}
    )
    assert separability(line, neighbours=1)["knn_accuracy"].tolist() == [0.5]  # x's nearest is y, and y's is x
    assert separability(line, neighbours=2)["knn_accuracy"].tolist() == [0.5]  # ties go to the nearest's group


def test_the_map_keeps_groups_together_and_is_reproducible():
    given = vectors(APART)
    points = routing_map(given, perplexity=10)
    pd.testing.assert_frame_equal(points, routing_map(given.sample(frac=1, random_state=1), perplexity=10))
    centres = points.groupby("task")[["x", "y"]].mean()
    distance = np.linalg.norm(points[["x", "y"]].to_numpy()[:, None] - centres.to_numpy(), axis=-1)
    assert (centres.index[distance.argmin(1)] == points["task"]).all()
    assert list(points.columns) == ["task", "id", "x", "y"]


def test_equal_vectors_have_nothing_to_draw_and_are_told_apart_no_better_than_by_chance():
    """t-SNE of equal points ends the process; neighbours in the order of the groups would tell them apart."""
    given = vectors(MIXED).assign(rate=0.25)
    for same in (given, given.assign(rate=lambda table: 0.25 + 1e-17 * table.index)):
        with pytest.raises(MoELensError, match="nothing to draw: all 60 examples take the experts alike"):
            routing_map(same, perplexity=5)
    row = separability(given, permutations=200).iloc[0]
    assert row["silhouette"] == 0
    assert row["p_value"] > 0.05


def test_misuse_is_refused():
    given = vectors(APART, examples=3)
    with pytest.raises(MoELensError, match="column 'domain'"):
        separability(given, by="domain")
    with pytest.raises(MoELensError, match="two or more groups"):
        separability(given.query("task == 'a'"))
    with pytest.raises(MoELensError, match="perplexity must lie between 1 and the 9"):
        routing_map(given)
    with pytest.raises(MoELensError, match="same experts"):
        separability(given.iloc[1:])
    with pytest.raises(MoELensError, match="repeats within its group"):
        separability(pd.concat([given, given]))
