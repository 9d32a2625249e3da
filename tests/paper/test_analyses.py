"""The measurements of the organism and the analysis on them, run small from end to end."""

import importlib
import json
import runpy
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
import torch

from moe_lens import Example, MoELensError
from moe_lens.paper.lone_experts import alone, case_of
from moe_lens.paper.wrong_answers import with_wrong_answers
from moe_lens.results import provenance, read_table, write_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def training_cost(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "analyses" / "benchmarks")
    return importlib.import_module("training_cost")


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_measuring_the_organism_goes_on_where_it_stopped_and_keeps_other_runs(tmp_path):
    measure = "-m moe_lens.organism.measure --model organism:planted --seeds 0,1 --limit 16 --out tuned"
    printed = run(*measure.split(), folder=tmp_path)
    assert "router-tuned" in printed
    tasks = read_table(tmp_path / "tuned" / "tasks.parquet")
    assert set(tasks["task"]) == {"swap", "novel", "consistent", "hops", "closed_book", "summary"}
    assert len(tasks) == 6 * 3  # the base model once, two seeds of tuning
    assert tasks["seed"].isna().sum() == 6

    def times() -> dict[str, int]:
        return {part: (tmp_path / "tuned" / part / "measured.parquet").stat().st_mtime_ns for part in parts}

    parts = ("base", "router-0", "router-1")
    whole, before = (tmp_path / "tuned" / "tasks.parquet").read_bytes(), times()
    (tmp_path / "tuned" / "tasks.parquet").unlink()
    (tmp_path / "tuned" / "router-1" / "measured.parquet").unlink()  # as if stopped in the second seed
    run(*measure.split(), folder=tmp_path)
    assert (tmp_path / "tuned" / "tasks.parquet").read_bytes() == whole
    assert [part for part in parts if times()[part] != before[part]] == ["router-1"]
    other = measure.replace("--seeds 0,1 --limit 16", "--seeds 0 --limit 8")
    kept = times()
    with pytest.raises(AssertionError, match="holds the results of another run"):
        run(*other.split(), folder=tmp_path)
    assert times() == kept, "another run's results are never overwritten"
    assert (tmp_path / "tuned" / "tasks.parquet").read_bytes() == whole


def test_readme_tables_have_a_row_per_method_with_its_range_over_seeds(tmp_path, capsys):
    rows = [("base", "swap", 0, 0.0, 1.0, None, None)]
    rows += [("CEFT", "swap", seed, em, 0.125, 0.01, 393_216) for seed, em in enumerate((0.5, 0.75, 1.0))]
    rows += [("CEFT", "closed_book", seed, 0.25, None, 0.01, 393_216) for seed in range(3)]
    table = pd.DataFrame(rows, columns=["variant", "task", "seed", "em", "memory", "learning_rate", "trainable"])
    paths = [tmp_path / name / "tasks.parquet" for name in ("one", "two")]
    for path in paths:
        write_table(table.assign(seconds=table["trainable"] / 1e4), path, provenance(model=path.parent.name))
    runpy.run_path(str(ROOT / "analyses" / "readme_tables.py"))["main"](methods=paths)
    lines = capsys.readouterr().out.splitlines()
    head = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    ceft = dict(zip(head, (cell.strip() for cell in lines[3].split("|")[1:-1]), strict=True))
    of_one = {"`one` swap": "0.75 (0.50 to 1.00)", "`one` closed_book": "0.25", "`one` swap from memory": "0.12"}
    assert ceft == {"variant": "CEFT", **of_one, **{name.replace("one", "two"): cell for name, cell in of_one.items()}}
    base = dict(zip(head, (cell.strip() for cell in lines[2].split("|")[1:-1]), strict=True))
    assert (base["`two` swap"], base["`two` closed_book"]) == ("0.00", "–")
    assert "| CEFT | 0.01 | 393,216 | 39 |" in lines


def test_means_of_five_seeds_have_students_interval_and_of_fewer_only_what_was_seen():
    over_seeds = runpy.run_path(str(ROOT / "analyses" / "readme_tables.py"))["over_seeds"]
    assert over_seeds(pd.Series([0.1, 0.2, 0.3])) == "0.20 (0.10 to 0.30)"
    assert over_seeds(pd.Series([0.1, 0.2, 0.3, 0.4, 0.5])) == "0.30 [0.10, 0.50]"  # 2.776 * 0.1581 / sqrt(5) = 0.196
    assert over_seeds(pd.Series([0.2] * 5)) == "0.20"
    nearly_all = pd.Series([1.0, 1.0, 1.0, 1.0, 0.5])
    assert over_seeds(nearly_all) == "0.90 [0.62, 1.18]"
    assert over_seeds(nearly_all, bounds=(0, 1)) == "0.90 [0.62, 1.00]"


@pytest.fixture
def coverage(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "analyses" / "benchmarks")
    return importlib.import_module("coverage")


