"""The study on real text: its questions, its table, and all of it from end to end on the organism."""

import os
import runpy
import signal
import threading
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_lens import Example, MoELensError, load_examples
from moe_lens.commands import console
from moe_lens.metrics import compare
from moe_lens.paper.markdown import of_masked, of_variants
from moe_lens.paper.question_files import by_itself, write_examples
from moe_lens.paper.real_text import Sizes, _beside, run_step, steps, variants_table, write_questions
from moe_lens.results import provenance, read_provenance, read_table, write_table

STUDY = runpy.run_path(str(Path(__file__).parents[2] / "analyses" / "english_study.py"))["main"]
PARIS = Example("1", "It is in Lyon.", "Where is it?", ("Lyon",), "Paris", original_aliases=("Paname",))


def test_what_a_model_knows_by_itself_is_asked_without_context_for_what_memory_says(tmp_path):
    unknown = Example("2", "Bo is 7.", "How old is Bo?", ("7", "seven"))
    write_examples(by_itself([PARIS, unknown]), tmp_path / "closed" / "test.jsonl")
    first, second = load_examples(str(tmp_path / "closed"), split="test")
    assert (first.context, first.question, first.answers, first.memory) == ("", "Where is it?", ("Paris", "Paname"), ())
    assert (second.context, second.answers) == ("", ("7", "seven"))


def test_examples_that_are_written_are_read_as_they_were(tmp_path):
    write_examples([PARIS], tmp_path / "test.jsonl")
    [read] = load_examples(str(tmp_path / "test.jsonl"), split="test")
    assert (read.id, read.context, read.answers, read.memory) == ("1", PARIS.context, ("Lyon",), ("Paris", "Paname"))


def test_variants_stand_beside_the_base_model_with_paired_differences(tmp_path):
    scores = {"base": [0.0, 0.0, 1.0, 0.0], "tuned": [0.0, 0.0, 1.0, 1.0], "CEFT": [1.0, 0.0, 1.0, 1.0]}
    for variant, task in product(scores, ("facts", "facts-closed")):
        order = slice(None, None, -1 if variant == "CEFT" else 1)  # pairs go by id
        answers = pd.DataFrame({"id": list("abcd"), "contains": scores[variant]})[order]
        rows = [("contains", 4, sum(scores[variant]) / 4, 0.125, 0.875), ("memory_ratio", 0, None, None, None)]
        summary = pd.DataFrame(rows, columns=["metric", "n", "mean", "low", "high"])
        for name, table in {"answers": answers, "summary": summary}.items():
            write_table(table, tmp_path / variant / task / f"{name}.parquet", provenance(model=variant))
    told = of_variants(variants_table(tmp_path, ("base", "tuned", "CEFT"), ["data/facts"])).splitlines()

    def above(after: str, before: str) -> str:
        by = compare(np.array(scores[after]), np.array(scores[before]), bounds=(-1, 1)).difference
        return f"|  | above {before} | {by.mean:+.3f} [{by.low:+.3f}, {by.high:+.3f}] |"

    assert told == [
        "| questions | variant | contains |",
        "|---|---|---|",
        "| facts (4) | base | 0.250 [0.125, 0.875] |",
        "| facts (4) | tuned | 0.500 [0.125, 0.875] |",
        above("tuned", "base"),
        "| facts (4) | CEFT | 0.750 [0.125, 0.875] |",
        above("CEFT", "base"),
        above("CEFT", "tuned"),
        *(line.replace("facts (4)", "facts-closed (4)") for line in told[2:8]),
    ]


def test_masks_are_told_by_every_score_beside_random_sets_of_which_the_mean_alone_is():
    of = {"task": "a/facts", "n": 4, "below_random": None, "below_random_low": None, "below_random_high": None}
    below = {"below_random": 0.25, "below_random_low": -0.1, "below_random_high": 0.6}
    em = of | {"intervention": "ce:2", "family": "ce", "em": 0.5} | below
    drawn = [of | {"intervention": "random:2#0", "family": "random", "em": 0.7}]
    drawn.append(of | {"intervention": "random:2", "family": "random mean", "em": 0.75})
    scored = of | below | {"intervention": "ce:2", "metric": "contains", "mean": 0.125}
    head, _, *rows = of_masked(pd.DataFrame([em, *drawn]), pd.DataFrame([scored])).splitlines()
    assert head == "| questions | experts | em | below random | contains | below random |"
    assert rows == [
        "| facts (4) | ce:2 | 0.500 | +0.250 [-0.100, +0.600] | 0.125 | +0.250 [-0.100, +0.600] |",
        "| facts (4) | random:2 | 0.750 | – | – | – |",
    ]


