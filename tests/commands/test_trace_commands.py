"""Commands on traces: measured, drawn as an atlas and compared, equal to the run that the trace is of."""

import sys

import pandas as pd
import pytest

from moe_lens import atlas, compare, measure
from moe_lens.commands import console
from moe_lens.results import read_table

ON = "--model organism --data swap --limit 5"


def command(main, line, monkeypatch):
    """The exit code of a command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *line.split()])
    with pytest.raises(SystemExit) as ended:
        console.run(main)
    return ended.value.code or 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its routing, which is a trace, and one of the other model on the same prompts."""
    folder, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    assert command(measure.main, f"{ON} --what usage,tokens,routing --out {folder / 'ours'}", patch) == 0
    other = ON.replace("organism", "organism:planted")
    assert command(measure.main, f"{other} --what routing --out {folder / 'planted'}", patch) == 0
    patch.undo()
    (folder / "a.parquet").write_bytes((folder / "ours" / "routing.parquet").read_bytes())
    (folder / "b.parquet").write_bytes((folder / "planted" / "routing.parquet").read_bytes())
    return folder


def test_measuring_a_trace_gives_the_tables_of_the_run(run, tmp_path, monkeypatch, capsys):
    line = f"{ON} --trace {run / 'a.parquet'} --what usage,tokens,coactivation --out {tmp_path / 'out'}"
    assert command(measure.main, line, monkeypatch) == 0
    for name in ("usage", "tokens"):
        ours, traced = (read_table(folder / f"{name}.parquet") for folder in (run / "ours", tmp_path / "out"))
        assert set(traced["data"]) == {"a"}
        pd.testing.assert_frame_equal(traced.drop(columns="data"), ours.drop(columns="data"), rtol=1e-12)
    assert "usage.parquet" in (tmp_path / "out" / "report.html").read_text()
    assert command(measure.main, line, monkeypatch) == 0, "the same command reads what is there"
    assert command(measure.main, line.replace("--limit 5", "--limit 4"), monkeypatch) == 2
    assert "is of none of these prompts" in capsys.readouterr().err
    everything = f"--model organism --trace {run / 'a.parquet'} --what all --out {tmp_path / 'all'}"
    assert command(measure.main, everything, monkeypatch) == 0
    said = capsys.readouterr()
    assert "left out saliency: a trace holds no expert_outputs" in said.err
    assert {"load", "specialisation"} <= {path.stem for path in (tmp_path / "all").glob("*.parquet")}


def test_what_a_trace_cannot_tell_is_refused(run, tmp_path, monkeypatch, capsys):
    line = f"--model organism --trace {run / 'a.parquet'} --out {tmp_path / 'out'} --what"
    for what, says in (
        ("weights", "needs the model itself"),
        ("usage,affinity", "affinity needs the model itself"),
        ("spread", "holds no router logits"),
        ("saturation --against organism", "cannot be put under another model"),
        (f"usage --trace {run / 'a.parquet'}", "which repeat"),
    ):
        assert command(measure.main, f"{line} {what}", monkeypatch) == 2
        assert says in capsys.readouterr().err


def test_an_atlas_of_a_trace_has_its_experts_pages(run, tmp_path, monkeypatch, capsys):
    line = f"--model organism --trace {run / 'a.parquet'} --trace {run / 'b.parquet'} --out {tmp_path}"
    assert command(atlas.main, line, monkeypatch) == 0
    assert "left out saliency" in capsys.readouterr().err
    rates = read_table(tmp_path / "tables" / "rates.parquet")
    assert set(rates["data"]) == {"", "a", "b"}
    assert {"tokens", "baseline", "partners", "paths", "contexts"} <= {
        path.stem for path in (tmp_path / "tables").glob("*.parquet")
    }
    assert (tmp_path / "index.html").exists()


def test_two_traces_are_compared_with_near_ties(run, tmp_path, monkeypatch, capsys):
    both = " ".join(str(run / name / "routing.parquet") for name in ("ours", "planted"))
    line = f"--traces {both} --model organism --out {tmp_path / 'out'}"
    assert command(compare.main, line, monkeypatch) == 0
    table = read_table(tmp_path / "out" / "agreement-of-traces.parquet")
    assert table["layer"].tolist() == [0, 1, 2, 3]
    assert table["agreement"].between(0, 0.99).all()
    ties = read_table(tmp_path / "out" / "near_ties-of-traces.parquet")
    assert len(ties) == 40
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Near ties" in page
    assert "ours/routing and planted/routing" in page
    assert command(compare.main, line.replace("--traces ", ""), monkeypatch) == 2
    assert "two models are compared on --data" in capsys.readouterr().err
