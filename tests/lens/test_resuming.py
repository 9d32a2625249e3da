"""Many masks from one pass: each is resumed at its first layer, and what it gives is what a whole run gives."""

import warnings

import pytest
import torch
from conftest import build_model

from moe_lens import Example, ExpertSet, MoELens, MoELensError
from moe_lens.architecture.tiny import FAMILIES, tiny_model, tiny_tokenizer
from moe_lens.lens import AddVector, Bias, Force, Intervention, Renormalize, Reroute, Rows, Scale, TopK, Zero
from moe_lens.lens.many_masks import Resuming

EXAMPLES = [
    Example("short", "", "Who slept?", ("the dog",)),
    Example("long", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
]
QUIET = {"batch_size": 2, "progress": False}  # so that there are pads, and a batch of one
CONVOLVED = ("inkling_text", "inkling2_text")
"""Families whose short convolutions see positions that resumed runs leave out, so that masks are run whole."""


def one(layer: int, expert: int = 1) -> ExpertSet:
    return ExpertSet.of({layer: [expert]})


def masks_on(lens: MoELens) -> list[tuple[Intervention, ...]]:
    """Of each kind one or more: in the first and the last layer with experts, in several, two together, and none."""
    first, last = lens.architecture.moe_layers[0], lens.architecture.moe_layers[-1]
    every = ExpertSet.of({layer: [2, 5] for layer in lens.architecture.moe_layers})
    wanted = [
        *(Zero(one(layer, expert)) for layer in (first, last) for expert in (1, 3)),
        Zero(every),
        Renormalize(one(first)),
        Scale(one(last), 2.5),
        Reroute(one(last)),
        Bias(one(last), 1.5, positions="from_question"),
        Force(one(last, 4)),
        TopK(2),
    ]
    return [(own,) for own in wanted] + [(Zero(one(first)), Scale(one(last), 0.5)), ()]


def possible(lens: MoELens, masks: list[tuple[Intervention, ...]]) -> list[tuple[Intervention, ...]]:
    """Those that the model can be put under."""
    found = []
    for mask in masks:
        try:
            with lens.intervene(*mask):
                found.append(mask)
        except MoELensError:
            continue
    return found


def whole_runs(lens: MoELens, masks: list[tuple[Intervention, ...]], **settings: bool) -> torch.Tensor:
    """The answers' log-probabilities [mask, example], a whole run for each mask."""
    found = []
    for mask in masks:
        with lens.intervene(*mask):
            found.append(lens.answer_log_probabilities(EXAMPLES, **QUIET, **settings))
    return torch.tensor(found)


def expect_exact(lens: MoELens, masks: list[tuple[Intervention, ...]], **settings: bool) -> None:
    """Resumed runs give the whole ones' numbers, nobody said that they do not, and some mask matters."""
    whole = whole_runs(lens, masks, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*run whole instead")
        resumed = lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET, **settings)
    torch.testing.assert_close(torch.tensor(resumed), whole, rtol=0, atol=1e-4)
    assert (whole - whole[-1]).abs().max() > 1e-2, "no mask matters, so nothing is tested"


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "qwen2_moe"])
def test_resumed_runs_of_every_kind_of_mask_equal_whole_ones(lenses, name):
    lens = lenses[name]
    masks = possible(lens, masks_on(lens))
    assert len(masks) >= 12
    expect_exact(lens, masks)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_resumed_runs_equal_whole_ones_in_every_family(name):
    try:
        lens = MoELens(tiny_model(name), tiny_tokenizer())
    except MoELensError as refused:
        pytest.skip(str(refused))
    masks = possible(lens, masks_on(lens))
    if name in CONVOLVED:
        with pytest.warns(UserWarning, match="run whole instead"):
            found = lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)
        torch.testing.assert_close(torch.tensor(found), whole_runs(lens, masks), rtol=0, atol=1e-4)
    else:
        expect_exact(lens, masks)


@pytest.mark.parametrize("settings", [{"with_end": False}, {"first_token": True}], ids=str)
def test_what_counts_of_an_answer_is_as_in_whole_runs(olmoe, settings):
    expect_exact(olmoe, masks_on(olmoe)[::4], **settings)


