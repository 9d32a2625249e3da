"""The checks of a lens: they pass on a sound model and fail on a sabotaged one."""

from dataclasses import replace

import pytest
import torch
from conftest import build_model, with_squared_shared_experts

from moe_lens.architecture import Moment
from moe_lens.checks import CHECKS, run_checks
from moe_lens.checks.reference import without_last_weights
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import CAPTURES, Bias, Capture, Force, MoELens, Patch, Replay, RouteAs, Scale, TopK, Zero
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.reader import TraceReader
from moe_lens.routing import ScoringRule

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]


def outcome(lens, name):
    [row] = run_checks(lens, TEXTS, names=[name]).itertuples()
    return row.outcome


def test_every_check_passes_on_each_family(lens):
    table = run_checks(lens, TEXTS)
    assert table["check"].tolist() == list(CHECKS)
    assert table["outcome"].tolist() == ["passed"] * len(CHECKS), table.to_string()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_checks_pass_under_other_experts_implementations(tokenizer, implementation):
    model = build_model("deepseek_v3", len(tokenizer))
    model.set_experts_implementation(implementation)
    table = run_checks(MoELens(model, tokenizer), TEXTS)
    assert set(table["outcome"]) == {"passed"}, table.to_string()


def test_checks_leave_weights_and_attention_as_they_were(olmoe):
    before = {name: tensor.clone() for name, tensor in olmoe.module.state_dict().items()}
    run_checks(olmoe, TEXTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in olmoe.module.state_dict().items())
    assert olmoe.module.config._attn_implementation == "sdpa"


def test_zeroed_weights_are_put_back_also_when_an_expert_is_not_there(olmoe):
    before = {name: tensor.clone() for name, tensor in olmoe.module.state_dict().items()}
    with pytest.raises(MoELensError, match="99"), without_last_weights(olmoe, ExpertSet.of({0: [1], 99: [0]})):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in olmoe.module.state_dict().items())


@pytest.fixture
def fresh(tokenizer):
    return MoELens(build_model("olmoe", len(tokenizer)), tokenizer)


def sound(lens):
    """What the check of captures finds, with its detail."""
    [row] = run_checks(lens, TEXTS, names=["capture"]).itertuples()
    return row.outcome, row.detail


@pytest.mark.parametrize(
    ("read", "name"),
    [
        ("router_logits", "routing"),
        ("router_input", "router_input"),
        ("shared_output", "shared_output"),
        ("moe_output", "moe_output"),
        ("layer_output", "residual"),
    ],
)
def test_capture_fails_if_something_else_is_recorded_and_names_it(tokenizer, read, name):
    lens = MoELens(build_model("qwen2_moe", len(tokenizer)), tokenizer)
    assert sound(lens) == ("passed", "")
    right = getattr(TraceReader, read)
    Wrong = type(
        "Wrong", (TraceReader,), {read: lambda reader, layer: right(reader, layer) * (1 + 1e-6 * (layer == 1))}
    )
    lens._runner = replace(lens._runner, reader=Wrong(lens.model, lens.architecture))
    assert sound(lens) == ("failed", f"{name} of layer 1")


def test_capture_checks_a_new_capture_too(fresh, monkeypatch):
    models = []

    def read(reader, layer, kept):
        models.append(reader.model)
        return kept.of(reader.router_input(layer), 1) + len(set(map(id, models)))

    ones_own = Capture("mine", "a wrong one", lambda architecture: [1], ((Moment.ROUTER_INPUT, read),))
    monkeypatch.setitem(CAPTURES, "mine", ones_own)
    assert sound(fresh) == ("failed", "mine of layer 1")
    assert len(models) == 2


def test_capture_says_what_is_refused_and_checks_the_rest(tokenizer):
    lens = MoELens(with_squared_shared_experts(len(tokenizer)), tokenizer)
    found, detail = sound(lens)
    assert found == "passed"
    assert detail.startswith("shared_output is refused: layer 1 adds its shared experts in its own way")


def test_masking_checks_fail_if_masking_is_not_what_it_says(fresh, monkeypatch):
    monkeypatch.setattr(Zero, "__call__", lambda self, layer, routing: routing)
    assert [outcome(fresh, name) for name in ("zero", "generate")] == ["failed", "failed"]


