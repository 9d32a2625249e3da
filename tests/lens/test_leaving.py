"""Rows leave a batch once they have ended: what the others say, and what interventions do to them, stays as it is."""

from dataclasses import dataclass

import pytest
import torch
from conftest import build_model

from moe_lens import ExpertSet, MoELens
from moe_lens.architecture.tiny import FAMILIES, tiny_model, tiny_tokenizer
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions import AddVector, Bias, Here, Intervention, Rows, Scale, TopK, Zero
from moe_lens.lens.leaving import selectable_cache
from moe_lens.routing import Routing

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept", "the", "The cat slept in the sun", "b"]
NEW_TOKENS = 6


def with_ends(lens: MoELens) -> MoELens:
    """The lens, whose model from now on ends at many tokens, so that its answers end one after another."""
    lens.module.generation_config.eos_token_id = list(range(0, lens.module.get_input_embeddings().num_embeddings, 5))
    return lens


def generated(lens: MoELens, *interventions: Intervention) -> tuple[list[str], list[int]]:
    """What the lens says after the texts as one batch, and how many rows each pass of the model had."""
    rows: list[int] = []
    count = lens.module.register_forward_pre_hook(
        lambda module, args, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    try:
        with lens.intervene(*interventions):
            said = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=len(TEXTS), progress=False)
    finally:
        count.remove()
    return said, rows


def of_each(lens: MoELens, count: int) -> list[ExpertSet]:
    """Another expert of each layer for each of so many rows."""
    architecture = lens.architecture
    return [
        ExpertSet.of({layer: [row % architecture.n_experts] for layer in architecture.moe_layers})
        for row in range(count)
    ]


@pytest.fixture(scope="module")
def ending(tokenizer) -> MoELens:
    return with_ends(MoELens(build_model("olmoe", len(tokenizer)), tokenizer, progress=False))


@dataclass(frozen=True, eq=False, repr=False)
class Own(Intervention):
    """One of a user's own, which does nothing."""

    def __call__(self, here: Here, routing: Routing) -> Routing:
        return routing


def stacks(lens: MoELens) -> dict[str, tuple[Intervention, ...]]:
    experts, vector = of_each(lens, len(TEXTS)), torch.full((lens.architecture.d_model,), 0.5)
    mixed = [Zero(experts[0], steps="decode"), Bias(experts[1], 2.0), None, TopK(1), Scale(experts[4], 2.0, steps=(3,))]
    return {
        "none": (),
        "steps": (Zero(experts[0], steps=(2, 4)),),
        "decode": (AddVector(0, vector, steps="decode"),),
        "last": (Bias(experts[2], 3.0, positions="last"),),
        "rows": (Rows(tuple(map(Zero, experts))),),
        "mixed rows": (Rows((*mixed, AddVector(1, vector))), Zero(experts[3], steps=(3,))),
    }


@pytest.mark.parametrize("name", ["none", "steps", "decode", "last", "rows", "mixed rows"])
def test_rows_that_have_ended_leave_and_answers_are_those_of_each_row_alone(ending, name):
    stack = stacks(ending)[name]
    said, rows = generated(ending, *stack)
    with ending.intervene(*stack):
        alone = ending.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=1, progress=False)
    assert said == alone
    assert rows[0] == len(TEXTS)
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 2, "some leave, and more leave later"


def test_no_row_leaves_under_an_intervention_of_ones_own_or_from_a_cache_that_holds_more(ending):
    plain, fewer = generated(ending)
    said, rows = generated(ending, Own())
    assert said == plain
    assert set(rows) == {len(TEXTS)} != set(fewer)
    hybrid = tiny_model("minimax")
    assert selectable_cache(hybrid, hybrid.generation_config) is None


def test_the_lens_is_whole_again_after_rows_have_left(ending):
    own = Rows(tuple(map(Zero, of_each(ending, len(TEXTS)))))
    with ending.intervene(own):
        first = ending.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=len(TEXTS), progress=False)
        [record] = ending.records(TEXTS, batch_size=len(TEXTS), progress=False)
        again = ending.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=len(TEXTS), progress=False)
    assert first == again
    hits = 0
    for name, indices, weights in zip(record.ids, record.routing[0].indices, record.routing[0].weights, strict=True):
        hit = indices == of_each(ending, len(TEXTS))[int(name)][0][0]
        hits += int(hit.sum())
        assert not weights[hit].any()
    assert hits > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_leave_in_every_family_without_a_change_or_not_at_all(family):
    try:
        lens = MoELens(tiny_model(family), tiny_tokenizer(), progress=False)
    except MoELensError:
        pytest.skip("refused")
    with_ends(lens)
    for stack in ((), (Rows(tuple(map(Zero, of_each(lens, len(TEXTS))))),)):
        said, rows = generated(lens, *stack)
        with lens.intervene(*stack, Own()):
            plain = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=len(TEXTS), progress=False)
        assert said == plain
        leaves = selectable_cache(lens.module, lens.module.generation_config) is not None
        assert leaves or set(rows) == {len(TEXTS)}
