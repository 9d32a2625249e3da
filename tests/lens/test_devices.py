"""Between the CPU and a device: few copies, each value in its place."""

import pandas as pd
import pytest
import torch
from conftest import build_model
from device_counts import counting
from placed_models import placed
from pretend_device import pretend_devices

from moe_lens import ExpertSet, MoELens
from moe_lens.lens.devices import OnDevices, has_float64, on_cpu
from moe_lens.lens.interventions import Reroute, Rows, Zero
from moe_lens.statistics import CoActivation, ExpertSaliency, ExpertUsage, RouterLoad, SelectedExperts

TEXTS = ["the cat sat", "a dog slept in the sun"]


@pytest.fixture(scope="module", autouse=True)
def pretending():
    with pretend_devices():
        yield


def test_tensors_come_to_the_cpu_in_their_order_by_one_copy_for_each_dtype_and_device():
    kept = [torch.arange(6.0).view(2, 3), torch.arange(4), torch.ones(0, 5), torch.full((), 7.0), torch.arange(3)]
    places = ["pretend:0", "pretend:0", "pretend:0", "cpu", "pretend:1"]
    away = [tensor.to(place) for tensor, place in zip(kept, places, strict=True)]
    with counting() as cost:
        back = on_cpu(away)
    assert cost.n_waits == 3
    for tensor, expected in zip(back, kept, strict=True):
        assert tensor.device.type == "cpu"
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
    assert back[3] is away[3]


def test_places_are_copied_once_to_each_device():
    places, values = OnDevices(torch.tensor([2, 0])), torch.arange(12.0).view(4, 3)
    with counting() as cost:
        for device in ("pretend:0", "pretend:1", "pretend:0"):
            here = values.to(device)
            assert torch.equal(places.of(here).cpu(), values[[2, 0]])
            assert torch.equal(places.of(here, 1).cpu(), values[:, [2, 0]])
    assert cost.n_waits == 3 + 6 + 2, "three moves there, six back, and the places twice"
    assert places.on(torch.device("cpu")) is places.values


def test_records_are_on_the_cpu_and_hold_what_a_run_on_the_device_does(tokenizer):
    lens = MoELens(placed(build_model("olmoe", len(tokenizer)), "two"), tokenizer)
    every = ExpertSet.of({layer: [0, 1] for layer in lens.architecture.moe_layers})
    with lens.intervene(Rows((Zero(every), Reroute(every)))):
        logits, stays = lens.run_with_cache(TEXTS, capture=("routing", "residual"))
        [record] = lens.records(TEXTS, capture=("routing", "residual", "logits"), positions="all", progress=False)
    order = [stays.ids.index(name) for name in record.ids]
    assert {residual.device.type for residual in stays.residual.values()} == {"pretend"}
    assert torch.equal(record.logits, logits.cpu()[order])
    for layer, routing in stays.routing.items():
        assert torch.equal(record.residual[layer], stays.residual[layer].cpu()[order])
        for mine, own in ((record.routing, routing), (record.routing_before, stays.routing_before[layer])):
            assert torch.equal(mine[layer].weights, own.weights.cpu()[order])
            assert torch.equal(mine[layer].logits, own.logits.cpu()[order])


@pytest.mark.parametrize("float64", [True, False])
def test_statistics_are_those_of_the_cpu_also_on_a_device_without_float64(tokenizer, float64):
    with pretend_devices(float64=float64):
        assert has_float64(torch.device("pretend:0")) == float64
        tables = []
        for place in ("cpu", "one"):
            lens = MoELens(placed(build_model("olmoe", len(tokenizer)), place), tokenizer)
            statistics = ExpertUsage(), RouterLoad(), CoActivation(), ExpertSaliency(), SelectedExperts()
            tables.append([statistic.table() for statistic in lens.measure(TEXTS, *statistics, progress=False)])
    for mine, expected in zip(*tables, strict=True):
        ends = [name for name in mine if name.endswith(("_low", "_high"))]
        pd.testing.assert_frame_equal(mine.drop(columns=ends), expected.drop(columns=ends))
        pd.testing.assert_frame_equal(mine[ends], expected[ends], rtol=1e-3)  # they magnify rounding