def test_shares_and_paired_shares_are_covered_at_least_as_often_as_their_intervals_say(coverage):
    """Computed, not drawn; the percentile bootstrap covers p = 0.02 of 50 in 0.64 of cases."""
    table = pd.DataFrame(coverage.exact_rows(sizes=(5, 50), paired_sizes=(10,)))
    assert table["coverage"].min() >= 0.95
    assert set(table["interval"]) == {"share", "paired share"}


def test_drawn_intervals_cover_about_as_often_as_they_say(coverage):
    """Each of a few data sets only: what is clearly too narrow shows, and is named."""
    drawn = [case for case in coverage.cases() if case.n <= 20]
    table = pd.DataFrame(coverage.drawn_rows(drawn, runs=40))
    unbounded = table["interval"] == "the same, bounds not told"
    assert table.loc[unbounded, "coverage"].max() < 0.9, "then the bounds would buy nothing"
    table = table[~unbounded]
    assert (table["coverage"] >= 0.85).all(), table[table["coverage"] < 0.85].to_string()
    assert table["coverage"].mean() > 0.95
    assert {"score", "unbounded", "share of tokens", "gain", "seeds and examples", "seeds"} <= set(table["interval"])


def test_readme_tables_print_what_training_costs(tmp_path, capsys):
    table = pd.DataFrame(
        {"method": ["ceft"], "chosen": [8], "peak_gb": [1.2345], "seconds / fft": ["0.63 (0.56 to 0.70)"]}
    )
    write_table(table, tmp_path / "summary.parquet", provenance(model="mid"))
    runpy.run_path(str(ROOT / "analyses" / "readme_tables.py"))["main"](costs=[tmp_path / "summary.parquet"])
    assert capsys.readouterr().out.splitlines() == [
        "| method | chosen | peak gb | seconds / fft |",
        "|---|---|---|---|",
        "| ceft | 8 | 1.23 | 0.63 (0.56 to 0.70) |",
        "",
    ]


def test_readme_tables_say_when_no_table_is_given():
    with pytest.raises(MoELensError, match="--methods"):
        runpy.run_path(str(ROOT / "analyses" / "readme_tables.py"))["main"]()


def test_figure_4_draws_its_examples_from_the_whole_split():
    """SQuAD's first examples are of few articles."""
    measured = []
    examples = [Example(str(place), "", "?", ("a",)) for place in range(1000)]
    found = SimpleNamespace(table=pd.DataFrame)
    lens = SimpleNamespace(measure=lambda given, *_, **__: measured.extend(given) or [found])
    study = SimpleNamespace(examples=lambda task: examples, open=lambda router: lens, batch_size=8)
    vectors = runpy.run_path(str(ROOT / "analyses" / "figure4_routing_vectors.py"))["vectors"]
    vectors.__globals__["PER_TASK"] = 100
    vectors(study, {"squad": None}, None)
    places = [int(example.id) for example in measured]
    assert len(set(places)) == 100
    assert sum(place < 500 for place in places) in range(35, 66)


def test_figure_7_says_that_tuning_cured_nothing():
    answers = pd.DataFrame({"em": [0.0, 1.0], "prediction": ["a", "b"]})
    study = SimpleNamespace(tasks=["swap"], router=lambda task: None, answers=lambda *_: answers)
    compute = runpy.run_path(str(ROOT / "analyses" / "figure7_attention_case.py"))["compute"]
    with pytest.raises(MoELensError, match="none of 2 answers on swap right"):
        compute(study)


def test_the_memory_benchmark_refuses_ways_that_disagree(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "analyses" / "benchmarks")
    main = runpy.run_path(str(ROOT / "analyses" / "benchmarks" / "attention_memory.py"))["main"]
    masses = iter([0.5, None, 0.6])

    def run(*_, **__):
        return SimpleNamespace(stdout=json.dumps({"mib": 1, "seconds": 1, "mass": next(masses)}))

    main.__globals__["subprocess"] = SimpleNamespace(run=run)
    with pytest.raises(MoELensError, match="same attention mass"):
        main(out=tmp_path, repeats=1)
    assert not list(tmp_path.iterdir())


