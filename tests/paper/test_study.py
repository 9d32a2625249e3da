"""The scripts of the paper's figures share tuned routers and answers in one run, resume, and draw without a model."""

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from moe_lens import ExpertSet, ExpertUsage, MoELens
from moe_lens.causal.evaluation import answer_table
from moe_lens.choosing import Given, planted_experts
from moe_lens.choosing.selection import parse_one
from moe_lens.commands.options import BaseOpening, Reading
from moe_lens.data import TEMPLATES, encode, load_examples
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import read_facts
from moe_lens.paper.recipes import FFT, ROUTER, Recipe, read_cost, router_of
from moe_lens.paper.recipes import experts as training
from moe_lens.paper.script import RATES, run
from moe_lens.paper.study import Study
from moe_lens.results import read_provenance, read_table, write_table
from moe_lens.tuning import Schedule, TuneRouters, tune

ANALYSES, SUPPORT = Path(__file__).parents[2] / "analyses", Path(__file__).parents[1] / "support"


def script(name: str, *options: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ANALYSES / name), *"--out run --limit 8 --epochs 1".split(), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def study(
    folder: Path,
    *tasks: str,
    model: str = "organism",
    template: str | None = None,
    reading: Reading = Reading(),
    rates: tuple[float, ...] = (2e-2,),
    more: tuple[int, ...] = (),
) -> Study:
    opening = BaseOpening(model, template=template)
    by_kind = dict.fromkeys(RATES, rates)
    return Study(opening, reading, tasks, folder, 8, None, Schedule(epochs=1), by_kind, more, 8, 8)


@pytest.fixture(scope="module")
def organism() -> MoELens:
    return MoELens.from_pretrained("organism")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv.gz", "MINE.JSON"])
def test_a_single_file_has_no_splits_to_tune_and_test_on(name, tmp_path):
    with pytest.raises(MoELensError, match="no splits"):
        study(tmp_path, name)


