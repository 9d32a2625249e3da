"""Commands under torchrun: what several processes share is what one does, and each file is written once."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_lens.commands import console
from moe_lens.results import read_table

TESTS = Path(__file__).parents[1]
FEW = "--model organism --data swap --limit 5 --batch-size 2"
SCORED = "--score-limit 5 --max-new-tokens 2"
SHARED = {
    "measured": f"measure {FEW} --what usage,tokens,routing",
    "found": f"find {FEW} {SCORED} --score reap --score attribution(answer) --parts 2 --control random:1",
    "masked": f"intervene {FEW} {SCORED} --experts reap:1 --control matched:1",
    "patched": f"intervene {FEW} --max-new-tokens 2 --patch memory --positions last --layers 3",
}
HELD = f"evaluate {FEW} {SCORED} --mask reap:1 --metrics em,answer_log_probability"
"""A command on a model that is held together, or whole."""


def run(folder: Path, lines: dict[str, str], processes: int) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    told = [f"{line} --out {folder / name}" for name, line in lines.items()]
    told.append(told[0])  # the second time there is nothing to measure
    done = subprocess.run(
        [sys.executable, *launch, str(TESTS / "support" / "commands_in_turn.py"), *told],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with what one process leaves, in 1, and what two leave, in 2; and what each printed."""
    root = tmp_path_factory.mktemp("processes")
    one = run(root / "1", SHARED | {"held": HELD}, 1)
    return root, {1: one, 2: run(root / "2", SHARED | {"held": f"{HELD} --parallel tensor"}, 2)}


def both(root: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    one, two = (read_table(root / processes / name) for processes in "12")
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("folder", [*SHARED, "held"])
def test_two_processes_leave_the_files_of_one_and_say_so_once(folder, ran):
    root, said = ran
    names = [{path.relative_to(root / n / folder) for path in (root / n / folder).rglob("*.*")} for n in "12"]
    kept = [{path for path in own if path.parts[0] != "parts" and path.suffix != ".png"} for own in names]
    assert kept[0] == kept[1]
    assert said[2].count(f"written to {root / '2' / folder}") == said[1].count(f"written to {root / '1' / folder}") > 0
    assert said[2].count("5 examples, usage") == 1, "what is there is measured again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("measured/usage.parquet", "measured/tokens.parquet", "measured/routing.parquet", "found/scores.parquet"),
        *("found/agreement.parquet", "masked/answers.parquet", "masked/masking.parquet", "patched/patching.parquet"),
        *("held/answers.parquet", "held/summary.parquet"),
    ],
)
def test_tables_of_two_processes_are_those_of_one(name, ran):
    expect_close(*both(ran[0], name))


@pytest.mark.slow
@pytest.mark.long
def test_tables_of_a_model_that_two_processes_hold_together_are_those_of_one(ran, tmp_path):
    searched = {"searched": f"find {FEW} {SCORED} --score set --control random:1"}
    run(tmp_path / "1", searched, 1)
    run(tmp_path / "2", {name: f"{line} --parallel tensor" for name, line in (SHARED | searched).items()}, 2)
    for folder in (*SHARED, "searched"):
        tables = [path for path in (tmp_path / "2" / folder).rglob("*.parquet") if "parts" not in path.parts]
        assert tables
        for two in tables:
            one = tmp_path / "1" if folder == "searched" else ran[0] / "1"
            expect_close(read_table(one / two.relative_to(tmp_path / "2")), read_table(two))


def expect_close(one: pd.DataFrame, two: pd.DataFrame) -> None:
    assert list(one) == list(two)
    assert len(one) == len(two)
    for column in set(one) - {"seconds"}:
        if one[column].dtype.kind == "f":  # each process has read its weights to another place in memory
            np.testing.assert_allclose(two[column], one[column], rtol=1e-3, atol=1e-4, err_msg=column)
        else:
            pd.testing.assert_series_equal(two[column], one[column])


def test_of_processes_that_share_nothing_the_first_goes_on_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="0"):
        console.first_alone()
    monkeypatch.setenv("RANK", "0")
    console.first_alone()
    assert "WORLD_SIZE" not in os.environ
