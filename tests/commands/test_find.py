"""Finding experts from the command line: what each way chooses, what it cost, what returns, and files to go on with."""

import json
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from moe_lens import SCORES, ExpertSet, ExpertUsage, MoELens, MoELensError, find, load_examples
from moe_lens.causal import own_answers
from moe_lens.choosing import Contrast, Models, Recipe, find_set, learned, planted_experts
from moe_lens.commands import console
from moe_lens.commands.finding import Finder, file_name, sized
from moe_lens.commands.named_experts import Measuring, NamedExperts
from moe_lens.commands.options import Opening, Reading, Scoring
from moe_lens.commands.prompt_lists import Asked, is_list
from moe_lens.data import TEMPLATES
from moe_lens.lens.interventions import Mode
from moe_lens.results import read_table

SHORT = "--data swap --limit 4 --score-limit 8 --max-new-tokens 3 --control random:2 --size 2 --parts 2"
QUICK = Recipe(passes=1, rows=2, held=1, exchanges=1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in this process, with searches that end soon; gives its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "find_spec", lambda name: None)  # no browser, which takes seconds
    monkeypatch.setattr(learned, "find_set", partial(find_set, recipe=QUICK))

    def started(options: str, *, code: int = 0):
        monkeypatch.setattr(sys, "argv", ["find", *f"--model organism:planted {SHORT} --out out {options}".split()])
        with pytest.raises(SystemExit) as ended:
            console.run(find.main)
        assert (ended.value.code or 0) == code
        return tmp_path / "out"

    return started


def test_every_way_is_told_with_its_experts_its_cost_and_what_returns(run):
    out = run("--score oe --score reap --score set --score contrast")
    table = read_table(out / "scores.parquet").set_index("score")
    assert list(table.index) == ["oe:2", "reap:2", "set:2", "contrast:2"]
    lens = MoELens.from_pretrained("organism:planted")
    train = load_examples("swap", split="train", limit=8)
    [usage] = lens.measure(train, ExpertUsage(), progress=False)
    [contrast] = Contrast.tables([Contrast()], lens, train, load=load_examples, batch_size=8)
    chosen = {name: ExpertSet.parse(text) for name, text in table["experts"].items()}
    assert chosen["oe:2"] == ExpertSet.top(usage.table(), 2)
    assert chosen["contrast:2"] == ExpertSet.top(contrast, 2)
    for name, experts in chosen.items():
        assert ExpertSet.from_json((out / "sets" / f"{file_name(name)}.json").read_text()) == experts
    planted = planted_experts("organism:planted")
    assert table.loc["oe:2", "precision"] == len(chosen["oe:2"] & planted) / 8
    assert (table["seconds"] > 0).all()
    assert table["shared_by"].tolist() == [2, 2, 1, 1]
    assert table.loc["oe:2", "passes"] == pytest.approx(1, abs=0.2)  # pads go in too
    assert table.loc["contrast:2", "passes"] > 1.3  # with and without the contexts
    assert table["returned"].between(0, 1).all()
    agreement = read_table(out / "agreement.parquet")
    assert list(zip(agreement["first"], agreement["second"], strict=True)) == list(combinations(table.index, 2))
    masking = read_table(out / "masking.parquet").set_index("set")
    assert table["em"].to_dict() == masking.loc[table.index, "em"].to_dict()
    assert {"below_random", "random_p", "rank"} <= set(table)


def test_the_same_command_goes_on_without_measuring_again(run, monkeypatch):
    options = "--score oe --score set --spare closed_book"
    out = run(options)
    matrix = read_table(out / "selectivity.parquet")
    assert set(matrix["task"]) == {"swap", "closed_book"}
    first = {file.name: file.read_bytes() for file in out.glob("*.parquet")}

    def refused(*arguments, **named):
        raise AssertionError("measured again")

    for name in ("measure", "generate", "answer_gradients"):
        monkeypatch.setattr(MoELens, name, refused)
    run(options)
    assert {file.name: file.read_bytes() for file in out.glob("*.parquet")} == first


def test_what_suffices_is_judged_with_all_others_masked(run):
    out = run("--score set:2;keep")
    own = ExpertSet.from_json((out / "sets" / "set_2_keep.json").read_text())
    masked = read_table(out / "masking.parquet").set_index("set").loc["all but set:2;keep", "experts"]
    every = ExpertSet.of({layer: range(16) for layer in range(4)})
    assert ExpertSet.parse(masked) == every - own
    assert read_table(out / "scores.parquet")["score"].tolist() == ["set:2;keep"]


def test_a_part_that_was_damaged_is_an_error_also_where_scores_may_be_left_out(tmp_path):
    lens = MoELens.from_pretrained("organism")
    lens.progress = False
    on = Measuring(Models.opened(lens, lens), load_examples("swap", limit=2), {"model": "organism"}, load_examples)
    finder = Finder(lens, on, tmp_path, size=2, parts=0, seed=0, lenient=True)
    assert set(finder.ranked([SCORES["oe"]]).tables) == {"oe"}
    [part] = tmp_path.glob("parts/*.parquet")
    part.write_bytes(part.read_bytes()[:-9] + b"123456789")
    with pytest.raises(MoELensError, match=part.name):
        finder.ranked([SCORES["oe"]])