def test_a_table_is_kept_while_all_examples_that_it_was_made_from_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(split: str, answer: str) -> None:
        row = {"context": f"It is {answer}.", "question": "Which?", "answer": answer}
        (tmp_path / "mine" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")

    (tmp_path / "mine").mkdir()
    for split in ("train", "dev", "test"):
        write(split, "red")
    table, task = tmp_path / "table.parquet", str(tmp_path / "mine")
    first = study(tmp_path, task, "swap")
    assert not first.has(table, {"item": "table"})
    for split in ("dev", "test"):
        assert [example.answers for example in first.examples(task, split)] == [("red",)]
    write_table(pd.DataFrame({"em": [1.0]}), table, first.made_by({"item": "table"}))
    write("train", "blue")  # which the table has nothing of
    assert study(tmp_path, task, "swap").has(table, {"item": "table"})
    with pytest.raises(MoELensError, match="its item is table, here it is other"):
        study(tmp_path, task, "swap").has(table, {"item": "other"})
    for split in ("dev", "test"):
        write(split, "blue")
        with pytest.raises(MoELensError, match=rf"its data.*\.{split}\.sha256 is"):
            study(tmp_path, task, "swap").has(table, {"item": "table"})
        write(split, "red")
        assert study(tmp_path, task, "swap").has(table, {"item": "table"})
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(MoELensError, match="another run"):  # another task's data are not asked for
        study(tmp_path, "swap").has(table, {"item": "table"})


def test_a_script_whose_task_was_edited_does_not_overwrite_what_it_computed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--data", "mine", "--out", "run"])
    Path("mine").mkdir()
    computed = []

    def compute(here: Study) -> pd.DataFrame:
        computed.append([example.answers for example in here.examples("mine")])
        return pd.DataFrame({"step": [1], "loss": [0.5], "learning_rate": [0.01]})

    for answer, code in (("red", "0"), ("red", "0"), ("blue", "2")):
        Path("mine/test.csv").write_text(f"context,question,answer\nIt is {answer}.,Which?,{answer}\n")
        with pytest.raises(SystemExit, match=code):
            run(compute, item="figure0", table="tuning", tasks="swap", about="A figure.")
    assert computed == [[("red",)]]


def test_tasks_with_the_same_last_name_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_lens.paper.study.keep_trained", lambda *_, **__: None)
    tasks = ["swap", "squad:a/swap", *(str(tmp_path / folder / "swap") for folder in "ab")]
    row = {"context": "It is red.", "question": "Which?", "answer": "red"}
    for folder in "ab":
        (tmp_path / folder / "swap").mkdir(parents=True)
        for split in ("train", "dev", "test"):
            (tmp_path / folder / "swap" / f"{split}.json").write_text(json.dumps([row]))
    monkeypatch.chdir(tmp_path)
    here = study(tmp_path / "run", *tasks)
    assert len({here.router(task) for task in tasks}) == len(tasks)
    assert here.router("swap").name == "swap-router-0"
    for task in tasks[-2:]:
        here.answers(task)
    assert len(list((tmp_path / "run" / "answers").iterdir())) == 2


def test_another_template_is_answered_anew(tmp_path):
    for template in TEMPLATES:
        here = study(tmp_path / template, "swap", template=template)
        lens = MoELens.from_pretrained("organism", template=template)
        expected = answer_table(lens, here.examples("swap"), max_new_tokens=8, progress=False)
        assert here.answers("swap")["prediction"].tolist() == expected["prediction"].tolist()
        [part] = (tmp_path / template / "answers").iterdir()
        assert read_provenance(part)["template"] == lens.template.facts()


def test_examples_are_read_as_the_options_say(tmp_path, organism):
    lengths = [
        len(encode(example, organism.tokenizer).input_ids) for example in study(tmp_path, "swap").examples("swap")
    ]
    short = sorted(lengths)[3]
    assert short < max(lengths)
    found = study(tmp_path, "swap", reading=Reading(max_length=short)).examples("swap")
    assert [len(encode(example, organism.tokenizer).input_ids) for example in found] == [
        length for length in lengths if length <= short
    ]


def experts(name: str, text: str) -> Recipe:
    """The recipe that trains these experts, written as in --experts."""
    return training(name, parse_one(text))


@pytest.mark.parametrize("wrong", [
    *({"kind": kind} for kind in ("routers", "experts")),
    {"kind": "all", "experts": parse_one("ce:4")}, {"kind": "all", "layers": (0,)},
])  # fmt: skip
def test_a_recipe_says_what_learns_once(wrong):
    with pytest.raises(MoELensError, match="recipe"):
        Recipe("mine", **wrong)


def test_recipes_have_folders_of_their_own():
    recipes = [ROUTER, FFT, router_of([0]), router_of([0, 1]), experts("CEFT", "ce:4"), experts("CEFT", "ce:1")]
    recipes += [experts("CEFT", "ce-last:4"), experts("ESFT", "esft-token:p=0.2"), experts("planted", "planted")]
    recipes += [replace(FFT, rate=1e-3), replace(FFT, rate=1e-4)]
    assert len({recipe.folder for recipe in recipes}) == len(recipes)
    assert [recipe.needs_router for recipe in recipes] == [False] * 4 + [True] * 3 + [False] * 4


def test_recipes_train_what_they_name(organism):
    """The counts follow from the organism's shape: 4 layers, 16 experts of 3 matrices 64 x 128, routers of 16 x 128."""
    expected = {
        ROUTER: 4 * 16 * 128,
        router_of([0, 1]): 2 * 16 * 128,
        experts("random", "random:4"): 4 * 4 * 3 * 64 * 128,
        experts("ESFT", "esft-token:16"): 4 * 16 * 3 * 64 * 128,
        experts("listed", "1:3,5;2:0"): 3 * 3 * 64 * 128,
        FFT: 2_009_216,
    }
    examples = load_examples("swap", split="train", limit=4)
    for recipe, count in expected.items():
        method = recipe.method(organism, examples, model="organism", seed=0, router=None)
        with method.attached(organism) as trained:
            assert trained.count == count, recipe


def test_planted_and_random_experts(organism):
    planted = experts("planted", "planted").method(organism, [], model="organism:planted", seed=0, router=None)
    assert planted.experts == planted_experts("organism:planted")
    drawn = [
        experts("random", "random:4").method(organism, [], model="organism", seed=seed, router=None).experts
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_the_rate_is_the_best_on_dev_with_the_first_seed_and_kept_for_the_others(tmp_path):
    rates = (1e-4, 0.3, 3e-2)
    here = study(tmp_path, "swap", rates=rates, more=(5,))
    train, dev = here.examples("swap", "train"), here.examples("swap", "dev")
    by_hand = {}
    for rate in sorted(rates):
        lens = here.open()
        tune(lens, train, [], TuneRouters(), Schedule(learning_rate=rate, epochs=1))
        by_hand[rate] = answer_table(lens, dev, max_new_tokens=8)["em"].mean()
    assert len(set(by_hand.values())) > 1  # else there is nothing to choose
    folder = here.trained("swap", ROUTER)
    tried = read_table(folder / "learning_rates.parquet")
    assert dict(zip(tried["learning_rate"], tried["dev_em"], strict=True)) == pytest.approx(by_hand)
    best = max(sorted(rates), key=by_hand.__getitem__)
    assert read_cost(folder).learning_rate == best
    for recipe, seed in ((ROUTER, 5), (router_of([1]), 0)):
        other = here.trained("swap", recipe, seed)
        assert read_facts(other)["rates"] == [best]
        assert read_facts(other)["seed"] == seed
    assert here.trained("swap", replace(ROUTER, rate=best)) == folder  # what was chosen is not trained twice
    worst = min(rates, key=by_hand.__getitem__)
    other = here.trained("swap", replace(ROUTER, rate=worst))
    assert read_cost(other).learning_rate == worst
    assert answer_table(here.open(other), dev, max_new_tokens=8)["em"].mean() == by_hand[worst]


@pytest.mark.slow
def test_context_faithful_experts_are_those_of_the_seeds_own_routers(tmp_path):
    here = study(tmp_path, "swap", rates=(0.1,), more=(1,))
    for seed in here.seeds:
        folder = here.trained("swap", experts("CEFT", "ce:2"), seed)
        router = here.trained("swap", ROUTER, seed)
        [usage] = here.open(router).measure(here.examples("swap", "train"), ExpertUsage())
        chosen = ExpertSet.top(usage.table(), 2)
        rows = read_facts(folder)["rows"]
        assert {tuple(ids) for name, ids in rows.items() if ".layers.1." in name} == {chosen[1]}


@pytest.mark.slow
def test_experts_that_came_to_be_others_under_one_name_are_refused(tmp_path):
    here, chosen = study(tmp_path, "swap"), ExpertSet.of({1: [3, 5]})
    folder = here.trained("swap", training("listed", Given(chosen, called="mine")))
    rows = read_facts(folder)["rows"]
    assert {tuple(ids) for name, ids in rows.items() if ".layers.1." in name} == {chosen[1]}
    with pytest.raises(MoELensError, match="results of another run: its chosen is mine=1:3,5, here it is mine=1:7"):
        here.trained("swap", training("listed", Given(ExpertSet.of({1: [7]}), called="mine")))
    assert read_facts(folder)["rows"] == rows


@pytest.mark.slow
def test_a_router_is_tuned_once_and_one_of_other_weights_is_refused(tmp_path):
    first = study(tmp_path, "swap")
    router = first.router("swap")
    written = (router / "delta.safetensors").stat().st_mtime_ns
    assert not (router / "training").exists()
    assert study(tmp_path, "swap").router("swap") == router
    assert (router / "delta.safetensors").stat().st_mtime_ns == written
    planted = study(tmp_path, "swap", model="organism:planted")
    with pytest.raises(MoELensError, match="its model is organism, here it is organism:planted"):
        planted.router("swap")
    assert (router / "delta.safetensors").stat().st_mtime_ns == written


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


METHODS = "table3_methods.py --model organism:planted --data swap,closed_book --seeds 0,1 --learning-rate 3e-3".split()


@pytest.fixture(scope="module")
def methods(tmp_path_factory) -> Path:
    """The run of the methods' table, killed at its third training and given again."""
    folder = tmp_path_factory.mktemp("methods")
    command = [sys.executable, str(ANALYSES / METHODS[0]), *"--out run --limit 8 --epochs 1".split(), *METHODS[1:]]
    running = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("run/trained/*/delta.json"))) < 3 and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (folder / "run" / "table3" / "tasks.parquet").exists()
    kept = files(folder / "run" / "trained")
    done = script(*METHODS, folder=folder)
    assert done.returncode == 0, done.stderr
    after = files(folder / "run" / "trained")
    finished = [name.rpartition("/")[0] for name in kept if name.endswith("delta.json")]
    assert len(finished) >= 3
    assert all(after[name] == kept[name] for name in kept if name.rpartition("/")[0] in finished)
    return folder / "run"


