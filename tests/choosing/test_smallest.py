"""The smallest set that suffices keeps the share asked for on examples held out, and one that is smaller did not."""

from functools import partial

import numpy as np
import pytest
from training_cases import EXAMPLES, fresh

from moe_lens import ExpertSet, MoELensError, Zero
from moe_lens.choosing import FoundSet, Recipe, find_set, find_smallest, smallest

RECIPE = Recipe(passes=6, rows=4, floor=99, exchanges=2)
HELD = EXAMPLES[::3]


@pytest.fixture
def lens(tokenizer):
    lens = fresh(tokenizer, num_hidden_layers=1, num_experts=6)
    lens.progress = False
    return lens


def test_it_keeps_the_share_held_out_and_the_budget_below_did_not(lens, monkeypatch):
    said, kept = lens.generate(HELD, max_new_tokens=1), {}

    def noted(lens, fitted, wanted, **search) -> FoundSet:
        found = find_set(lens, fitted, wanted, **search)
        with lens.intervene(Zero(ExpertSet.of({0: range(6)}) - found.experts)):
            texts = lens.generate(HELD, max_new_tokens=1)
        kept[wanted.budget] = np.mean([one == own for one, own in zip(texts, said, strict=True)])
        assert not {one.id for one in fitted} & {one.id for one in HELD}
        return found

    monkeypatch.setattr(smallest, "find_set", noted)
    found = find_smallest(lens, EXAMPLES, 0.4, recipe=RECIPE, seeds=1, max_new_tokens=1)
    size = len(found.experts)
    assert kept[size] >= 0.4
    assert size == 1 or kept[size - 1] < 0.4
    assert 2 <= len(kept) <= 3, "of 6 experts bisection takes two or three searches"
    assert found.passes > RECIPE.passes * len(kept)


@pytest.mark.parametrize(("examples", "share", "says"), [
    (EXAMPLES[:1], 0.5, "give two or more"), (EXAMPLES, 1.5, "above 0 and at most 1"),
    (EXAMPLES[:4], 1.0, "no set that leaves an expert out keeps 100%"),
])  # fmt: skip
def test_what_cannot_be_found_is_refused(lens, monkeypatch, examples, share, says):
    monkeypatch.setattr(smallest, "exact_match", lambda text, answers: 0.0)
    search = partial(find_smallest, recipe=Recipe(passes=1, rows=1, held=1, exchanges=0), seeds=1, max_new_tokens=2)
    with pytest.raises(MoELensError, match=says):
        search(lens, examples, share)
