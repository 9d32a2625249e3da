"""The page of costs: what it says follows from what was measured, and all its parts run on a tiny model."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from moe_lens import MoELensError
from moe_lens.paper.markdown import markdown

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "analyses" / "benchmarks")
    names = ("performance", "performance_page", "olmoe_costs")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def rows(**seconds: tuple[float, ...]) -> pd.DataFrame:
    """Of each way its seconds by turn, those of plain first."""
    ways = {"plain": (1.0, 2.0), **{name.replace("__", ", "): values for name, values in seconds.items()}}
    return pd.DataFrame(
        [
            {"way": way, "plain": "plain", "turn": turn, "seconds": value, "cpu_seconds": value}
            for way, values in ways.items()
            for turn, value in enumerate(values)
        ]
    )


def test_the_page_says_where_another_way_is_cheaper(benchmarks):
    table = rows(routing__moe_lens=(1.2, 2.4), routing__nnterp=(1.1, 2.2), residual__moe_lens=(1.0, 2.0))
    table = pd.concat([table, rows(residual__nnterp=(2.0, 4.0)).query("way != 'plain'")])
    said = benchmarks.performance_page.cheaper(table, None)
    assert said.splitlines()[2:] == ["- routing: nnterp takes less time, 1.10 beside 1.20."]
    memory = pd.DataFrame({"way": table["way"].unique()})
    held = {"residual, nnterp": 3 * 2**20, "residual, moe_lens": 2**22}
    memory["added"] = memory["way"].map(held).fillna(0)
    said = benchmarks.performance_page.cheaper(table, memory)
    assert said.splitlines()[3:] == ["- residual: nnterp takes less memory (MiB), 3 beside 4."]
    without = table[table["way"] != "routing, nnterp"]
    assert benchmarks.performance_page.cheaper(without, None) == "No other way takes less."


def test_ways_of_one_capture_stand_beside_each_other_with_time_and_memory(benchmarks):
    table = rows(residual__nnterp=(1.0, 4.0), routing__moe_lens=(1.5, 3.0), residual__moe_lens=(2.0, 2.0))
    memory = pd.DataFrame({"way": table["way"].unique(), "added": [0, 2**20, 2**21, 2**22]})
    lines = benchmarks.performance_page.captured(table, memory).splitlines()
    assert lines[2:] == [
        "| plain | transformers | 1.00 (1.00 to 1.00) | 0 |",
        "| routing | moe_lens | 1.50 (1.50 to 1.50) | 2 |",
        "| residual | nnterp | 1.50 (1.25 to 1.75) | 1 |",
        "| residual | moe_lens | 1.50 (1.25 to 1.75) | 4 |",
    ]


def test_tools_that_capture_unlike_things_are_not_compared(benchmarks):
    same = [{"way": "routing, moe_lens", "sum": 10.0}, {"way": "routing, nnterp", "sum": 10.0001}]
    benchmarks.performance.agree([*same, {"way": "residual, nnterp", "sum": 3.0}])
    with pytest.raises(MoELensError, match="capture the same routing"):
        benchmarks.performance.agree([*same, {"way": "routing, transformer_lens", "sum": 9.9}])


def test_what_olmoe_takes_is_printed_as_the_page_has_it(benchmarks):
    table = pd.DataFrame(benchmarks.olmoe_costs.rows())
    page = (ROOT / "docs" / "olmoe.md").read_text(encoding="utf-8")
    assert markdown([list(table), *table.itertuples(index=False)]) in page


def test_a_step_costs_its_operations_and_its_answers_what_reading_weights_takes(benchmarks, monkeypatch):
    costs = benchmarks.olmoe_costs
    monkeypatch.setattr(costs, "OPERATIONS", {"fast": 1e12})
    monkeypatch.setattr(costs, "BANDWIDTH", {"fast": 1e9})
    assert costs.TOKENS == 250
    reading = costs.Step("", 64, 2, 0, 0.0).hours(10**9, 10**9, "fast")
    assert reading * 3600 == pytest.approx(64 * 250 * 2 * 2e9 / 1e12)
    answered = costs.Step("", 64, 0, 1, 0.0).hours(10**9, 10**9, "fast")  # two batches of 16 tokens, 2 s to read each
    assert answered * 3600 == pytest.approx(64 * 250 * 2e9 / 1e12 + 2 * 16 * 2)
    assert [costs.told(hours) for hours in (0.01, 1.0, 50.0, 240.0)] == ["36 s", "60 min", "50 h", "10 days"]


@pytest.mark.slow
@pytest.mark.long
def test_all_parts_run_and_make_the_page(benchmarks, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks.performance, "TRAINED", ("stock", "peft-lora"))
    page = tmp_path / "performance.md"
    benchmarks.performance.main(out=tmp_path / "run", page=page, turns=1, size="tiny")
    text = page.read_text(encoding="utf-8")
    assert benchmarks.performance_page.LACKING not in text
    for named in ("| routing | transformers by hooks |", "| expert outputs | moe_lens |", "| zeroed by a hook |"):
        assert named in text
    for named in ("| single_expert_effects |", "| loop, one by one |", "| peft-lora |", "- moe_lens "):
        assert named in text
    before = page.read_bytes()
    benchmarks.performance.main(out=tmp_path / "run", page=page, turns=1, size="tiny")
    assert page.read_bytes() == before, "what was measured is kept"
