"""The benchmarks' own parts: ways take turns, what fails is told and what was found is kept, all parts run on a CPU."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from typer import Exit

from moe_lens import MoELensError
from moe_lens.lens.greedy import Greedy
from moe_lens.lens.interventions import Zero

ROOT = Path(__file__).parents[2]
MODULES = ("turns", "opened", "gpu_parts", "gpu_page", "gpu", "interventions", "memory")


@pytest.fixture
def benchmarks(monkeypatch) -> SimpleNamespace:
    """The benchmarks' modules, and processes that are forked, which start in no time."""
    monkeypatch.syspath_prepend(ROOT / "analyses" / "benchmarks")
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    monkeypatch.setattr(found.gpu, "get_context", lambda kind: multiprocessing.get_context("fork"))
    return found


def row(way: str, turn: int, seconds: float, **more: object) -> dict[str, object]:
    timed = {"seconds": seconds, "cpu_seconds": 1.0, "peak": 2**30, "added": 2**29}
    return {"what": "pass", "way": way, "plain": "plain", "turn": turn, **timed, **more}


def test_ways_take_turns_and_one_that_crashes_takes_no_more_of_them(benchmarks):
    ran = []

    def crashing() -> None:
        ran.append("c")
        if ran.count("c") == 2:
            raise RuntimeError("CUDA error\nat some length")

    ways = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b"), "c": crashing}
    rows = list(benchmarks.turns.in_turns(ways, 3, "cpu"))
    assert "".join(ran) == "abc" + "abc" + "ba" + "ab"
    assert [(found["way"], found["turn"], found.get("error")) for found in rows] == [
        ("a", 0, None), ("b", 0, None), ("c", 0, "RuntimeError: CUDA error"),
        ("b", 1, None), ("a", 1, None), ("a", 2, None), ("b", 2, None),
    ]  # fmt: skip
    assert all(found["plain"] == "a" for found in rows)


def test_a_run_is_timed_by_clock_and_by_work_and_its_memory_is_in_bytes(benchmarks):
    found = benchmarks.turns.timed(lambda: time.sleep(0.2), "cpu")
    assert found["seconds"] >= 0.2 > 0.1 > found["cpu_seconds"]
    assert 2**26 < found["peak"] < 2**38  # bytes, of a process with torch in it


def test_a_time_is_compared_with_the_plain_one_of_the_same_turn(benchmarks):
    rows = [row("lens", -1, float("nan"), error="late")]  # told first, and yet not the plain one
    rows += [row("plain", 0, 1.0), row("lens", 0, 2.0), row("plain", 1, 10.0), row("lens", 1, 40.0)]
    rows += [{"what": "pass", "way": "logits", "outcome": "as plain"}, row("plain", 0, 5.0, what="other")]
    table = benchmarks.turns.compared(rows, ["what"]).set_index(["what", "way"])
    assert table.loc[("pass", "lens"), "x_plain"] == "3.00 (2.50 to 3.50)"
    assert table.loc[("pass", "plain"), "ms"] == "5500 (3250 to 7750)"
    assert table["outcome"].to_dict() == {
        ("pass", "lens"): "failed: late", ("pass", "plain"): "", ("pass", "logits"): "as plain", ("other", "plain"): "",
    }  # fmt: skip
    assert table.loc[("pass", "lens"), ["n", "peak_gib", "added_gib"]].tolist() == [2, 1.0, 0.5]
    by_work = benchmarks.turns.compared(rows, ["what"], clock="cpu_seconds").set_index(["what", "way"])
    assert by_work.loc[("pass", "lens"), "x_plain"] == "1.00 (1.00 to 1.00)"


def test_no_ratio_is_given_where_the_plain_way_failed(benchmarks):
    rows = [{"what": "pass", "way": "plain", "plain": "plain", "turn": -1, "error": "no"}, row("lens", 0, 2.0)]
    table = benchmarks.turns.compared(rows, ["what"]).set_index("way")
    assert table.loc["lens", "x_plain"] == ""
    assert table.loc["plain", "outcome"] == "failed: no"


def test_a_part_keeps_what_it_found_before_it_failed_died_or_was_stopped(benchmarks):
    found = {"what": "pass", "way": "plain", "outcome": "well"}

    def failing(where, share, shares):
        yield found
        raise RuntimeError("device-side assert")

    def dying(where, share, shares):
        yield found
        os._exit(3)

    def hanging(where, share, shares):
        yield found
        time.sleep(900)

    def silent(where, share, shares):
        time.sleep(900)
        yield found

    def ended(run, seconds=120.0):
        first, *rest = benchmarks.gpu.run_part(benchmarks.gpu.Part(run, 1), None, seconds)
        assert rest == [] or first == found
        return [of.get("error") or of["outcome"] for of in rest or [first]]

    started = time.monotonic()
    assert ended(failing) == ["RuntimeError: device-side assert"]
    assert ended(dying) == ["one of its processes ended with code 3"]
    assert ended(hanging, 5.0) == ["stopped after 5 s, with what it had found by then"]
    assert ended(silent, 1.0) == ["it found nothing in 1 s"]
    assert time.monotonic() - started < 600  # none of them has slept its sleep out


