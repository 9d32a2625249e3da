"""The atlas from the command line: tables and pages of one model, made anew without measuring, with a run's numbers."""

import json
import sys

import pandas as pd
import pytest

from moe_lens import MoELens, atlas, load_examples
from moe_lens.commands import console
from moe_lens.results import read_table, write_table
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


def test_given_again_it_measures_nothing_and_adds_a_runs_numbers(run, monkeypatch, tmp_path):
    before = {path.name: path.read_bytes() for path in run().rglob("expert-*.js")}

    def refused(*arguments, **named):
        raise AssertionError("measured again")

    monkeypatch.setattr(MoELens, "measure", refused)
    scores = pd.DataFrame([("mine", layer, e, e / 16) for layer in range(4) for e in range(16)])
    write_table(scores.set_axis(["name", "layer", "expert", "score"], axis=1), tmp_path / "score-mine.parquet", {})
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
        ("", "swap,swap", "'swap' is named twice"),
        ("", "swap", "holds the results of another run"),
    ],
)
def test_what_makes_no_atlas_is_refused_with_what_to_do(run, capsys, options, data, says):
    run()
    capsys.readouterr()
    run(options, code=2, data=data)
    assert says in " ".join(capsys.readouterr().err.split())
