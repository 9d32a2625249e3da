"""Routing as a value, and the rules from logits to gating weights."""

import math

import pytest
import torch

from moe_lens.errors import MoELensError
from moe_lens.routing import (
    IN_TURN,
    SCALE_PER_EXPERT,
    SHARED_IN_SUM,
    Routing,
    ScoringRule,
    contribution,
    recognize_rule,
)

LOGITS = torch.log(torch.tensor([[[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]]))
INDICES = torch.tensor([[[3, 2], [0, 1]]])


@pytest.fixture
def routing():
    return Routing(LOGITS, INDICES, ScoringRule("softmax", renormalizes=False).weights(LOGITS, INDICES))


def test_selected_marks_exactly_the_chosen_experts(routing):
    assert routing.selected().tolist() == [[[False, False, True, True], [True, True, False, False]]]


def test_probabilities_are_softmax_over_all_experts(routing):
    torch.testing.assert_close(routing.probabilities()[0, 0], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert routing.n_experts == 4


def test_rules_give_the_weights_computed_by_hand():
    over_all = ScoringRule("softmax", renormalizes=False).weights(LOGITS, INDICES)
    over_chosen = ScoringRule("softmax", renormalizes=True, scale=2.0).weights(LOGITS, INDICES)
    sigmoid = ScoringRule("sigmoid", renormalizes=False).weights(LOGITS, INDICES)
    torch.testing.assert_close(over_all[0, 0], torch.tensor([0.4, 0.3]))
    torch.testing.assert_close(over_chosen[0, 0], torch.tensor([8 / 7, 6 / 7]))
    torch.testing.assert_close(sigmoid[0, 0], torch.tensor([4 / 5, 3 / 4]))


def test_bfloat16_logits_are_scored_in_float32():
    weights = ScoringRule("softmax", renormalizes=False).weights(LOGITS.bfloat16(), INDICES)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalizes", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5, 16.0])
def test_a_rule_is_recognised_from_what_it_makes(score, renormalizes, scale):
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    indices = logits.topk(3).indices
    rule = ScoringRule(score, renormalizes, scale)
    assert recognize_rule(logits, indices, rule.weights(logits, indices)) == rule


@pytest.mark.parametrize(("margin", "second"), [(0.2, 1.0), (1.0, 1 / (1 + math.exp(-1.9)))])
def test_experts_chosen_in_turn_are_weighed_among_those_left_that_are_near_the_best(margin, second):
    logits, indices = torch.tensor([[2.0, 1.9, 0.0, -9.0]]), torch.tensor([[0, 1]])
    rule = ScoringRule(IN_TURN, renormalizes=False, margin=margin)
    first = 1 / (1 + math.exp(-0.1) + (math.exp(-2.0) if margin == 1.0 else 0))
    weights = rule.weights(logits, indices)
    torch.testing.assert_close(weights, torch.tensor([[first, second]]))
    assert recognize_rule(logits, indices, weights, margin=margin) == rule
    assert str(rule) == f"softmax, one expert after another within {margin:g}"


def test_a_contribution_is_of_the_weighted_outputs_of_the_experts_asked_for():
    weights, outputs = torch.tensor([[[0.5, 0.25]]]).bfloat16(), torch.tensor([[[[2.0, 0.0], [0.0, 8.0]]]])
    indices = torch.tensor([[[3, 1]]])
    assert contribution(indices, weights, outputs, None).tolist() == [[[1.0, 2.0]]]
    assert contribution(indices, weights, outputs, [1, 2]).tolist() == [[[0.0, 2.0]]]


def test_weights_of_no_rule_are_not_recognised():
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    indices = logits.topk(3).indices
    assert recognize_rule(logits, indices, logits.gather(-1, indices).exp()) is None


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_share_of_shared_experts_is_only_taken_for_one_where_the_router_scores_them(score):
    logits = torch.randn(32, 9, generator=torch.Generator().manual_seed(1))
    indices = logits[:, :8].topk(3).indices
    with_shared = torch.cat([indices, torch.full((32, 1), 8)], -1)
    weights = 2.0 * ScoringRule(score, renormalizes=True).weights(logits, with_shared)[:, :3]
    rule = recognize_rule(logits[:, :8], indices, weights, scores_shared=True)
    assert (rule.score, rule.also) == (score, SHARED_IN_SUM)
    torch.testing.assert_close(rule.fitted(logits[:, :8], indices, weights), weights)
    assert not torch.allclose(rule.fitted(logits[:, :8], indices, weights.flip(-1)), weights.flip(-1))
    assert recognize_rule(logits[:, :8], indices, weights) is None
    with pytest.raises(MoELensError, match="share of the shared experts enters them too"):
        rule.weights(logits[:, :8], indices)


def test_a_scale_of_each_expert_is_found_and_held_to():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    indices = logits.topk(3).indices
    scales = torch.arange(1.0, 9.0)
    weights = ScoringRule("softmax", renormalizes=True).weights(logits, indices) * scales[indices]
    rule = recognize_rule(logits, indices, weights)
    assert (rule.score, rule.renormalizes, rule.also) == ("softmax", True, SCALE_PER_EXPERT)
    torch.testing.assert_close(rule.fitted(logits, indices, weights), weights)
    assert not torch.allclose(rule.fitted(logits, indices, weights**2), weights**2, rtol=1e-2)
