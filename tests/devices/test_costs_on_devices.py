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
    "capture expert_outputs": (1, 25),
    "capture shared_output": (0, 0),
    "capture moe_output": (1, 1),
    "capture residual": (1, 1),
    "capture attention": (1, 13),
    "capture logits": (0, 0),
    "zero, logits": (0, 2),
    "renormalize, logits": (0, 8),
    "reroute, logits": (0, 6),
    "rows, logits": (0, 25),
    "zero, generate": (0, 6),
    "renormalize, generate": (0, 24),
    "reroute, generate": (0, 18),
    "rows, generate": (0, 75),
    "logit lens": (1, 25),
    "ExpertUsage": (0, 9),
    "ExpertUsage token gate": (0, 9),
    "ExpertUsage gating_weight": (0, 9),
    "ActivationRates": (0, 21),
    "RouterLoad": (0, 22),
    "LogitSpread": (0, 14),
    "RouterMargins": (0, 17),
    "RouterHistograms": (0, 52),
    "CoActivation": (0, 15),
    "ExpertPaths": (1, 38),  # the wait is not of each layer: the model with one layer has no paths to copy
    "TokenBaseline": (0, 3),
    "TopContexts": (0, 0),
    "SelectedExperts": (0, 4),
    "RoutingTokens": (0, 14),
    "RoutingVectors": (0, 4),
    "VocabularySpecialisation": (0, 1),
    "VocabularySpecialisation predicted": (0, 1),
    "ExpertSaliency": (0, 39),
    "ExpertVocabulary": (0, 36),
    "ExpertPortraits": (1, 19),
    "OutputSimilarity": (0, 40),
    "AttentionMass": (0, 20),
    "AnswerProbability": (1, 31),
    "AnswerProbability moe_output": (1, 31),
    "weight_similarity": (1, 3),
    "router_similarity": (1, 0),
    "tune router": (0, 183),
    "tune ceft": (1, 220),
    "tune fft": (0, 221),
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