def test_every_second_line_of_a_list_is_scored_on_and_limited_as_data_are(tmp_path):
    texts = tmp_path / "a.txt"
    texts.write_text("".join(f"Where is {name}?\n" for name in "abacdefgc"), encoding="utf-8")  # two come again
    opening, scoring, reading = Opening(model="organism"), Scoring(score_limit=3), Asked(Reading())
    named = NamedExperts([f"contrast({texts};b.txt):1"], opening, scoring, reading, "swap", mode=Mode("zero"))
    asked = named.measuring(opening.load()).load(str(texts))
    assert [one.question for one in asked] == ["Where is a?", "Where is c?", "Where is e?"]
    assert [is_list(name) for name in ("a.txt", "C:/a.txt", "gigaword:train.article.txt", "swap")] == [1, 1, 0, 0]
    held_out = reading.load(str(texts), split="test")
    assert held_out == ["Where is b?", "Where is d?", "Where is f?"]


def test_two_lists_of_prompts_are_enough_and_asked_bare_and_judged_by_what_the_model_says(run):
    for name, task in (("a.txt", "novel"), ("b.txt", "closed_book")):
        asked = [f"{one.context} Question: {one.question}" for one in load_examples(task, limit=8)]
        Path(name).write_text("\n".join(asked), encoding="utf-8")
    out = run("--data a.txt --against b.txt --spare b.txt --score set")
    table = read_table(out / "scores.parquet").set_index("score")
    assert list(table.index) == ["set:2", "contrast(a.txt;b.txt):2"]
    answers = read_table(out / "answers.parquet")
    unmasked = answers[answers["intervention"] == "none"]
    assert set(unmasked["task"]) == {"a.txt", "b.txt"}
    assert (unmasked["em"] == 1).all()
    lens = MoELens.from_pretrained("organism:planted", template=TEMPLATES["bare"])
    halves = [Path(name).read_text().splitlines()[::2] for name in ("a.txt", "b.txt")]
    sides = [tuple(own_answers(lens, half, progress=False)) for half in halves]
    [by_hand] = Contrast.tables([Contrast(*sides)], lens, [], load=load_examples, batch_size=32)
    assert ExpertSet.parse(table.loc["contrast(a.txt;b.txt):2", "experts"]) == ExpertSet.top(by_hand, 2)
    assert set(read_table(out / "selectivity.parquet")["task"]) == {"a.txt", "b.txt"}


@pytest.mark.parametrize(("options", "says"), [
    ("--score random:2", "--score names what ranks"), ("--score nothing", "cannot read the experts 'nothing:1'"),
    ("--score set:2;spare=swap;keep", "spares no others"), ("--score oe --spare swap", "named twice"),
    ("--score ce-gain", "give --delta"), ("--score set:16", "fewer than all 16"),
    ("--score set:2;seed=²", "expected set:N"),
    ("--parts 0 --score contrast(mine.json;./mine.json)", "mine.json and ./mine.json are the same examples"),
])  # fmt: skip
def test_what_cannot_be_found_is_refused(run, options, says, capsys):
    Path("mine.json").write_text(json.dumps([{"context": "A cat.", "question": "What?", "answer": "cat"}]))
    run(options, code=2)
    assert says in capsys.readouterr().err


def test_more_parts_than_examples_leave_out_what_returns_and_say_so(run, capsys):
    table = read_table(run("--score oe --score-limit 3 --parts 4") / "scores.parquet")
    assert table["returned"].isna().all()
    assert "how many of oe return: of one of 4 parts of the data, there are no examples left" in capsys.readouterr().err


def test_a_name_of_data_may_have_a_colon_and_files_of_sets_are_apart_and_short():
    assert sized("contrast(swap;squad:mine.json)", 4) == "contrast(swap;squad:mine.json):4"
    assert [sized(name, 4) for name in ("oe", "oe:2", "set:2;spare=a")] == ["oe:4", "oe:2", "set:2;spare=a"]
    long = [file_name(f"contrast({letter * 300};b):2") for letter in "aä"]
    assert len(set(long)) == 2
    assert all(len(name.encode()) <= 200 for name in long)


@pytest.mark.slow
@pytest.mark.long
def test_by_default_all_scores_are_taken_that_the_model_allows(run):
    rows = [
        {"context": one.context, "question": one.question, "answer": one.answers[0]}
        for one in load_examples("novel", split="train", limit=8)
    ]
    Path("mine.json").write_text(json.dumps(rows), encoding="utf-8")
    out = run("--data mine.json")
    names = set(read_table(out / "scores.parquet")["score"])
    assert {"oe:2", "set:2", "contrast:2", "esft-gate:2", "attribution(answer):2"} <= names
    assert not {name for name in names if name.startswith(("ce", "effect"))}
