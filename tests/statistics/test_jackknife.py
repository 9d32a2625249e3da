"""Intervals over texts: equal to a formula where there is one, as wide as a bootstrap's, right as often as they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_usage import record

from moe_lens.lens import Needs
from moe_lens.lens.devices import OnDevices
from moe_lens.metrics import bootstrap_interval
from moe_lens.statistics import CoActivation, RouterLoad
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.jackknife import GROUPS, by_group, groups_of, with_interval


def mean(sums):
    return {"mean": np.array([sums["value"] / sums["tokens"]])}


def grouped(values: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    return {
        name: np.bincount(groups, weights, minlength=GROUPS)
        for name, weights in (("value", values), ("tokens", np.ones(len(values))))
    }


def test_of_a_mean_over_equal_groups_it_is_students_interval():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=60), np.arange(60) % GROUPS
    value, low, high = with_interval(mean, grouped(values, groups), size="tokens")["mean"]
    means = np.array([values[groups == group].mean() for group in range(GROUPS)])
    reach = 2.262157 * means.std(ddof=1) / np.sqrt(GROUPS)  # Student's t with 9 degrees of freedom, 97.5 %
    assert [value[0], low[0], high[0]] == pytest.approx([values.mean(), values.mean() - reach, values.mean() + reach])


def test_it_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        values = rng.normal(1, 1, size=200)
        _, low, high = with_interval(mean, grouped(values, rng.integers(0, GROUPS, 200)), size="tokens")["mean"]
        held += low[0] < 1 < high[0]
    assert 0.92 < held / 400 < 0.98


def test_one_group_has_no_interval():
    sums = grouped(np.ones(3), np.zeros(3, dtype=int))
    value, low, high = with_interval(mean, sums, size="tokens")["mean"]
    assert value[0] == 1
    assert np.isnan([low[0], high[0]]).all()


def test_groups_depend_on_ids_alone_and_sums_on_groups():
    ids = [f"example-{i}" for i in range(1000)]
    groups = groups_of(ids)
    assert groups_of(ids[::-1]).tolist() == groups.tolist()[::-1]
    assert np.bincount(groups, minlength=GROUPS).min() > 60  # 100 expected
    values = torch.rand(1000, 2, dtype=torch.float64)
    expected = [values[groups == group].sum(0).tolist() for group in range(GROUPS)]
    np.testing.assert_allclose(by_group(values, OnDevices(groups)), expected)


@pytest.fixture(scope="module")
def part():
    """400 texts of 3 tokens."""
    texts = record([3] * 400, k=3, n_experts=7)
    return replace(texts, ids=tuple(f"text-{i}" for i in range(400)))


def test_entropys_interval_is_about_a_bootstraps_over_texts(part):
    table = RouterLoad().update(part).table()
    for row in table.itertuples():
        probabilities = part.routing[row.layer].logits.double().softmax(-1)
        entropies = -(probabilities * probabilities.log2()).sum(-1).mean(1).numpy()  # [text]
        expected = bootstrap_interval(entropies)
        assert row.entropy == pytest.approx(expected.mean)
        assert 0.5 < (row.entropy_high - row.entropy_low) / (expected.high - expected.low) < 2


def test_coactivations_interval_is_about_a_bootstraps_over_texts(part):
    table = CoActivation().update(part).table().set_index(["layer", "expert", "other"])
    layer = table.index[0][0]
    selected = part.routing[layer].selected().double()
    both, alone = (selected[..., 0] * selected[..., 1]).sum(1).numpy(), selected[..., 0].sum(1).numpy()  # [text]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        texts = rng.integers(0, 400, 400)
        drawn.append(both[texts].sum() / alone[texts].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    row = table.loc[(layer, 0, 1)]
    assert row["probability"] == pytest.approx(both.sum() / alone.sum())
    assert 0.5 < (row["probability_high"] - row["probability_low"]) / (high - low) < 2
    assert row["probability_low"] < row["probability"] < row["probability_high"]


class Means(GroupSums):
    """The mean of a number of every text."""

    size = "texts"

    def __init__(self):
        super().__init__(Needs(frozenset()), {})

    def sums(self, record):
        values = record.input_ids[:, 0].double()
        counted = {"value": values, "texts": torch.ones_like(values)}
        return {0: {name: by_group(own, OnDevices(groups_of(record.ids))) for name, own in counted.items()}}

    def table(self):
        raise NotImplementedError

    def numbers(self, sums):
        return {"mean": sums["value"] / sums["texts"]}


def test_two_models_differ_in_pairs_and_by_the_second_minus_the_first():
    """Texts whose numbers differ much, but by nearly the same between the models: the pairs' interval is narrow."""
    ids = [next(f"{i}" for i in range(start, start + 9999) if groups_of([f"{i}"])[0] == g) for start, g in CELLS]
    first = torch.tensor([[100 * place] for place in range(len(ids))])
    second = first + torch.tensor([[3 + place % 2] for place in range(len(ids))])
    texts = replace(record([1] * len(ids)), ids=tuple(ids), captured={}, routing_before={})
    one, other = (Means().update(replace(texts, input_ids=own)) for own in (first, second))
    found = one.differences(other)[0]["mean"]
    per_group = (second - first)[:, 0].double().view(-1, GROUPS).mean(0).numpy()
    reach = 2.262157 * per_group.std(ddof=1) / np.sqrt(GROUPS)
    assert found["difference"] == found["second"] - found["first"] == 3.5
    assert [found["difference_low"], found["difference_high"]] == pytest.approx([3.5 - reach, 3.5 + reach])
    own = one.estimates()[0]
    assert own["mean_high"] - own["mean_low"] > 100 * reach


CELLS = [(10_000 * row, group) for row in range(3) for group in range(GROUPS)]
"""Where ids are looked for, so that each group has three texts."""