def test_gains_are_of_as_many_questions_as_answers_are():
    lines = steps([], ["a"], Sizes(train=2, questions=5), Path("out"), Path("analyses"))
    figures = [line for line in lines if "figure" in line[0]]
    assert [line[line.index("--limit") + 1] for line in figures] == ["5", "5"]


@pytest.mark.parametrize("names", [["swap", "swap"], ["a/q", "b/q"], ["q@authors:a", "q:b"], [__file__, "swap"]])
def test_data_sets_that_would_share_a_folder_or_have_no_splits_are_refused(names, tmp_path):
    with pytest.raises(MoELensError, match="data sets with splits whose names"):
        write_questions(names, "organism", Sizes(), tmp_path)


def test_fewer_questions_than_asked_for_are_told(tmp_path, capsys):
    few = Sizes(train=2, dev=2, questions=100_000, max_length=60)
    assert write_questions(["novel"], "organism", few, tmp_path) == [str(tmp_path / "novel")]
    assert "where 100000 are asked for" in capsys.readouterr().err


@pytest.mark.parametrize("rates", [{"router_rates": "0"}, {"expert_rates": "1e-3,nan"}, {"expert_rates": "x"}])
def test_rates_are_checked_before_anything_runs(rates):
    with pytest.raises(MoELensError, match=r"-rates must be"):
        Sizes(**rates)


def test_ctrl_c_in_a_step_is_no_bad_input(tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text("raise SystemExit(130)")
    with pytest.raises(SystemExit) as ended:
        run_step([str(script)])
    assert ended.value.code == console.OF_CTRL_C


def test_an_interrupted_step_leaves_no_process_behind(tmp_path):
    told, script = tmp_path / "pid", tmp_path / "long.py"
    script.write_text(f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def interrupt() -> None:
        while not (told.exists() and told.read_text()):
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        _beside([str(script)])
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_a_step_that_fails_stops_the_study_and_is_named(capsys):
    with pytest.raises(MoELensError, match=r"python -m moe_lens\.measure --model nowhere .* mend that"):
        run_step(["moe_lens.measure", "--model", "nowhere", "--data", "swap", "--out", "/dev/null/no"])
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_may_be_shared_by_processes(tmp_path, capfd):
    line = ["moe_lens.measure", *"--model organism --data swap --limit 3 --what usage --out".split()]
    for processes in (1, 2):
        run_step([*line, str(tmp_path / str(processes))], processes=processes)
    one, two = (read_table(tmp_path / n / "usage.parquet") for n in "12")
    assert two.equals(one)
    assert read_provenance(tmp_path / "1" / "usage.parquet")["command"][0] == "measure", "as where it is run by itself"
    assert "--nproc-per-node=2 -m moe_lens.measure" in capfd.readouterr().out
    with pytest.raises(MoELensError, match=r"a step ended with code 1: python -m torch\.distributed\.run "):
        run_step([*line, "/dev/null/no"], processes=2)


@pytest.mark.slow
@pytest.mark.long
def test_the_study_runs_from_end_to_end_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "find_spec", lambda name: None)  # no browser
    sizes = {"train": 8, "dev": 4, "questions": 4, "masked": 4, "dosed": 4, "scored": 4, "random_sets": 2}
    few = Sizes(**sizes, router_rates="1e-2", expert_rates="1e-3")
    STUDY(out=tmp_path / "run", model="organism", data="swap,novel", sizes=few)
    printed, kept = capsys.readouterr().out, _kept(tmp_path / "run")
    assert "| swap-closed (4) | router-tuned | " in printed
    rows = read_table(tmp_path / "run" / "page" / "masks" / "masking.parquet")
    assert set(rows["task"]) == {str(tmp_path / "run" / "questions" / name) for name in ("swap", "novel-closed")}
    doses = read_table(tmp_path / "run" / "page" / "doses" / "doses.parquet")
    assert {1.0, 2.0, 4.0} <= set(doses["strength"])
    page = (tmp_path / "run" / "page" / "report.html").read_text(encoding="utf-8")
    assert all(
        f"{name}.parquet" in page for name in ("masks/selectivity", "figure8/probability_gain", "vectors/clustering")
    )

    stopped = tmp_path / "run" / "page" / "masks" / "masking.parquet"
    stopped.unlink()  # as if stopped before it was written
    STUDY(out=tmp_path / "run", model="organism", data="swap,novel", sizes=few)
    assert read_table(stopped).equals(rows)
    assert _kept(tmp_path / "run") == kept, "what was trained is as it was, and nothing is answered again"


def _kept(folder: Path) -> dict[Path, object]:
    """When each part of the answers was written, and what was trained."""
    parts = {file: file.stat().st_mtime_ns for file in folder.rglob("parts/*.parquet")}
    return parts | {file: file.read_bytes() for file in folder.rglob("delta.safetensors")}
