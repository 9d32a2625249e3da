"""Table 11: what is chosen on dev, whose routers are taken, and the script from end to end."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_lens import MoELens, MoELensError, load_examples
from moe_lens.causal.evaluation import answer_table
from moe_lens.commands.options import BaseOpening, Reading
from moe_lens.data import SCHEMAS
from moe_lens.decoding import CAD, Cited
from moe_lens.lens.delta import apply_delta
from moe_lens.paper import rivals as module
from moe_lens.paper.markdown import of_rivals
from moe_lens.paper.recipes import ROUTER, Cost, read_cost
from moe_lens.paper.rivals import Rival, Way, answers, best_way, rival_row, rivals
from moe_lens.paper.script import RATES
from moe_lens.paper.study import Study
from moe_lens.results import data_digest, provenance, read_provenance, read_table
from moe_lens.tuning import Schedule, TuneRouters, save_trained, tune

ROOT = Path(__file__).parents[2]


def study(folder: Path, *, limit: int = 6, routers: Path | None = None) -> Study:
    rates = dict.fromkeys(RATES, (2e-2,))
    fixed = Schedule(epochs=1), rates, (1,), 8, 8
    return Study(BaseOpening("organism"), Reading(), ("swap", "closed_book"), folder, limit, None, *fixed, routers)


def test_each_way_is_asked_and_answered_as_it_says(tmp_path):
    here = study(tmp_path)
    examples = here.examples("swap")
    for way, template in ((Way("opin"), "opin"), (Way(decoding=CAD(2)), None), (Way(decoding=Cited(1)), None)):
        lens = MoELens.from_pretrained("organism", **({"template": template} if template else {}))
        expected = answer_table(lens, examples, max_new_tokens=8, decoding=way.decoding, progress=False)
        found = answers(here, "swap", "test", None, way)
        pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected)
        assert (found["seconds"] > 0).all()
    told = [read_provenance(path) for path in (tmp_path / "rivals").iterdir()]
    assert sorted(one["decoding"] for one in told) == ["cad:2", "cite:1", "plain"]
    assert {one["decoding"]: one["template"] == SCHEMAS["opin"].facts() for one in told} == {
        "plain": True,
        "cad:2": False,
        "cite:1": False,
    }


def test_the_best_on_dev_is_taken_and_the_first_of_equals(tmp_path, monkeypatch):
    scores = {"cad:1": 0.5, "cad:2": 0.75, "cad:4": 0.75}
    asked = []

    def answered(here, task, split, tuned, way):
        asked.append((task, split, tuned))
        return pd.DataFrame({"em": [scores[str(way)]] * 2})

    monkeypatch.setattr(module, "answers", answered)
    ways = tuple(Way(decoding=CAD(alpha)) for alpha in (1, 2, 4))
    assert best_way(study(tmp_path), Rival("CAD", ways=ways)) == ways[1]
    assert set(asked) == {("swap", "dev", None)}
    asked.clear()
    assert best_way(study(tmp_path), Rival("base")) == Way()
    assert not asked


def test_a_row_is_over_seeds_and_examples(tmp_path, monkeypatch):
    em = {"a": [1.0, 1.0, 0.0, 1.0], "b": [1.0, 0.0, 0.0, 1.0]}

    def answered(here, task, split, tuned, way):
        return pd.DataFrame({"em": em[tuned.name], "f1": em[tuned.name], "memory": [np.nan] * 4, "seconds": 0.5})

    monkeypatch.setattr(module, "answers", answered)
    monkeypatch.setattr(module, "read_cost", lambda folder: Cost(1e-2, 10, {"a": 5.0, "b": 15.0}[folder.name]))
    row = rival_row(study(tmp_path), Rival("CEFT", ROUTER), Way(), "swap", [Path("a"), Path("b")])
    assert (row["em"], row["f1"], row["memory"], row["seeds"], row["n"]) == (0.625, 0.625, None, 2, 4)
    assert row["em_low"] < 0.5
    assert row["em_high"] == 1
    assert (row["training_seconds"], row["answer_seconds"]) == (10, 0.5)


def test_no_number_of_sentences_is_tried_that_shortens_nothing(tmp_path):
    by_name = {rival.name: rival for rival in rivals(study(tmp_path))}
    assert [str(way) for way in by_name["ContextCite"].ways] == ["cite:1", "cite:2", "cite:3"]  # contexts have up to 4
    assert [str(way) for way in by_name["CFP"].ways] == list(SCHEMAS)
    assert by_name["CEFT with CAD"].recipe == by_name["CEFT"].recipe


def test_routers_tuned_elsewhere_are_taken_if_on_the_same_examples(tmp_path):
    lens = MoELens.from_pretrained("organism")
    train = load_examples("swap", split="train", limit=6)
    schedule = Schedule(epochs=1, learning_rate=1e-2)
    tuned = tune(lens, train, [], TuneRouters(), schedule, max_new_tokens=8)
    folder = tmp_path / "routers" / "router-0"
    made_by = provenance(model="organism", data=train, seed=0, facts={"method": "router", "learning_rate": 1e-2})
    save_trained(lens.module, tuned.trained, folder, facts=made_by)
    here = study(tmp_path / "run", routers=folder.parent)
    assert here.router("swap") == folder
    cost = read_cost(folder)
    assert (cost.learning_rate, cost.trainable) == (1e-2, 4 * 16 * 128)
    assert math.isnan(cost.seconds)
    with pytest.raises(MoELensError, match="were tuned on other examples"):
        study(tmp_path / "run", limit=5, routers=folder.parent).router("swap")
    with pytest.raises(MoELensError, match=r"no tuned routers in .*router-1"):
        here.trained("swap", ROUTER, 1)
    assert made_by["data"] == data_digest(train)
    apply_delta(MoELens.from_pretrained("organism").module, folder)


def test_the_printed_table_has_a_row_per_method_with_what_it_keeps_beside():
    row = {"variant": "CAD", "task": "swap", "chosen": "cad:2", "em": 0.5, "em_low": 0.4, "em_high": 0.6, "f1": 0.55}
    row |= {"memory": 0.25, "training_seconds": None, "answer_seconds": 0.0123}
    kept = row | {"task": "closed_book", "em": 1.0, "em_low": 0.9, "em_high": 1.0, "memory": None}
    tuned = {"variant": "CEFT", "chosen": "", "training_seconds": 61.7}
    lines = of_rivals(pd.DataFrame([row, kept, row | tuned, kept | tuned])).splitlines()
    assert lines[0].split(" | ")[2:6] == ["`swap` EM", "F1", "from memory", "`closed_book` EM"]
    assert lines[2] == "| CAD | cad:2 | 0.50 [0.40, 0.60] | 0.55 | 0.25 | 1.00 [0.90, 1.00] | – | 0.012 |"
    assert lines[3] == "| CEFT | – | 0.50 [0.40, 0.60] | 0.55 | 0.25 | 1.00 [0.90, 1.00] | 62 | 0.012 |"


@pytest.mark.slow
@pytest.mark.long
def test_the_script_has_a_row_for_each_method_and_goes_on_where_it_stopped(tmp_path):
    options = "--limit 6 --seeds 0,1 --learning-rate 1e-2 --out run".split()
    command = [sys.executable, str(ROOT / "analyses" / "table11_other_methods.py"), *options]

    def run() -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed, path = run(), tmp_path / "run" / "table11" / "tasks.parquet"
    table, before = read_table(path), path.read_bytes()
    alone = {"base", "ContextCite", "CFP", "CAD", "AdaCAD"}
    trained = {"Context-DPO", "router-tuned", "CEFT"}
    both = {f"{name} with {other}" for name in ("router-tuned", "CEFT") for other in ("CAD", "ContextCite")}
    assert set(table["variant"]) == alone | trained | both
    assert set(table["task"]) == {"swap", "closed_book"}
    assert (table["seeds"] == np.where(table["variant"].isin(alone), 1, 2)).all()
    assert (table["training_seconds"].notna() == ~table["variant"].isin(alone)).all()
    compared = read_table(path.with_name("comparisons.parquet"))
    assert set(compared["reference"]) == {"CEFT"}
    assert len(compared) == 2 * (len(alone | trained | both) - 1)
    assert "Context-DPO" in printed
    shutil.rmtree(path.parent)
    parts = {part: part.stat().st_mtime_ns for part in (tmp_path / "run").rglob("*.*")}
    run()
    assert path.read_bytes() == before
    assert {part: part.stat().st_mtime_ns for part in parts} == parts
