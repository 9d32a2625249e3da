"""Routing as a value, and the rules from logits to gating weights."""

import pytest
import torch

from moe_lens.routing import Routing, ScoringRule, recognize_rule

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


def test_weights_of_no_rule_are_not_recognised():
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    indices = logits.topk(3).indices
    assert recognize_rule(logits, indices, logits.gather(-1, indices).exp()) is None