def test_every_family_is_checked_by_one_of_the_processes_that_share_them(benchmarks):
    where = benchmarks.gpu_parts.Where("cpu", "tiny", ("olmoe", "inkling2_text", "doge"))
    shares = [list(benchmarks.gpu_parts.families(where, share, 2)) for share in range(2)]
    assert [{found["family"] for found in rows} for rows in shares] == [{"olmoe", "doge"}, {"inkling2_text"}]
    outcomes = {(of["family"], of["what"].split()[-1]): set() for rows in shares for of in rows}
    for of in (of for rows in shares for of in rows):
        outcomes[of["family"], of["what"].split()[-1]].add(of["outcome"])
    assert outcomes[("olmoe", "float32")] == outcomes[("olmoe", "bfloat16")] == {"passed"}
    assert outcomes[("doge", "float32")] == {"refused"}
    assert outcomes[("inkling2_text", "bfloat16")] == {"no model"}  # transformers' own does not run in it
    rows = [{"part": "families", **of} for of in (*shares[0], *shares[1])]
    table = benchmarks.gpu_page.table_of(rows, "cpu").set_index(["what", "way"])
    assert table.loc[("families in bfloat16", "zero"), "outcome"] == "1 passed, 1 refused, 1 no model"
    assert benchmarks.gpu_page.failures(rows) == []
    assert any(line.startswith("inkling2_text, families in bfloat16: ") for line in benchmarks.gpu_page.not_run(rows))


def test_capture_that_changes_logits_and_masks_that_do_not_act_are_told(benchmarks, monkeypatch):
    lens = benchmarks.opened.random_lens("tiny", layers=None, device="cpu")
    examples = benchmarks.opened.examples_of(lens, 2, 24)
    assert [found["outcome"] for found in benchmarks.opened.checked(lens, examples)] == [
        "as plain, bit for bit", "0 where masked",
    ]  # fmt: skip
    monkeypatch.setattr(Zero, "__call__", lambda self, layer, routing: routing)
    plain = benchmarks.opened.bare
    monkeypatch.setattr(benchmarks.opened, "bare", lambda lens, inputs: plain(lens, inputs) + 1)
    logits, weights = benchmarks.opened.checked(lens, examples)
    assert "expected the logits of a plain pass" in logits["error"]
    assert "with a weight of 0, in layer 0" in weights["error"]


def test_prompts_have_the_asked_length(benchmarks):
    lens = benchmarks.opened.random_lens("tiny", layers=1, device="cpu")
    inputs = benchmarks.opened.inputs_of(lens, benchmarks.opened.examples_of(lens, 3, 200))
    assert inputs["input_ids"].shape == (3, 200)


def test_what_would_end_an_answer_is_never_the_most_likely_of_random_weights(benchmarks):
    lens = benchmarks.opened.random_lens("tiny", layers=1, device="cpu")
    logits = benchmarks.opened.bare(lens, benchmarks.opened.inputs_of(lens, benchmarks.opened.examples_of(lens, 2, 24)))
    ends = list(Greedy(lens.module, lens.tokenizer).ends)
    assert len(ends) > 0
    assert (logits[..., ends] == 0).all(), "or else timed answers would differ in length"
    assert (logits.amax(-1) > 0).all()


def test_all_kinds_of_interventions_and_captures_take_turns_with_the_plain_model(benchmarks, tmp_path, capsys):
    asked = {"models": "tiny", "batch_size": 2, "tokens": 24, "new_tokens": 2, "turns": 1}
    benchmarks.interventions.main(out=tmp_path, **asked)
    table = pd.read_parquet(tmp_path / "interventions.parquet")
    assert set(table.loc[table["turn"] == 0, "plain"]) == {"plain"}
    ways = table.groupby("what")["way"].unique()
    assert {"plain", "Zero", "Force", "Steer", "Replay", "Patch of expert outputs"} <= {*ways["2 tokens generated"]}
    assert {"plain", "everything at the last position", "expert outputs at all positions"} <= {*ways["forward pass"]}
    assert "x plain" in capsys.readouterr().out


