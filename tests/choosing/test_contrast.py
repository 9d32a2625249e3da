"""Contrast: activation rates of two sides by hand, on data with and without answers; scores that take an argument."""

import json

import pandas as pd
import pytest
import torch
from training_cases import fresh

from moe_lens import SCORES, Example, ExpertSet, MoELensError
from moe_lens.choosing import Contrast, Ground, Models, Score, choices, load_prompts, parse, score_named, score_tables
from moe_lens.choosing.router_step import stepped
from moe_lens.data import load_examples
from moe_lens.results import read_provenance

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",), "the mat"),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("the mat",), "Arland"),
    Example("c", "The dog slept in the sun.", "Who slept?", ("The dog",), "Belmor"),
]
OTHERS = [Example("x", "", "Where is the sun?", ("sun",)), Example("y", "", "Who is a dog?", ("dog",))]


@pytest.fixture
def lens(olmoe, monkeypatch):
    monkeypatch.setattr(olmoe, "progress", False)
    return olmoe


def scored(lens, score: str | Score, examples=EXAMPLES, **more) -> pd.DataFrame:
    score = score_named(score) if isinstance(score, str) else score
    return score_tables([score], Models.opened(lens, lens), examples, **more)[score.name]


def rates(lens, examples, positions) -> torch.Tensor:
    """Selections per token that counts, [layer, expert]."""
    total, tokens = 0, 0
    for record in lens.records(examples):
        mask = record.position_mask(positions)
        total = total + torch.stack([routing.selected()[mask].sum(0) for routing in record.routing.values()])
        tokens += int(mask.sum())
    return total / tokens


def expect(table: pd.DataFrame, first: torch.Tensor, second: torch.Tensor) -> None:
    assert table["score"].to_numpy() == pytest.approx((first - second).flatten().numpy(), abs=1e-6)
    assert (table["score_low"] <= table["score"] + 1e-9).all()
    assert (table["score"] <= table["score_high"] + 1e-9).all()
    assert table["score"].abs().max() > 0.05


@pytest.mark.parametrize(("name", "positions"), [
    ("contrast", "question"), ("contrast-all", "all"), ("contrast-last", "last"),
])  # fmt: skip
def test_it_is_the_rate_with_minus_without_context(lens, name, positions):
    without = [Example(one.id, "", one.question, one.answers) for one in EXAMPLES]
    expect(scored(lens, name), rates(lens, EXAMPLES, positions), rates(lens, without, positions))


def test_it_is_the_rate_of_one_data_set_minus_another(lens):
    data = {"first": EXAMPLES, "second": OTHERS}
    table = scored(lens, "contrast(first;second)", examples=[], load=data.__getitem__)
    expect(table, rates(lens, EXAMPLES, "question"), rates(lens, OTHERS, "question"))
    back = scored(lens, "contrast( second ;first)", examples=[], load=data.__getitem__)
    assert back["score"].to_numpy() == pytest.approx(-table["score"].to_numpy())


def test_two_lists_of_texts_are_enough(lens, tmp_path):
    texts = ["the cat sat", "a dog slept in the sun"], ["Context: Belmor", "Answer: the capital"]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, own in zip(files, texts, strict=True):
        file.write_text("\n".join(own) + "\n\n", encoding="utf-8")
    name = f"contrast-last({files[0]};{files[1]})"
    expect(scored(lens, name, examples=[]), *(rates(lens, own, "last") for own in texts))
    mine = Score("mine", "two lists", "base", lambda: Contrast(tuple(texts[0]), tuple(texts[1]), "last"))
    pd.testing.assert_frame_equal(scored(lens, mine, examples=[]), scored(lens, name, examples=[]))
    [choice] = choices(parse(f"{name}:2"), Ground(lens.architecture, "m", {name: scored(lens, name, examples=[])}))
    assert (choice.name, choice.family, choice.size) == (f"{name}:2", name, 2)


def test_two_labels_of_one_file_are_two_sides(lens, tmp_path):
    file = tmp_path / "all.jsonl"
    labelled = [(label, one) for label, own in (("yes", EXAMPLES), ("no", OTHERS)) for one in own]
    rows = [{"id": one.id, "context": one.context, "question": one.question, "answer": one.answers[0],
             "told": {"label": label}} for label, one in labelled]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [one.id for one in load_examples(f"{file}[told.label=no]")] == ["x", "y"]
    table = scored(lens, f"contrast({file}[told.label=yes];{file}[told.label=no])", examples=[])
    expect(table, rates(lens, EXAMPLES, "question"), rates(lens, OTHERS, "question"))
    with pytest.raises(MoELensError, match="no column 'mood'; it has id, context"):
        load_examples(f"{file}[mood=no]")
    with pytest.raises(MoELensError, match="is empty"):
        load_examples(f"{file}[told.label=perhaps]")


def test_right_and_wrong_answers_are_two_sides(lens):
    said = lens.generate(EXAMPLES, max_new_tokens=16)
    own = [Example(one.id, one.context, one.question, (text.strip() or "nothing",) if place else ("never",))
           for place, (one, text) in enumerate(zip(EXAMPLES, said, strict=True))]  # fmt: skip
    table = scored(lens, "contrast-all(right;wrong)", examples=own)
    expect(table, rates(lens, own[1:], "all"), rates(lens, own[:1], "all"))
    with pytest.raises(MoELensError, match="'right' has none"):
        scored(lens, "contrast(right;wrong)", examples=own[:1])


