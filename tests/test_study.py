"""The scripts of the paper's figures share tuned routers and answers in one run, resume, and draw without a model."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe_lens.errors import MoELensError
from moe_lens.results import read_provenance, read_table
from moe_lens.study import Study
from moe_lens.tuning import Schedule

ANALYSES = Path(__file__).parents[1] / "analyses"


def script(name: str, *options: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ANALYSES / name), *"--out run --limit 8 --epochs 1".split(), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def study(folder: Path, *tasks: str, model: str = "organism") -> Study:
    return Study(model, tasks, folder, 8, Schedule(learning_rate=2e-2, epochs=1), (2e-2,), 8, 8, None, None)


def test_a_single_file_has_no_splits_to_tune_and_test_on(tmp_path):
    with pytest.raises(MoELensError, match="no splits"):
        study(tmp_path, "mine.jsonl")


@pytest.mark.slow
def test_a_router_is_tuned_once_and_again_for_other_weights(tmp_path):
    first = study(tmp_path, "swap")
    router = first.router("swap")
    written = (router / "delta.safetensors").stat().st_mtime_ns
    assert study(tmp_path, "swap").router("swap") == router
    assert (router / "delta.safetensors").stat().st_mtime_ns == written
    planted = study(tmp_path, "swap", model="organism:planted")
    assert planted.router("swap") == router
    assert (router / "delta.safetensors").stat().st_mtime_ns > written
    assert planted.open(router).module is not None  # its base is the planted one now


@pytest.mark.slow
def test_scripts_compute_once_and_draw_again_without_a_model(tmp_path):
    done = script("table1_router_tuning.py", "--data", "swap,novel", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = tmp_path / "run" / "table1" / "tasks.parquet"
    rows = read_table(table)
    assert [*zip(rows["variant"], rows["task"], strict=True)] == [
        (variant, task) for task in ("swap", "novel") for variant in ("base", "router-tuned")
    ]
    assert read_provenance(table)["limit"] == 8
    page, written = table.with_name("table1.html"), table.stat().st_mtime_ns
    page.unlink()
    done = script("table1_router_tuning.py", "--draw-only", "--model", "nowhere", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert page.exists()
    assert table.stat().st_mtime_ns == written


@pytest.mark.slow
def test_attention_case_is_of_one_prompt_in_two_models(tmp_path):
    done = script("figure7_attention_case.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = read_table(tmp_path / "run" / "figure7" / "attention_case.parquet")
    sums = table.groupby(["case", "model", "layer"])["attention"].sum()
    assert sums.tolist() == pytest.approx([1.0] * len(sums), abs=1e-4)
    assert set(table["model"]) == {"base", "tuned"}
