"""The sum over a token's experts, whose backward is our own, and how torch is held while it is taken."""

import pytest
import torch
from training_cases import fresh

from moe_lens.tuning.slices import _WeightedSum
from moe_lens.tuning.state import training

TOKENS, K, D_MODEL = 5, 3, 4


def rows(dtype: torch.dtype, weights_dtype: torch.dtype, split: int):
    """weights [token, k], the place of each row, and the rows [row, d_model] in two parts."""
    torch.manual_seed(0)
    weights = torch.rand(TOKENS, K, dtype=weights_dtype, requires_grad=True)
    outputs = torch.randn(TOKENS * K, D_MODEL, dtype=dtype)
    parts = [part.requires_grad_() for part in (outputs[:split].clone(), outputs[split:].clone())]
    return weights, torch.randperm(TOKENS * K), parts


@pytest.mark.parametrize("split", [0, 4, TOKENS * K])
def test_gradients_of_the_weighted_sum_are_those_of_finite_differences(split):
    weights, order, parts = rows(torch.float64, torch.float64, split)
    assert torch.autograd.gradcheck(lambda w, a, b: _WeightedSum.apply(w, order, a, b), (weights, *parts))
    frozen = parts[1].detach()
    assert torch.autograd.gradcheck(lambda w, a: _WeightedSum.apply(w, order, a, frozen), (weights, parts[0]))
    fixed = weights.detach()
    assert torch.autograd.gradcheck(lambda a, b: _WeightedSum.apply(fixed, order, a, b), tuple(parts))


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
def test_the_weighted_sum_of_half_precision_rows_is_that_of_plain_autograd(weights_dtype):
    weights, order, parts = rows(torch.bfloat16, weights_dtype, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in training; the sum is not cut to half precision by it
        ours = _WeightedSum.apply(weights, order, *parts)
    placed = torch.cat(parts).double()[torch.argsort(order)].view(TOKENS, K, D_MODEL)
    expected = (placed * weights.double()[:, :, None]).sum(1)
    assert ours.dtype == weights_dtype
    closeness = {"rtol": 1e-2, "atol": 1e-2} if weights_dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ours.double(), expected, **closeness)
    given = (weights, *parts)
    upstream = torch.randn(TOKENS, D_MODEL)
    found = torch.autograd.grad(ours, given, upstream.to(ours.dtype))
    assert [gradient.dtype for gradient in found] == [value.dtype for value in given]
    for gradient, reference in zip(found, torch.autograd.grad(expected, given, upstream.double()), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("filled", [True, False])
def test_training_takes_sums_in_a_fixed_order_and_leaves_torch_as_it_was(tokenizer, filled):
    module = fresh(tokenizer).module
    trained = {"lm_head.weight": module.get_parameter("lm_head.weight")}
    default = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = filled
    try:
        with training(module, trained):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory == filled
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = default
