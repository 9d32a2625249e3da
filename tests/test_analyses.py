"""The measurements of the organism and the analysis on them, run small from end to end."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe_lens.results import read_table
from moe_lens.scores import SCORES

ROOT = Path(__file__).parents[1]


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_scores_are_compared_with_both_truths(tmp_path):
    measure = "-m moe_lens.organism.measure --model organism:planted --seeds 0,1 --limit 16 --out tuned"
    printed = run(*measure.split(), folder=tmp_path)
    assert "router-tuned" in printed
    tasks = read_table(tmp_path / "tuned" / "tasks.parquet")
    assert set(tasks["task"]) == {"swap", "novel", "consistent", "hops", "closed_book", "summary"}
    assert len(tasks) == 6 * 3  # the base model once, two seeds of tuning

    script = str(ROOT / "analyses" / "which_score.py")
    run(script, *"--routers tuned --out scores --limit 12 --n-random 2".split(), folder=tmp_path)
    scores = read_table(tmp_path / "scores" / "scores.parquet")
    assert set(scores["score"]) == set(SCORES)
    assert scores["auc"].between(0, 1).all()
    assert scores["spearman"].between(-1, 1).all()
    masks = read_table(tmp_path / "scores" / "masks.parquet")
    assert set(masks["intervention"]) == {"none", "strongest", "planted", "random#0", "random#1"}
    effects = read_table(tmp_path / "scores" / "effects.parquet")
    assert len(effects) == 2 * 4 * 16


def test_every_analysis_is_short_and_says_how_it_is_run():
    scripts = sorted((ROOT / "analyses").glob("*.py"))
    assert scripts
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 80, script.name
        assert f"python analyses/{script.name}" in text
