"""The atlas from the command line: tables and pages of one model, made anew without measuring, with a run's numbers."""

import json
import sys

import pandas as pd
import pytest

from moe_lens import MoELens, atlas, load_examples
from moe_lens.commands import console
from moe_lens.commands.expert_labels import parse_label
from moe_lens.results import read_provenance, read_table, write_table
from moe_lens.statistics import ExpertUsage


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("made") / "out"


@pytest.fixture
def run(monkeypatch, out):
    """The command in this process on a few examples; gives its folder."""

    def started(options: str = "", *, code: int = 0, data: str = "swap,novel"):
        given = f"--model organism:planted --data {data} --limit 4 --contexts 2 --out {out} {options}"
        monkeypatch.setattr(sys, "argv", ["atlas", *given.split()])
        with pytest.raises(SystemExit) as ended:
            console.run(atlas.main)
        assert (ended.value.code or 0) == code
        return out

    return started


def test_the_atlas_of_a_model_counts_its_experts_on_each_data_set(run):
    folder = run()
    rates = read_table(folder / "tables" / "rates.parquet")
    lens = MoELens.from_pretrained("organism:planted")
    for task in ("swap", "novel"):
        [usage] = lens.measure(load_examples(task, split="test", limit=4), ExpertUsage("token"), progress=False)
        own = rates[rates["data"] == task]
        assert (own["rate"] / 4).tolist() == pytest.approx(usage.table()["score"].tolist())
    assert len(list((folder / "atlas").glob("expert-*.js"))) == 4 * 16
    assert read_table(folder / "tables" / "left_out.parquet").empty, "this model has everything"
    shared = (folder / "atlas" / "shared.js").read_text(encoding="utf-8")
    measures = [one["name"] for one in json.loads(shared.partition(",")[2].rstrip(");\n"))["measures"]]
    assert {"rate", "rate on swap", "rate on novel", "spread", "weight", "told by the bigram"} <= set(measures)


def test_given_again_it_measures_nothing_and_adds_a_runs_numbers(run, out, monkeypatch, tmp_path):
    before = {path.name: path.read_bytes() for path in run().rglob("expert-*.js")}

    def refused(*arguments, **named):
        raise AssertionError("measured again")

    monkeypatch.setattr(MoELens, "measure", refused)
    scores = pd.DataFrame([("mine", layer, e, e / 16) for layer in range(4) for e in range(16)])
    of_this = {"weights": "0" * 64, "base_weights": read_provenance(out / "tables" / "rates.parquet")["weights"]}
    table = scores.set_axis(["name", "layer", "expert", "score"], axis=1)
    write_table(table, tmp_path / "score-mine.parquet", of_this)
    folder = run(f"--scores {tmp_path}")
    after = {path.name: path.read_bytes() for path in folder.rglob("expert-*.js")}
    assert b'"mine", 0.75, null, null, 4, 16' in after["expert-2-12.js"]
    assert run() == folder
    assert {path.name: path.read_bytes() for path in folder.rglob("expert-*.js")} == before


def test_a_table_that_somebody_took_away_is_measured_again(run):
    table = run() / "tables" / "rates.parquet"
    before = read_table(table)
    table.unlink()
    run()
    pd.testing.assert_frame_equal(read_table(table), before)


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        ("--scores nowhere", "swap,novel", "expected the folder of a run; got nowhere"),
        ("--scores a/run --scores b/run", "swap,novel", "names of their folders, which repeat: run, run"),
        ("--positions somewhere", "swap,novel", "positions must be one of"),
        ("--positions context --out elsewhere", "swap,closed_book", "no example of closed_book has a token at"),
        ("--scores another", "swap,novel", "the run another measured another model than the one of this atlas"),
        ("", "swap,swap", "'swap' is named twice"),
        ("", "swap", "holds the results of another run"),
    ],
)
def test_what_makes_no_atlas_is_refused_with_what_to_do(run, capsys, options, data, says, tmp_path, monkeypatch):
    run()
    monkeypatch.chdir(tmp_path)
    other = pd.DataFrame([("mine", 0, 0, 1.0)], columns=["name", "layer", "expert", "score"])
    write_table(other, tmp_path / "another" / "score-mine.parquet", {"weights": "0" * 64, "base_weights": "1" * 64})
    capsys.readouterr()
    run(options, code=2, data=data)
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_judge_labels_experts_and_what_it_does_not_say_is_no_label(run, judge_server, monkeypatch, capsys):
    """What a server says is text on the page, in a script that no markup of it ends."""
    address, _ = judge_server
    folder = run(f"--judge {address} --judge-model grader")
    labels = read_table(folder / "labels.parquet")
    assert len(labels) == 4 * 16
    named, mute = labels[labels["label"] != ""], labels[labels["label"] == ""]
    assert named["label"].str.startswith("<img src=x onerror=alert(1)>").all()
    assert mute["failure"].str.startswith("no clear label in the reply").all()
    assert min(len(named), len(mute)) > 5
    assert f"{len(mute)} of 64 experts have no label" in capsys.readouterr().err
    one, other = named.iloc[0], mute.iloc[0]
    page = (folder / "atlas" / f"expert-{one.layer}-{one.expert}.js").read_text(encoding="utf-8")
    assert "<img" not in page
    assert json.loads(page.partition(",")[2].rstrip(");\n"))["label"] == [[one.label, "grader"]]
    page = (folder / "atlas" / f"expert-{other.layer}-{other.expert}.js").read_text(encoding="utf-8")
    assert json.loads(page.partition(",")[2].rstrip(");\n"))["label"] == []
    run(f"--judge {address}", code=2)
    assert "belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("LABEL: names of towns", "names of towns"),
        ("Seen.\n**LABEL:** 'the  last word'.", "the last word'."),
        ("<think>LABEL: a</think>\nLABEL: b", "b"),
        ("LABEL: a\nLABEL: b", None),
        ("LABEL: a\nor so", None),
        ("LABEL:", None),
        ("LABEL: " + "long " * 20, None),
        ("names of towns", None),
    ],
)
def test_a_label_is_the_last_line_in_the_form_that_was_asked_for(reply, label):
    assert parse_label(reply) == label
