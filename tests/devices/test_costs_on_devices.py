"""What features cost on a device for each layer of a model, beyond the bare model's own forward passes, stays bounded.

Of a model with more layers and one with fewer the difference is taken, so that what a batch costs once does not count.
"""

import device_costs
import pytest
import torch
from device_costs import COSTED, cost_per_layer
from pretend_device import pretend_devices

#: By feature: how often the host may wait for the device, and how many kernels may be launched, for each layer.
BOUNDS = {
    "capture routing": (0, 0),
    "capture router_input": (1, 1),
    "capture expert_outputs": (2, 22),
    "capture shared_output": (0, 0),
    "capture moe_output": (1, 1),
    "capture residual": (1, 1),
    "capture attention": (1, 14),
    "capture logits": (0, 0),
    "zero, logits": (1, 3),
    "renormalize, logits": (1, 9),
    "reroute, logits": (1, 7),
    "rows, logits": (14, 39),
    "zero, generate": (3, 9),
    "renormalize, generate": (3, 27),
    "reroute, generate": (3, 21),
    "rows, generate": (42, 117),
    "logit lens": (1, 25),
    "ExpertUsage": (1, 0),
    "ExpertUsage token gate": (2, 1),
    "ExpertUsage gating_weight": (2, 0),
    "RouterLoad": (2, 3),
    "CoActivation": (1, 2),
    "SelectedExperts": (2, 2),
    "RoutingVectors": (1, 2),
    "VocabularySpecialisation": (1, 0),
    "VocabularySpecialisation predicted": (1, 0),
    "ExpertSaliency": (5, 22),
    "ExpertVocabulary": (5, 22),
    "OutputSimilarity": (5, 22),
    "AttentionMass": (4, 23),
    "AnswerProbability": (6, 30),
    "AnswerProbability moe_output": (6, 30),
    "weight_similarity": (2, 2),
    "tune router": (1, 180),
    "tune ceft": (2, 217),
    "tune fft": (1, 218),
}


@pytest.fixture(scope="module", autouse=True)
def devices():
    with pretend_devices():
        yield


def test_every_costed_feature_has_a_bound():
    assert set(BOUNDS) == set(COSTED)


def test_a_wait_for_each_layer_is_counted_as_one(monkeypatch):
    monkeypatch.setattr(device_costs, "COSTED", {"asking": device_costs._beyond(_nothing, _asking)})
    cost = cost_per_layer("asking")
    assert (cost.waits, cost.kernels) == (1, 3)
    assert cost.where.startswith("devices/test_costs_on_devices.py")


def _asking(lens):
    return [(torch.zeros(3, device=lens.module.device) + 1).max().item() for _ in lens.architecture.layers]


def _nothing(lens): ...


@pytest.mark.parametrize("name", COSTED)
def test_a_layer_costs_no_more_than_its_bound(name):
    cost = cost_per_layer(name)
    waits, kernels = BOUNDS[name]
    assert cost.waits <= waits, cost.where
    assert cost.kernels <= kernels, cost.where
