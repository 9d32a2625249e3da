"""Work shared over processes: whole batches each, the counts of one process bit for bit, and other sums to rounding."""

import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sharing_processes import MEASURED

from moe_lens import MoELensError
from moe_lens.lens import parallel
from moe_lens.results import read_table
from moe_lens.statistics import ExpertUsage, RoutingTokens, TokenBaseline
from moe_lens.statistics.measures import MEASURES
from moe_lens.statistics.streamed import Streamed

TESTS = Path(__file__).parents[1]
COUNTED = ("coactivation", "specialisation", "tokens", "predictions", "saturation", "divergence")
"""Whose sums are of whole numbers, or kept example by example."""


@contextmanager
def part(number, of):
    token = parallel._part.set((number, of))
    try:
        yield
    finally:
        parallel._part.reset(token)


def test_the_parts_of_a_plan_are_its_batches_once_each(olmoe):
    texts = [f"the cat sat {'on the mat ' * n}" for n in range(23)]
    whole = [places for places, _ in olmoe._batches(texts, 4, False)]
    parts = [[places for places, _ in olmoe._batches(texts, 4, False, part=(n, 3))] for n in range(3)]
    assert [len(own) for own in parts] == [2, 2, 2]
    assert sorted(chain(*parts)) == sorted(whole)


def test_what_cannot_be_joined_is_refused_before_anything_runs(olmoe):
    with part(0, 2):
        for make in (TokenBaseline, lambda: Streamed(RoutingTokens(), print)):
            if hasattr(make(), "add_state"):
                continue  # it can be, then
            with pytest.raises(MoELensError, match="is not shared over processes"):
                olmoe.measure(["the cat"], make(), progress=False)
    [seen] = olmoe.measure(["the cat"], ExpertUsage(), progress=False)
    with part(0, 2), pytest.raises(MoELensError, match="has seen examples already"):
        olmoe.measure(["the cat"], seen, progress=False)


def test_without_other_processes_sharing_changes_nothing(olmoe):
    with parallel.sharing():
        assert parallel.own_part(olmoe.module) == parallel.WHOLE
        [shared] = olmoe.measure(["the cat", "a dog"], ExpertUsage(), progress=False)
    [alone] = olmoe.measure(["the cat", "a dog"], ExpertUsage(), progress=False)
    pd.testing.assert_frame_equal(shared.table(), alone.table())


def test_what_one_process_refuses_all_refuse(monkeypatch):
    refusal = MoELensError("of the other")
    monkeypatch.setattr(parallel, "gather_object", lambda own: [*own, ([], refusal)])
    with pytest.raises(MoELensError, match="of the other"):
        parallel.gathered(iter([1]), (0, 2))
    with pytest.raises(MoELensError, match="own"):
        parallel.gathered((_refused(number) for number in range(2)), (0, 2))


def _refused(number):
    raise MoELensError("own")


def started(*words, processes=1):
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = ":".join(map(str, (TESTS.parent, TESTS, TESTS / "support")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sums_of(statistic):
    """What a statistic has, a row for each number; of one whose table takes the model's head."""
    rows = statistic.state().drop(columns="shape").explode("values", ignore_index=True)
    return rows.astype({"values": float})


@pytest.mark.slow
def test_two_processes_get_the_statistics_scores_and_attributions_of_one(tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        started(TESTS / "support" / "sharing_processes.py", tmp_path / str(processes), processes=processes)
    ran = [int((tmp_path / place).read_text()) for place in ("1/batches-0", "2/batches-0", "2/batches-1")]
    assert ran == [5, 3, 2], "13 examples in batches of 3"
    for name in MEASURED:
        one, two = (read_table(tmp_path / str(n) / f"statistic-{name}.parquet") for n in (1, 2))
        made = [MEASURES[name].make(None, "all").add_state(state) for state in (one, two)]
        tables = [sums_of(own) if name == "vocabulary" else own.table() for own in made]
        for column in tables[0]:
            first, second = (table[column] for table in tables)
            if name in COUNTED or first.dtype.kind != "f":
                pd.testing.assert_series_equal(second, first, check_exact=True)
            else:
                np.testing.assert_allclose(second, first, rtol=1e-12, atol=1e-12, err_msg=f"{name} {column}")
    scores = sorted(path.name for path in (tmp_path / "1").glob("*-0.parquet"))
    assert len(scores) == 6
    for name in scores:
        one, two, other = (
            pd.read_parquet(tmp_path / place) for place in (f"1/{name}", f"2/{name}", f"2/{name[:-10]}-1.parquet")
        )
        pd.testing.assert_frame_equal(two, one, rtol=1e-12, atol=1e-12)
        if not name.startswith("gates"):
            pd.testing.assert_frame_equal(two, other, check_exact=True)