def test_timed_answers_are_equally_long_under_every_intervention(benchmarks):
    lens, examples = benchmarks.interventions.opened_model("organism", 2, 0)
    passes = []
    lens.module.register_forward_pre_hook(
        lambda module, args, named: passes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    for name, way in benchmarks.interventions.generation(lens, examples, 3).items():
        passes.clear()
        way()
        assert passes.count(1) == 2, name  # of the three tokens the first comes from the prompt


def test_what_an_example_adds_to_memory_is_read_from_the_second_half_of_the_curve(benchmarks):
    counts = [100, 200, 300, 400]
    curves = {"flat": [1.0, 5.0, 5.0, 5.0], "leaking": [5.0, 5.0, 5.0 + 100 * 3 / 1024, 5.0 + 200 * 3 / 1024]}
    rows = [
        {"way": way, "examples": count, "mib": mib}
        for way, curve in curves.items()
        for count, mib in zip(counts, curve, strict=True)
    ]
    assert benchmarks.memory.growth(pd.DataFrame(rows)).to_dict() == pytest.approx({"flat": 0, "leaking": 3})


def test_memory_is_read_as_examples_enter_in_every_way(benchmarks):
    for way in benchmarks.memory.WAYS:
        found = pd.DataFrame(benchmarks.memory.measured(way, 40, tokens=12, new_tokens=2, batch_size=4))
        assert found["examples"].tolist() == list(range(4, 44, 4))
        assert found["mib"].between(2**6, 2**15).all()


def test_depth_follows_the_memory(benchmarks, monkeypatch):
    where = benchmarks.gpu_parts.Where("cpu", "olmoe")
    for gib, to_run, to_train in ((141, 16, 14), (80, 16, 8), (24, 16, 2)):
        monkeypatch.setattr(benchmarks.gpu_parts, "_memory_of_the_cpu", lambda gib=gib: gib * 2**30)
        depths = [where.layers_at(cost) for cost in (benchmarks.gpu_parts.TO_RUN, benchmarks.gpu_parts.TO_TRAIN)]
        assert depths == [to_run, to_train]
    monkeypatch.setattr(benchmarks.gpu_parts, "_memory_of_the_cpu", lambda: 2**30)
    with pytest.raises(MoELensError, match=r"memory for a layer.* there is 1.0 GiB"):
        where.layers_at(benchmarks.gpu_parts.TO_TRAIN)


def test_a_page_is_written_with_what_failed_and_the_exit_code_says_so(benchmarks, monkeypatch, tmp_path, capsys):
    part = benchmarks.gpu.Part(
        lambda where, share, shares: iter([row("plain", 0, 1.0), row("lens", 0, 1.0, error="a|b")]), 1
    )
    monkeypatch.setattr(benchmarks.gpu, "PARTS", {"passes": part})
    page = tmp_path / "docs" / "gpu.md"
    with pytest.raises(Exit, match="1"):
        benchmarks.gpu.main(device="cpu", size="tiny", parts="passes", families="olmoe", minutes=1, page=page)
    text = page.read_text()
    assert "passes, pass, lens: a|b" in text
    assert r"| pass | lens | failed: a\|b |" in text
    assert f"torch: {torch.__version__}" in text
    assert "passes, pass, lens: a|b" in capsys.readouterr().out


def test_the_driver_is_what_its_own_tool_says(benchmarks, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert benchmarks.gpu_page.driver() == "unknown: there is no nvidia-smi"
    for script, said in {
        "echo 570.1; echo 570.1": "570.1",
        "echo no such >&2": "unknown: nvidia-smi says 'no such'",
    }.items():
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert benchmarks.gpu_page.driver() == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run_or_written(benchmarks, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks.gpu, "PAGE", tmp_path / "gpu.md")
    with pytest.raises(MoELensError, match="there is no CUDA device"):
        benchmarks.gpu.main()
    part = benchmarks.gpu.Part(lambda where, share, shares: iter([row("plain", 0, 1.0)]), 1)
    monkeypatch.setattr(benchmarks.gpu, "PARTS", {"passes": part})  # a forked process must not use torch's threads
    benchmarks.gpu.main(device="cpu", size="tiny", parts="passes", families="olmoe", minutes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_all_parts_run_on_the_cpu(tmp_path):
    script = str(ROOT / "analyses" / "benchmarks" / "gpu.py")
    options = f"--device cpu --size tiny --families olmoe,mixtral --minutes 40 --page {tmp_path / 'gpu.md'}"
    done = subprocess.run(
        [sys.executable, script, *options.split()], capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "gpu.md").read_text()
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in page.splitlines() if "|" in line}
    whats = {what.split(",")[0] for what, _ in lines}
    assert {"families in float32", "families in bfloat16", "forward", "attention", "statistics", "sweep"} <= whats
    assert {"2 tokens generated", "training step", "the organism's checks"} <= whats
    assert "the organism's training step" in whats
    assert {"Reroute, routing captured", "rows of all positions", "CoActivation", "ceft"} <= {way for _, way in lines}
    assert "| 2 passed |" in lines["families in bfloat16", "zero"]
    assert page.count("Nothing.") == 2
    assert "stopped after" not in page
    assert "failed:" not in page