@pytest.mark.slow
def test_methods_are_compared_in_one_table(methods):
    rows = read_table(methods / "table3" / "tasks.parquet")
    assert len(rows) == 2 + 8 * 2 * 2  # the base model; eight methods, two seeds, two tasks
    chosen = ["CEFT", "CEFT, ce-last", "ESFT-token", "ESFT-gate", "random experts", "planted experts"]
    expected = {"router-tuned": 8192, **dict.fromkeys(chosen, 393_216), "FFT": 2_009_216}
    for variant, part in rows[rows["variant"] != "base"].groupby("variant"):
        assert set(part["trainable"]) == {expected.pop(variant)}
    assert not expected
    told = read_provenance(methods / "table3" / "tasks.parquet")
    assert told["seeds"] == [0, 1]
    assert "dev with seed 0" in told["rate_chosen"]


@pytest.mark.slow
def test_methods_are_compared_with_ceft_by_example(methods):
    compared = read_table(methods / "table3" / "comparisons.parquet").set_index(["variant", "task"])
    assert len(compared) == 8 * 2

    def em(variant: str) -> np.ndarray:
        parts = sorted((methods / "answers").glob(f"swap-by-swap-{variant}-[01].parquet"))
        return pd.concat(read_table(part)["em"] for part in parts).to_numpy()

    row = compared.loc["FFT", "swap"]
    assert len(em("all")) == 2 * 8
    assert row["difference"] == pytest.approx(em("all").mean() - em("experts-ce-4").mean())
    assert row["low"] <= row["difference"] <= row["high"]
    assert (compared["p_holm"] >= compared["p"]).all()