def test_the_cost_benchmark_compares_steps_of_the_same_turn_and_memory_with_full_fine_tuning(training_cost):
    turns = [("fft", 64, 4.0, 4.0, 8e9), ("fft", 64, 9.0, 9.0, 8e9)]
    turns += [("ceft", 64, 3.0, 4.0, 4e9), ("ceft", 64, 2.0, 8.0, 4e9), ("ceft", 64, 6.0, 10.0, 4e9)]
    turns += [("ceft", 128, 6.0, 4.0, 2e9)]
    rows = [
        {"method": method, "n_experts": n_experts, "chosen": 8, "trained": 5e5, "peak": peak, "beside_weights": 1e9}
        | {"seconds": seconds, "fft seconds": compared}
        for method, n_experts, seconds, compared, peak in turns
    ]
    table = training_cost.summary(pd.DataFrame(rows)).set_index(["method", "n_experts"])
    assert list(table.index) == [("fft", 64), ("ceft", 64), ("ceft", 128)]
    assert table["seconds"].tolist() == [4, 2, 6]
    assert table["seconds / fft"].tolist() == ["1.00 (1.00 to 1.00)", "0.60 (0.42 to 0.68)", "1.50 (1.50 to 1.50)"]
    assert table["peak / fft"].tolist() == [1, 0.5, 0.25]
    assert table["beside_weights_gb"].tolist() == [1, 1, 1]
    assert table["trained_millions"].tolist() == [0.5] * 3
    assert "seconds / stock" not in table  # which took no steps


def test_the_cost_benchmark_has_each_case_and_its_baselines_step_in_turns(training_cost, monkeypatch):
    steps = []

    @contextmanager
    def process(case, setting, purpose):
        def step():
            steps.append(case.method)
            return {"seconds": 100 * len(steps) + len(case.method)}

        yield step

    monkeypatch.setattr(training_cost, "_process", process)
    ceft, setting = training_cost.Case("ceft"), None
    turns = training_cost.turns_of(ceft, ["stock"], setting, 2)
    assert steps == ["stock", "ceft", "ceft", "stock"] * 2  # of which the first two turns warm up
    assert [{**turn} for turn in turns] == [
        {"turn": 0, "stock seconds": 505, "seconds": 604},
        {"turn": 1, "stock seconds": 805, "seconds": 704},
    ]
    steps.clear()
    stock = training_cost.turns_of(training_cost.Case("stock"), ["stock"], setting, 1)
    assert stock == [{"turn": 0, "stock seconds": 305, "seconds": 305}]


def test_the_cost_benchmark_says_which_process_died_and_what_to_name(training_cost, tmp_path):
    setting = training_cost.Setting("small", "cpu", None, threads=0)  # which torch refuses
    says = pytest.raises(MoELensError, match=r"method='ceft'.* ended with code 1; if memory ran out")
    with training_cost._process(training_cost.Case("ceft"), setting, "time") as step, says:
        step()
    with pytest.raises(MoELensError, match=r"--methods takes fft,stock,.*; got tune"):
        training_cost.main(out=tmp_path, methods="fft,tune")


def test_every_analysis_is_short_and_says_how_it_is_run():
    scripts = sorted((ROOT / "analyses").glob("*.py"))
    assert scripts
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 80, script.name
        assert f"python analyses/{script.name}" in text


def test_a_larger_share_of_wrong_answers_holds_the_smaller_and_none_of_them_is_right():
    examples = [Example(str(i), "c", "q", (f"a{i % 7}", f"b{i}")) for i in range(50)]
    assert with_wrong_answers(examples, 0.0, seed=1) == examples
    few, many = (with_wrong_answers(examples, share, seed=1) for share in (0.2, 0.4))
    changed = [{i for i in range(50) if made[i] != examples[i]} for made in (few, many)]
    assert (len(changed[0]), len(changed[1])) == (10, 20)
    assert changed[0] < changed[1]
    assert all(many[i].answers[0] not in examples[i].answers for i in changed[1])
    assert [many[i].answers for i in changed[0]] == [few[i].answers for i in changed[0]]
    assert with_wrong_answers(examples, 0.2, seed=2) != few
    with pytest.raises(MoELensError, match="all training examples have one answer"):
        with_wrong_answers([Example(str(i), "c", "q", ("same",)) for i in range(3)], 0.4, seed=0)


def test_an_expert_alone_has_the_weights_that_all_had_together(olmoe):
    texts = ["The capital of Arland is Belmor.", "The cat"]
    plain = list(olmoe.records(texts, batch_size=1, progress=False))
    with olmoe.intervene(*alone(1, 5)):
        changed = list(olmoe.records(texts, batch_size=1, progress=False))
    for before, after in zip(plain, changed, strict=True):
        weights, indices = after.routing[1].weights, after.routing[1].indices
        used = weights.abs() > 1e-7
        assert (used.sum(-1) == 1).all()
        assert (indices[used] == 5).all()
        torch.testing.assert_close(weights.sum(-1), before.routing[1].weights.sum(-1))
        assert after.routing[0].indices.equal(before.routing[0].indices)


def test_the_case_of_figure_1_is_the_first_question_and_layer_with_either_answer():
    rows = [("a", 0, "context"), ("a", 1, "memory"), ("b", 0, "other"), ("b", 2, "context"), ("b", 2, "memory")]
    table = pd.DataFrame(rows, columns=["id", "layer", "says"])
    assert case_of(table, ["a", "b"]) == ("b", 2)
    with pytest.raises(MoELensError, match="of 1 questions none has a layer"):
        case_of(table, ["a"])
