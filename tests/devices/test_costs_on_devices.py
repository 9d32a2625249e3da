"""What features cost on a device for each layer of a model, beyond the bare model's own forward passes, stays bounded.

Of a model with more layers and one with fewer the difference is taken, so that what a batch costs once does not count.
"""

import pytest
from device_costs import COSTED, cost_per_layer
from pretend_device import pretend_devices

#: By feature: how often the host may wait for the device, and how many kernels may be launched, for each layer.
BOUNDS = {}


@pytest.fixture(scope="module", autouse=True)
def devices():
    with pretend_devices():
        yield


def test_every_costed_feature_has_a_bound():
    assert set(BOUNDS) == set(COSTED)


@pytest.mark.parametrize("name", COSTED)
def test_a_layer_costs_no_more_than_its_bound(name):
    cost = cost_per_layer(name)
    waits, kernels = BOUNDS[name]
    assert cost.waits <= waits, cost.where
    assert cost.kernels <= kernels, cost.where