def test_renormalize_fails_under_the_formula_of_zero(fresh, monkeypatch):
    monkeypatch.setattr("moe_lens.checks.silencing.Renormalize", Zero)
    assert outcome(fresh, "renormalize") == "failed"


def test_reroute_fails_if_the_expert_keeps_its_place(fresh, monkeypatch):
    monkeypatch.setattr("moe_lens.checks.silencing.Reroute", Zero)
    assert outcome(fresh, "reroute") == "failed"


def test_checks_of_strengths_fail_if_strength_or_source_is_lost(fresh, monkeypatch):
    asks = {kind: kind.asks for kind in (Bias, Force, TopK)}
    for kind, stronger in (
        (Bias, lambda own, *at: replace(asks[Bias](replace(own, alpha=1.1 * own.alpha), *at))),
        (Force, lambda own, *at: RouterChange()),
        (TopK, lambda own, *at: RouterChange()),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(kind, "asks", stronger)
            assert outcome(fresh, {Bias: "bias", Force: "force", TopK: "top_k"}[kind]) == "failed"
    monkeypatch.setattr(Scale, "edited", Zero.edited)
    monkeypatch.setattr(Replay, "selection", lambda own, here, k: None)
    monkeypatch.setattr(Patch, "changed", lambda own, site, here, values: values)
    monkeypatch.setattr(RouteAs, "transplants", lambda own, here: [])
    assert [outcome(fresh, name) for name in ("scale", "replay", "route_as", "patch")] == ["failed"] * 4


def test_the_rule_fails_if_another_was_found(fresh):
    fresh.architecture = replace(fresh.architecture, scoring=ScoringRule("softmax", renormalizes=False, scale=1.01))
    assert outcome(fresh, "weights_rule") == "failed"


def test_attention_fails_on_rows_of_another_position(fresh, monkeypatch):
    read = fresh._reader.attention
    monkeypatch.setattr(type(fresh._reader), "attention", lambda reader, layer: read(layer).roll(1, dims=2))
    assert outcome(fresh, "attention") == "failed"


def test_single_outputs_fail_if_their_slots_are_swapped(fresh, monkeypatch):
    read = fresh._reader.expert_outputs
    swapped = lambda reader, layer, kept=None: read(layer, kept).flip(2)  # noqa: E731
    monkeypatch.setattr(type(fresh._reader), "expert_outputs", swapped)
    assert outcome(fresh, "expert_outputs") == "failed"


def test_the_logit_lens_fails_without_the_final_norm(fresh, monkeypatch):
    monkeypatch.setattr(type(fresh), "project_on_vocab", lambda lens, residual: lens.module.lm_head(residual))
    assert outcome(fresh, "logit_lens") == "failed"


def test_a_refusal_is_no_failure_and_says_why(fresh, monkeypatch):
    def refuse(lens, residual):
        raise MoELensError("no logits here")

    monkeypatch.setattr(type(fresh), "project_on_vocab", refuse)
    [row] = run_checks(fresh, TEXTS, names=["logit_lens"]).itertuples()
    assert (row.outcome, row.detail) == ("refused", "no logits here")


def test_unknown_checks_are_named(fresh):
    with pytest.raises(MoELensError, match=r"among capture, .*; got nothing"):
        run_checks(fresh, TEXTS, names=["nothing"])
    with pytest.raises(MoELensError, match="expected one or more prompts to check on; got none"):
        run_checks(fresh, [])
    with pytest.raises(MoELensError, match="text 1 has no tokens"):
        run_checks(fresh, ["a", ""])


def test_a_check_that_crashes_has_failed_and_the_others_go_on(fresh, monkeypatch):
    def crash(lens, residual):
        return {}["nothing"]

    monkeypatch.setattr(type(fresh), "project_on_vocab", crash)
    table = run_checks(fresh, TEXTS, names=["weights_rule", "logit_lens"])
    assert table["outcome"].tolist() == ["passed", "failed"]
    assert table["detail"].iloc[1] == "KeyError: 'nothing'"
