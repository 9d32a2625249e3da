"""Strengthening as commands: a bias is trained, a strength chosen on held-out examples, answers decoded by contrast."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe_lens import ExpertSet, MoELens, evaluate, intervene, load_examples, tune
from moe_lens.causal.evaluation import answer_table
from moe_lens.choosing import planted_experts
from moe_lens.commands import console, dose_choosing
from moe_lens.commands.saved_interventions import read_saved
from moe_lens.data import TEMPLATES, demonstrations_named
from moe_lens.decoding import CAD, Cited, context_citations
from moe_lens.errors import MoELensError
from moe_lens.lens import AddVector, Bias, Zero, context_vectors, load_intervention
from moe_lens.report import build_report
from moe_lens.report.contents import draw
from moe_lens.results import read_provenance, read_table

DOSES = "--data swap --spare closed_book --limit 6 --dev-limit 8 --max-new-tokens 3 --positions from_question"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command on the organism with planted experts, in this process and a folder of its own; what it leaves there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "find_spec", lambda name: None)  # no browser, which takes seconds
    monkeypatch.setattr(dose_choosing, "FEWEST", 8)  # 96 take minutes

    def started(command: Any, options: str, *, out: str = "out", code: int | None = None) -> Path:
        line = f"--model organism:planted --out {out} {options}".split()
        monkeypatch.setattr(sys, "argv", ["command", *line])
        with pytest.raises(SystemExit) as ended:
            console.run(command.main)
        assert (ended.value.code or None) == code
        return tmp_path / out

    return started


def test_a_trained_bias_is_an_intervention_of_its_folder(run, capsys):
    options = "--method bias --data swap --limit 16 --batch-size 8 --epochs 1 --learning-rate 0.3 --max-new-tokens 3"
    out = run(tune, f"{options} --score log_likelihood --positions from_question --layers 1,2", out="bias")
    learnt = load_intervention(out)
    assert (learnt.layers, learnt.positions) == ((1, 2), "from_question")
    assert not list(out.glob("delta.*"))
    found = run(evaluate, "--data swap --limit 4 --max-new-tokens 3 --intervention bias --intervention bias:0,40")
    answers = read_table(found / "answers.parquet").set_index("intervention")["prediction"]
    assert list(answers.index.unique()) == ["none", "bias", "bias@0", "bias@40"]
    lens, examples = MoELens.from_pretrained("organism:planted"), load_examples("swap", limit=4)
    for name, factor in {"bias": 1, "bias@0": 0, "bias@40": 40}.items():
        with lens.intervene(learnt.scaled(factor)):
            by_hand = answer_table(lens, examples, max_new_tokens=3, progress=False)["prediction"]
        assert answers[name].tolist() == by_hand.tolist()
    assert answers["bias@0"].tolist() == answers["none"].tolist() != answers["bias@40"].tolist()
    for wrong, says in {
        "--method router --positions last": "--positions says where a bias acts",
        "--method bias --merge": "leave --merge, --shard out",
        "--method bias --lora-rank 2": "--lora-rank is for router, ceft and esft",
        "--method bias --experts 1:2": "are for ceft and esft; --method is bias",
    }.items():
        run(tune, f"--data swap {wrong}", out="other", code=2)
        assert says in capsys.readouterr().err


def test_a_dose_is_chosen_on_dev_and_only_it_is_answered_on_test(run, capsys):
    line = f"{DOSES} --experts planted --compare 1:2,3 --mode bias:0,5,40 --choose-dose --control random:1"
    out = run(intervene, line)
    table = read_table(out / "dose_choice.parquet")
    lens = MoELens.from_pretrained("organism:planted")
    dev = load_examples("closed_book", split="dev", limit=8)
    with lens.intervene(Bias(planted_experts("organism:planted"), 40.0, positions="from_question")):
        by_hand = answer_table(lens, dev, max_new_tokens=3, progress=False)["em"].mean()
    row = table.set_index(["intervention", "task"]).loc[("planted@bias=40", "closed_book")]
    assert (row["em"], row["n"]) == (by_hand, 8)
    chosen = table.loc[table["chosen"], "intervention"].unique().tolist()
    assert "planted@bias=5" in chosen
    answers = read_table(out / "answers.parquet")
    sets = [name for name in answers["intervention"].unique() if not name.startswith("random")]
    assert sets == ["none", *chosen]
    assert set(answers["id"]) <= {one.id for task in ("swap", "closed_book") for one in load_examples(task, limit=6)}
    assert any(name.startswith("random") and name.endswith("#0@bias=5") for name in answers["intervention"])
    told = read_provenance(out / "doses.parquet")
    assert (told["dose_chosen_on"]["swap"]["examples"], told["to_be_kept"]) == (8, 0.95)
    assert "is chosen: swap" in capsys.readouterr().out
    assert draw("dose_choice.parquet", table).data
    before = (out / "dose_choice.parquet").read_bytes()
    run(intervene, line)
    assert (out / "dose_choice.parquet").read_bytes() == before
    run(intervene, line.replace("--dev-limit 8", "--dev-limit 9"), code=2)
    assert "holds the results of another run: its dose_chosen_on" in capsys.readouterr().err


def test_where_no_dose_spares_the_model_as_it_is_is_answered_alone(run, capsys):
    out = run(intervene, f"{DOSES} --experts planted --mode bias:60 --choose-dose --control random:1")
    assert "planted: no strength keeps 0.95 of every spared task and raises the target" in capsys.readouterr().out
    assert read_table(out / "answers.parquet")["intervention"].unique().tolist() == ["none"]
    assert not read_table(out / "dose_choice.parquet")["chosen"].any()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--experts planted --mode bias:1 --dev-limit 7", "swap, dev: a strength is chosen on 8 examples or more"),
        ("--experts planted --mode bias:1 --dev-split test", "swap: 6 examples of test are also among those"),
        ("--experts planted --mode zero", "--choose-dose chooses among strengths"),
    ],
)
def test_a_choice_on_too_few_or_the_same_examples_or_without_strengths_is_refused(run, capsys, line, says):
    run(intervene, f"{DOSES} --choose-dose {line}", code=2)
    assert says in capsys.readouterr().err


def test_of_a_folder_of_saved_vectors_layer_and_strength_are_chosen_together(run, tmp_path):
    lens = MoELens.from_pretrained("organism:planted")
    for layer, vector in context_vectors(lens, load_examples("swap", split="train", limit=16)).items():
        if layer in (1, 2):
            AddVector(layer, vector, positions="from_question").save(tmp_path / f"vector/layer-{layer}")
    out = run(intervene, f"{DOSES} --intervention vector:0.5,1 --choose-dose --control none")
    table = read_table(out / "dose_choice.parquet")
    assert table["intervention"].nunique() == 4
    chosen = table.loc[table["chosen"], "intervention"].unique().tolist()
    assert len(chosen) <= 1
    assert read_table(out / "answers.parquet")["intervention"].unique().tolist() == ["none", *chosen]


def test_answers_of_both_commands_are_decoded_as_asked_and_say_so(run, capsys):
    line = "--data swap --limit 4 --max-new-tokens 3 --decoding cad:2"
    masked = run(intervene, f"{line} --experts 1:2,3 --control none", out="masked")
    found = run(evaluate, line)
    lens = MoELens.from_pretrained("organism:planted")
    examples = load_examples("swap", limit=4)
    expected = [text.strip() for text in CAD(2).generate(lens, examples, max_new_tokens=3, progress=False)]
    with lens.intervene(Zero(ExpertSet.of({1: [2, 3]}))):
        under = [text.strip() for text in CAD(2).generate(lens, examples, max_new_tokens=3, progress=False)]
    assert read_table(found / "answers.parquet")["prediction"].tolist() == expected
    assert read_table(masked / "answers.parquet")["prediction"].tolist() == [*expected, *under]
    assert read_provenance(found / "answers.parquet")["decoding"] == "cad:2"
    assert read_provenance(masked / "answers.parquet")["decoding"] == "cad:2"
    run(evaluate, line.replace("cad:2", "cad:3"), code=2)
    assert "its decoding is cad:2, here it is cad:3" in capsys.readouterr().err


def test_citations_are_written_beside_answers_that_say_how_they_came_about(run, capsys):
    line = "--data swap --limit 3 --max-new-tokens 3 --decoding cite:3 --citations --prompt base"
    out = run(evaluate, f"{line} --demonstrations counterfactual:1:swap")
    template = replace(TEMPLATES["base"], demonstrations=demonstrations_named("counterfactual:1:swap"))
    lens = MoELens.from_pretrained("organism:planted", template=template)
    examples = load_examples("swap", limit=3)
    expected = context_citations(lens, examples, max_new_tokens=3, progress=False).table
    pd.testing.assert_frame_equal(read_table(out / "citations.parquet"), expected, atol=1e-3)
    said = [text.strip() for text in Cited(3).generate(lens, examples, max_new_tokens=3, progress=False)]
    assert read_table(out / "answers.parquet")["prediction"].tolist() == said
    for name in ("answers", "citations"):
        told = read_provenance(out / f"{name}.parquet")
        assert (told["decoding"], told["template"]) == ("cite:3", template.facts())
        assert [count for count in told["answered_plainly"].values() if count] == [2]
    assert "cite:3: 2 of 3 examples are of 3 sentences, and are answered plainly" in capsys.readouterr().err
    assert "What each answer rests on" in build_report(out, title="Cited").read_text(encoding="utf-8")


def test_saved_interventions_are_named_by_folder_and_strength(tmp_path):
    bias = Bias(ExpertSet.of({1: [2]}), 3.0)
    bias.save(tmp_path / "mine")
    bias.save(tmp_path / "a:1")
    found = read_saved([f"{tmp_path}/mine:0.5,2", f"{tmp_path}/a:1"])
    assert {name: (one.intervention.alpha, one.strength) for name, one in found.items()} == {
        "mine@0.5": (1.5, 0.5), "mine@2": (6.0, 2.0), "a:1": (3.0, None),
    }  # fmt: skip
    Zero(ExpertSet.of({1: [2]})).save(tmp_path / "zero")
    for wrong, says in {
        "mine:1,1": "different finite strengths", "mine:x": "numbers separated by commas", "none": "saved intervention",
        "zero:2": "Zero has no strength that could be multiplied",
    }.items():  # fmt: skip
        with pytest.raises(MoELensError, match=says):
            read_saved([f"{tmp_path}/{wrong}"])
    for file in (tmp_path / "lost" / "one", tmp_path / "lost" / "two"):
        bias.save(file)
    (tmp_path / "lost" / "two" / "intervention.json").unlink()
    for wrong in ("lost", "x" * 300):
        with pytest.raises(MoELensError, match="expected a saved intervention"):
            read_saved([f"{tmp_path}/{wrong}"])
    with pytest.raises(MoELensError, match="names, which repeat: mine"):
        read_saved([f"{tmp_path}/mine", f"{tmp_path}/mine"])