def test_masks_add_to_what_is_in_force(olmoe):
    with olmoe.intervene(Reroute(one(1, 0)), Scale(one(0, 2), 3.0)):
        expect_exact(olmoe, [(Zero(one(0)),), (Bias(one(2), 2.0),), ()])
    rows = Rows((Zero(one(0)), None, Reroute(one(2))))
    with olmoe.intervene(rows):
        expect_exact(olmoe, [(Zero(one(1)),), (Zero(one(2)),), ()])
    expect_exact(olmoe, [(rows,), (Zero(one(0)),), ()])


def test_the_layers_before_a_mask_run_once_for_all_masks(tokenizer):
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer)
    masks = [(Zero(one(layer, expert)),) for layer in (1, 2) for expert in range(8)]
    lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)  # the first call also sees whether it is exact
    rows = []
    projection = lens.module.model.layers[0].self_attn.q_proj
    hook = projection.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    try:
        lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)
    finally:
        hook.remove()
    assert sum(rows) == len(EXAMPLES)


def test_examples_that_a_mask_cannot_change_are_not_run(tokenizer):
    """Nobody selects the expert whose router logit is far below: neither a later layer nor the head sees a row."""
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer)
    with lens.intervene(Bias(one(1, 7), -1000.0)):
        masks = [(Zero(one(1, 7)),)] * 4
        lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)
        rows = []
        hook = lens.module.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
        try:
            found = lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)
        finally:
            hook.remove()
        assert sum(rows) == len(EXAMPLES), "the one pass that all masks share"
        assert found == [lens.answer_log_probabilities(EXAMPLES, **QUIET)] * 4


def test_what_changes_more_than_routing_runs_whole(olmoe):
    vector = torch.ones(olmoe.architecture.d_model)
    masks = [(AddVector(1, vector, 2.0),), (Zero(one(0)),), ()]
    resumed = olmoe.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)
    torch.testing.assert_close(torch.tensor(resumed), whole_runs(olmoe, masks), rtol=0, atol=1e-6)


def test_where_resuming_is_not_exact_whole_runs_are_taken_and_said(tokenizer):
    """A last layer that adds what the first one kept of all rows of its last call, which may be another pass's."""
    module = build_model("olmoe", len(tokenizer))
    first, *_, last = module.model.layers

    class Keeping(type(first)):
        def forward(self, hidden_states, *arguments, **named):
            self.kept = 0.01 * hidden_states.norm()
            return super().forward(hidden_states, *arguments, **named)

    class Adding(type(last)):
        def forward(self, hidden_states, *arguments, **named):
            return super().forward(hidden_states + hidden_states.roll(1, -1) * first.kept, *arguments, **named)

    first.__class__, last.__class__ = Keeping, Adding
    lens = MoELens(module, tokenizer)
    masks = [(Zero(one(layer, expert)),) for layer in (0, 1) for expert in range(4)]
    whole = whole_runs(lens, masks)
    with pytest.warns(UserWarning, match=r"resumed runs differ from whole ones by .* nats; each mask is run whole"):
        found = lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)
    torch.testing.assert_close(torch.tensor(found), whole, rtol=0, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = lens.answer_log_probabilities_under(EXAMPLES, masks, **QUIET)
    assert again == found, "it is known by now"


def test_every_kind_of_mask_is_seen_to_be_exact_once_those_of_rows_too(tokenizer, monkeypatch):
    lens, seen = MoELens(build_model("olmoe", len(tokenizer)), tokenizer), []
    differing = Resuming._differing
    monkeypatch.setattr(Resuming, "_differing", lambda *given: seen.append(given) or differing(*given))
    checks = []
    for first, second in ((Zero, Zero), (Zero, Zero), (Zero, Reroute)):
        rows = Rows((first(one(0)), None, second(one(1))))
        lens.answer_log_probabilities_under(EXAMPLES, [(rows,)], batch_size=3, progress=False)
        checks.append(len(seen))
    assert checks == [1, 1, 2]