@pytest.mark.slow
def test_a_finished_run_trains_nothing_again(methods):
    before = files(methods)
    done = script(*METHODS, folder=methods.parent)
    assert done.returncode == 0, done.stderr
    assert "step" not in done.stderr  # no training's progress bar
    after = files(methods)
    assert {name for name in after if after[name] != before.get(name)} <= {
        f"table3/table3.{end}" for end in ("html", "png", "svg")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "table", "n"), [
    pytest.param("figure11_layers.py", "figure11/layers.parquet", 1 + 2 * 4, marks=pytest.mark.long),
    ("table5_expert_count.py", "table5/sizes.parquet", 2 + 2 * (5 + 4)),
])  # fmt: skip
def test_sweeps_share_what_the_methods_table_trained(methods, name, table, n):
    trained = files(methods / "trained")
    done = script(name, *METHODS[1:3], *METHODS[-2:], folder=methods.parent)
    assert done.returncode == 0, done.stderr
    assert len(read_table(methods / table)) == n
    after = files(methods / "trained")
    assert all(after[file] == content for file, content in trained.items())
    assert len(after) > len(trained)


def test_a_figure_of_one_training_refuses_several_seeds(monkeypatch, capsys):
    figure = ANALYSES / "figure5_transfer.py"
    monkeypatch.setattr(sys, "argv", [str(figure), "--seeds", "0,1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(figure), run_name="__main__")
    assert stopped.value.code == 2
    assert "give one seed" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_trainings_answers_and_what_is_measured_and_keep_what_one_keeps(tmp_path):
    few = "--limit 5 --learning-rate 1e-2 --batch-size 2 --out".split()
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for out, launch in {"one": [], "two": together}.items():
        for words in ([ANALYSES / "figure8_answer_probability.py", *few], [SUPPORT / "led_study.py"]):
            command = [sys.executable, *launch, *map(str, words), out]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stderr
    tables = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.parquet")}
    assert {path.parts[0] for path in tables} == {"attention", "probabilities", "figure8", "trained", "led"}
    for path in tables:
        one, two = (
            read_table(tmp_path / out / path).drop(columns="seconds", errors="ignore") for out in ("one", "two")
        )
        pd.testing.assert_frame_equal(two, one, rtol=1e-3, atol=1e-5)  # gains are relative to masses near 0
    for path in tmp_path.glob("one/**/delta.safetensors"):
        one, two = (load_file(tmp_path / out / path.relative_to(tmp_path / "one")) for out in ("one", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-3)
