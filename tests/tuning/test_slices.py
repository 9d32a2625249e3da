"""The sum over a token's experts, whose backward is our own."""

import pytest
import torch
from training_cases import fresh

from moe_lens.tuning.slices import _forward, _WeightedSum

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
def test_the_weighted_sum_has_the_more_precise_dtype_also_under_autocast(dtype, weights_dtype):
    weights, order, parts = rows(dtype, weights_dtype, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in training
        ours = _WeightedSum.apply(weights, order, *parts)[:, 0]
    precise = torch.promote_types(dtype, weights_dtype)
    assert ours.dtype == precise
    placed = torch.cat(parts).double()[torch.argsort(order)].view(TOKENS, K, D_MODEL)
    expected = (placed * weights.double()[:, :, None]).sum(1)
    torch.testing.assert_close(ours, expected.to(precise))
    upstream = torch.randn(TOKENS, D_MODEL).to(precise)
    found = torch.autograd.grad(ours, (weights, *parts), upstream)
    references = torch.autograd.grad(expected, (weights, *parts), upstream.double())
    for gradient, reference in zip(found, references, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_rows_and_weights_that_need_no_gradient_cost_none():
    weights, order, (first, second) = rows(torch.float32, torch.float32, 4)
    summed = _WeightedSum.apply(weights, order, first, second.detach())
    of_weights, _, *of_rows = summed.grad_fn.apply(torch.ones_like(summed))
    assert of_weights is not None
    assert [gradient is None for gradient in of_rows] == [False, True]
    assert _WeightedSum.apply(weights, order, first, second).grad_fn.saved_tensors[2] is not None
    assert _WeightedSum.apply(weights.detach(), order, first, second).grad_fn.saved_tensors[2] is None


def test_what_the_experts_gave_may_be_changed_in_place(tokenizer):
    experts = fresh(tokenizer).module.model.layers[0].mlp.experts
    hidden = torch.randn(5, experts.hidden_dim, requires_grad=True)
    selected, weights = torch.arange(10).view(5, 2) % experts.num_experts, torch.rand(5, 2)
    output = _forward(experts, hidden, selected, weights)
    output += 1
    assert torch.autograd.grad(output.sum(), hidden)[0].abs().max() > 0
