"""Learned sets by name: what a text asks for, on which data, and that what was found is kept and chosen again."""

from contextlib import nullcontext
from functools import partial

import pytest
from training_cases import EXAMPLES, fresh

from moe_lens import ExpertSet, MoELensError
from moe_lens.choosing import Ground, Learned, Models, Recipe, Wanted, choices, find_set, learned, parse, score_tables
from moe_lens.choosing.selection import scores_of
from moe_lens.choosing.smallest import Sufficing

QUICK = Recipe(passes=2, rows=2, held=2, exchanges=1)


@pytest.mark.parametrize(("text", "wanted", "spare", "seed"), [
    ("set:4", Wanted(4), (), 0), ("set:budget=16", Wanted(budget=16), (), 0),
    ("set:4;keep", Wanted(4, keep=True), (), 0),
    ("set:keep=0.9;seed=2", Sufficing(0.9), (), 2),
    ("set:2;spare=closed_book,hops;seed=3", Wanted(2), ("closed_book", "hops"), 3),
])  # fmt: skip
def test_a_text_says_how_many_and_what_is_spared_and_is_the_name(text, wanted, spare, seed):
    [found] = parse(text)
    assert isinstance(found, Learned)
    assert (found.way.wanted, found.way.spare, found.way.seed) == (wanted, spare, seed)
    assert found.name == text
    assert [one.way.wanted for one in parse("set:1,3")] == [Wanted(1), Wanted(3)]


def test_sets_of_one_aim_are_one_family_and_those_of_another_are_not():
    names = ("set:1;spare=hops", "set:4;spare=hops", "set:4", "set:4;keep")
    families = [selection.family for name in names for selection in parse(name)]
    assert families[0] == families[1]
    assert len(set(families)) == 3


@pytest.mark.parametrize("text", [
    "set", "set:", "set:four", "set:budget=", "set:4;spare=", "set:4;spare=a,a", "set:4;keep=1",
    "set:4;keep;spare=hops", "set:4;keep;keep", "set:4;mode=zero", "set:4;seed=-1", "set:0",
    "set:keep=0", "set:keep=1.5", "set:keep=0.9;keep", "set:keep=0.9;spare=hops", "set:keep=", "set:keep=0.5,0.9",
])  # fmt: skip
def test_texts_that_ask_for_no_set_are_refused(text):
    with pytest.raises(MoELensError):
        parse(text)


def test_a_set_is_learned_on_the_model_at_hand_sparing_named_data_and_kept(tokenizer, tmp_path, monkeypatch):
    lens = fresh(tokenizer, num_hidden_layers=1, num_experts=6)
    lens.progress = False
    asked = []

    def searched(*arguments, **named):
        asked.append(named["spare"])
        return find_set(*arguments, **named, recipe=QUICK)

    monkeypatch.setattr(learned, "find_set", searched)
    [selection] = parse("set:2;spare=mats")
    models = Models(base=partial(pytest.fail, "the base was opened"), tuned=lambda: nullcontext(lens))
    data = {"mats": EXAMPLES[:3]}

    def chosen(load) -> ExpertSet:
        tables = score_tables(
            scores_of([selection]), models, EXAMPLES[3:7], out=tmp_path, made_by={"model": "m"}, load=load
        )
        [choice] = choices([selection], Ground(lens.architecture, "m", tables))
        return choice.experts

    first = chosen(data.__getitem__)
    assert asked == [data]
    by_hand = find_set(lens, EXAMPLES[3:7], Wanted(2), spare=data, recipe=QUICK)
    assert first == by_hand.experts
    assert chosen(data.__getitem__) == first
    assert len(asked) == 1, "what is kept was learned again"
    with pytest.raises(MoELensError, match="another run"):
        chosen({"mats": EXAMPLES[:2]}.__getitem__)