@pytest.mark.parametrize(("name", "examples", "says"), [
    ("contrast", OTHERS, "'x' has no context to leave out"),
    ("contrast", ["a text"], "text 0 has no context to leave out; contrast two data sets or lists"),
    ("contrast(right;wrong)", ["a text"], "text 0 has no answer"),
    ("contrast(a;b)", [], "text 0 of 'a' has no question .* take contrast-all or contrast-last"),
    ("step", ["a text"], "text 0 has no answer"),
    ("effect", ["a text"], "text 0 has no answer"),
])  # fmt: skip
def test_what_a_score_needs_and_the_data_lack_is_refused_by_name(lens, name, examples, says):
    with pytest.raises(MoELensError, match=says):
        scored(lens, name, examples, load=lambda side: ["a text"])


@pytest.mark.parametrize(("name", "says"), [
    ("contrast(a)", "two different sides, such as contrast\\(novel;swap\\)"), ("contrast(a;a)", "two different"),
    ("contrast(a;b;c)", "two different"), ("contrast()", "two different"), ("ce(a)", "ce takes nothing in brackets"),
    ("attribution(truth)", "a target is one of difference, answer, logit_difference"), ("best", "scores are ce, "),
    ("contrast-first(a;b)", "scores are ce, "),
])  # fmt: skip
def test_what_names_no_score_is_refused(name, says):
    with pytest.raises(MoELensError, match=says):
        score_named(name)
    with pytest.raises(MoELensError):
        parse(f"{name}:2")


def test_a_score_with_an_argument_is_one_like_others(tmp_path):
    assert parse("contrast(a:b.txt;c(1).txt):1,2") == (*parse("contrast(a:b.txt;c(1).txt):1"),
                                                      *parse("contrast(a:b.txt;c(1).txt):2"))  # fmt: skip
    [one] = parse("attribution-last(answer):3")
    assert one.score == SCORES["attribution-last"].given("answer") == score_named("attribution-last(answer)")
    assert (one.score.name, one.score.needs_tuned) == ("attribution-last(answer)", False)
    with pytest.raises(MoELensError, match="no score whose sum"):
        parse("contrast(a;b):p=0.5")


def test_what_a_score_names_itself_is_part_of_what_is_kept(lens, tmp_path):
    more = {"out": tmp_path, "made_by": {"model": "m"}, "examples": []}
    scored(lens, "contrast(a;b)", load={"a": EXAMPLES, "b": OTHERS}.__getitem__, **more)
    [kept] = tmp_path.glob("score-contrast_a_b_-*.parquet")
    told = str(read_provenance(kept))
    assert told.index("'first': 'a'") < told.index("'second': 'b'")
    scored(lens, "contrast(a;b)", load={"a": EXAMPLES, "b": OTHERS}.__getitem__, **more)
    with pytest.raises(MoELensError, match="holds the results of another run"):
        scored(lens, "contrast(a;b)", load={"a": EXAMPLES, "b": EXAMPLES[:1]}.__getitem__, **more)
    scored(lens, "contrast(b;a)", load={"a": EXAMPLES, "b": OTHERS}.__getitem__, **more)


def test_a_file_of_texts_has_one_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "a.txt")) == ["one", " two "]
    with pytest.raises(MoELensError, match="cannot read texts from"):
        load_prompts(str(tmp_path / "none.txt"))


def test_one_router_step_makes_the_answers_likelier_and_is_undone(tokenizer):
    lens = fresh(tokenizer)
    lens.progress = False
    before = sum(lens.answer_log_probabilities(EXAMPLES))
    weights = {name: own.clone() for name, own in lens.module.state_dict().items()}
    with stepped(lens, EXAMPLES, 0.003):
        assert sum(lens.answer_log_probabilities(EXAMPLES)) > before + 1e-3
        changed = [name for name, own in lens.module.state_dict().items() if not torch.equal(own, weights[name])]
        moved = sum(float((lens.module.state_dict()[name] - weights[name]).square().sum()) for name in changed) ** 0.5
    whole = sum(float(weights[name].square().sum()) for name in changed) ** 0.5
    assert moved == pytest.approx(0.003 * whole, rel=1e-3)
    assert [name.rsplit(".", 2)[1] for name in changed] == ["gate"] * 3
    assert all(torch.equal(own, weights[name]) for name, own in lens.module.state_dict().items())
    step, gain, usage = (scored(lens, name)["score"] for name in ("step-last", "step-gain-last", "oe-last"))
    assert gain.to_numpy() == pytest.approx((step - usage).to_numpy(), abs=1e-9)
    assert gain.abs().max() > 0


def test_every_score_of_the_base_ranks_all_experts_of_examples_that_have_all(lens):
    """By procedures; those of statistics are in test_measuring."""
    names = ["effect", "dla", *(name for name in SCORES if name.startswith("attribution") and "integrated" not in name)]
    tables = score_tables([SCORES[name] for name in names], Models.opened(lens, lens), EXAMPLES)
    for name in names:
        assert len(ExpertSet.top(tables[name], 2)) == 2 * 3, name
    assert len({tuple(table["score"].round(9)) for table in tables.values()}) == len(names)
