"""Causal masking runs: what is masked, what is kept on disk, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_selection import chosen

from moe_lens import Example, ExpertSet, MoELens, MoELensError, Zero, load_examples, tune
from moe_lens.causal.evaluation import answer_table, summarise
from moe_lens.choosing.masking import answer_all, masking_rows, named, random_controls
from moe_lens.choosing.scores import SCORES, measure_usage, score_table
from moe_lens.choosing.selection import Choice
from moe_lens.results import read_table

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",), "the mat"),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
    Example("c", "The dog slept in the sun.", "Who slept?", ("The dog",), "The cat"),
]


def test_controls_match_the_sizes_of_every_layer_and_are_the_same_for_the_same_seed():
    choices = [*chosen("ce:2"), *chosen("0:1,2;1:5"), *chosen("ce:2")]
    controls = random_controls(choices, 3, n_experts=8, seed=0)
    assert [c.intervention for c in controls] == [
        *(f"random:2#{i}" for i in range(3)),
        *(f"random~0x2+1x1#{i}" for i in range(3)),
    ]
    assert {tuple(len(ids) for _, ids in c.experts.members) for c in controls[:3]} == {(2, 2)}
    assert {tuple(len(ids) for _, ids in c.experts.members) for c in controls[3:]} == {(2, 1)}
    assert len({c.experts for c in controls[:3]}) == 3
    assert controls == random_controls(choices, 3, n_experts=8, seed=0)
    assert controls != random_controls(choices, 3, n_experts=8, seed=1)


def answers_of(em: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(name, str(i), "", value, value, value) for name, values in em.items() for i, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["intervention", "id", "prediction", "em", "f1", "memory"])


def test_rows_say_how_much_was_lost_and_how_random_sets_compare():
    em = {"none": [1, 1, 1, 1], "ce:1": [0, 0, 0, 1], "random:1#0": [1, 1, 0, 1], "random:1#1": [0, 0, 0, 0]}
    choices = [Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:]]
    rows = masking_rows(answers_of(em), choices, "zero").set_index("intervention")
    assert rows.loc["none", "em"] == 1
    assert pd.isna(rows.loc["none", "em_drop"])
    assert rows.loc["ce:1", "em_drop"] == 0.75
    assert rows.loc["ce:1", "rank"] == "2 of 3"  # one random set did more damage
    assert rows.loc["random:1", ["em", "em_drop", "family"]].tolist() == [0.375, 0.625, "random mean"]
    assert 0 < rows.loc["ce:1", "p_value"] <= 1
    assert rows.loc["ce:1", "em_low"] <= 0.25 <= rows.loc["ce:1", "em_high"]


def test_a_random_set_that_does_as_much_damage_takes_the_first_rank():
    em = {"none": [1, 1], "ce:1": [0, 1], "random:1#0": [1, 0]}
    choices = [Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:]]
    assert masking_rows(answers_of(em), choices, "zero").set_index("intervention").loc["ce:1", "rank"] == "2 of 2"


def test_controls_of_different_layers_are_kept_apart_and_every_choice_is_ranked():
    choices = [*chosen("0:5"), *chosen("1:3"), *chosen("0:1,2;1:5"), *chosen("0:3,4;1:0")]
    controls = random_controls(choices, 1, n_experts=8, seed=0)
    names = [control.intervention for control in controls]
    assert names == ["random~0x1#0", "random~1x1#0", "random~0x2+1x1#0"]
    em = {"none": [1, 1]} | {choice.intervention: [0, 1] for choice in [*choices, *controls]}
    rows = masking_rows(answers_of(em), [*choices, *controls], "zero").set_index("intervention")
    assert rows.loc[[choice.intervention for choice in choices], "rank"].tolist() == ["2 of 2"] * 4


def test_two_sets_of_one_name_are_refused(olmoe, tmp_path):
    choices = [Choice("mine", "mine", ExpertSet.of({0: [expert]})) for expert in (1, 2)]
    with pytest.raises(MoELensError, match="these repeat: mine"):
        answer_all(olmoe, EXAMPLES, choices, "zero", tmp_path, {}, max_new_tokens=2, batch_size=2)
    assert named([choices[0], choices[0]], "zero") == {"mine": Zero(choices[0].experts)}


def test_memory_is_counted_where_it_is_known():
    table = answers_of({"none": [1, 0]}).assign(memory=[float("nan"), 1.0])
    assert summarise(table)["memory"] == 1.0
    assert summarise(table.assign(memory=float("nan")))["memory"] is None


def test_answers_are_those_under_the_mask_and_are_kept(olmoe, tmp_path, monkeypatch):
    choices = [Choice("half", "chosen", ExpertSet.of({layer: range(4) for layer in range(3)}))]
    run = {"max_new_tokens": 4, "batch_size": 2}
    answers = answer_all(olmoe, EXAMPLES, choices, "zero", tmp_path, {"model": "m"}, **run)
    with olmoe.intervene(Zero(choices[0].experts)):
        masked = answer_table(olmoe, EXAMPLES, max_new_tokens=4, batch_size=2, progress=False)
    plain = answer_table(olmoe, EXAMPLES, max_new_tokens=4, batch_size=2, progress=False)
    by_name = dict(iter(answers.groupby("intervention")))
    assert by_name["half"]["prediction"].tolist() == masked["prediction"].tolist()
    assert by_name["none"]["prediction"].tolist() == plain["prediction"].tolist()
    assert masked["prediction"].tolist() != plain["prediction"].tolist()

    computed = []
    said = masked["prediction"].tolist()
    monkeypatch.setattr(olmoe, "generate", lambda *args, **kwargs: computed.append(1) or said)
    again = answer_all(olmoe, EXAMPLES, choices, "zero", tmp_path, {"model": "m", "command": ["other"]}, **run)
    assert again.equals(answers)
    assert not computed, "finished work was done again"
    answer_all(olmoe, EXAMPLES, choices, "zero", tmp_path, {"model": "another"}, **run)
    assert len(computed) == 2, "another model's answers were taken over"


def test_a_mask_the_model_cannot_spare_is_refused_before_anything_is_computed(olmoe, tmp_path):
    choices = [Choice("most", "chosen", ExpertSet.of({0: range(6)}))]
    run = {"max_new_tokens": 2, "batch_size": 2}
    with pytest.raises(MoELensError, match="fewer than the 3"):
        answer_all(olmoe, EXAMPLES, choices, "reroute", tmp_path, {}, **run)
    with pytest.raises(MoELensError, match="experts 0 to 7"):
        answer_all(olmoe, EXAMPLES, [Choice("x", "x", ExpertSet.of({0: [8]}))], "zero", tmp_path, {}, **run)
    assert not list(tmp_path.iterdir())


def test_scores_are_usage_of_tuned_base_or_their_difference(lenses):
    base, tuned = lenses["olmoe"], lenses["qwen3_moe"]  # any two models of one shape
    counted = [measure_usage(lens, EXAMPLES, SCORES.values(), progress=False) for lens in (base, tuned)]
    tables = {name: score_table(score, base=counted[0], tuned=counted[1])["score"] for name, score in SCORES.items()}
    for end in ("", "-last", "-question", "-mass"):
        assert tables[f"ce-gain{end}"].to_numpy() == pytest.approx((tables[f"ce{end}"] - tables[f"oe{end}"]).to_numpy())
    assert tables["ce"].sum() == pytest.approx(3.0)  # frequencies sum to 1 in each layer
    assert not tables["oe"].equals(tables["esft-token"])
    assert len({tuple(table) for table in tables.values()}) == len(SCORES)


def test_tuning_on_a_file_asks_for_dev_examples(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoELensError, match="--dev"):
        tune.main(model="organism", data="mine.json", out=tmp_path / "out")


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_command_lines_tune_mask_and_go_on_where_they_stopped(tmp_path):
    tune = command(
        *"moe_lens.tune --method router --model organism:planted --data swap --learning-rate 1e-2 --epochs 1".split(),
        *"--limit 40 --batch-size 8 --max-new-tokens 4 --out router".split(),
        folder=tmp_path,
    )
    assert tune.returncode == 0, tune.stderr
    assert "8,192 of" in tune.stdout
    assert set(pd.read_parquet(tmp_path / "router" / "tuning.parquet")) >= {"step", "loss", "learning_rate"}
    lens = MoELens.from_pretrained("organism:planted", delta=tmp_path / "router")
    dev = json.loads((tmp_path / "router" / "dev.json").read_text())
    again = answer_table(lens, load_examples("swap", split="dev"), max_new_tokens=4, progress=False)
    assert dev["em"] == pytest.approx(again["em"].mean())

    mask = (
        "moe_lens.intervene --model organism:planted --delta router --data swap --limit 12 --score-limit 20 "
        "--experts ce:1,4 --experts planted --compare oe:4 --control random:2 --max-new-tokens 4 --out masking"
    ).split()
    first = command(*mask, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    names = ("answers.parquet", "masking.parquet", "summary.json", "figure3.html")
    written = {name: (tmp_path / "masking" / name).read_bytes() for name in names}
    summary = json.loads(written["summary.json"])
    rows = {row["intervention"]: row for row in summary["rows"]}
    assert list(rows) == [
        "none",
        "ce:1",
        "ce:4",
        "planted",
        "oe:4",
        "random:1#0",
        "random:1#1",
        "random:4#0",
        "random:4#1",
        "random:1",
        "random:4",
    ]
    assert {"intervention", "experts", "size", "mode", "n", "em", "em_low", "em_high", "f1", "em_drop", "p_value"} <= {
        *rows["ce:4"]
    }
    assert summary["provenance"]["model"] == "organism:planted"
    assert len(read_table(tmp_path / "masking" / "answers.parquet")) == 9 * 12

    [lost] = (tmp_path / "masking" / "parts").glob("planted-*")
    [finished] = (tmp_path / "masking" / "parts").glob("ce_4-*")
    lost.unlink()
    kept = finished.stat().st_mtime_ns
    second = command(*mask, folder=tmp_path)
    assert second.returncode == 0, second.stderr
    assert {name: (tmp_path / "masking" / name).read_bytes() for name in names} == written
    assert finished.stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--data broken.jsonl --experts 0:1", "line 2"),
        ("--data empty.json --experts 0:1", "is empty"),
        ("--data unanswered.json --experts 0:1", "answer missing"),
        ("--data swap --experts 0:99", "experts 0 to 15"),
        ("--data swap --experts 9:1", "layer 9"),
        ("--data swap --experts ce:4 --experts best:4", "cannot read the experts"),
        ("--data swap --experts ce:4 --compare oe:4", "compare a tuned model with its base"),
        ("--data swap --experts 0:0,1,2,3,4,5,6,7,8,9,10,11,12 --mode reroute", "fewer than the 4"),
        ("--data swap --experts 0:1 --mode delete", "--mode"),
        ("--data swap --experts 0:1 --control 5", "--control"),
        ("--data swap --experts planted", "nothing is planted"),
        ("--data swap --experts 0:1 --layers 2", "none of the experts of '0:1' is in the layers 2"),
        ("--data swap --experts 0:1 --layers 7", "layer 7 has no routed experts"),
        ("--data swap --experts 0:1 --layers a", "--layers must be numbers"),
        ("--data swap --experts ce:17", "ce:17"),
        ("--data swap --experts ce:0", "N from 1"),
        ("--data swap --experts ce:17", "note: organism is taken to be router-tuned; give --delta if it is not"),
        ("--data swap --experts ce:1 --experts 9:1", "layer 9"),
        ("--data swap --experts ce:1 --experts mine.json --experts other/mine.json", "these repeat: mine"),
        ("--data swap --experts 0:1 --delta nowhere", "nowhere"),
        ("--data swap --experts 0:1 --model dense", "MoE"),
    ],
)
def test_bad_input_ends_with_one_message(wrong, says, tmp_path, monkeypatch, capsys, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    from moe_lens import intervene
    from moe_lens.commands import console

    monkeypatch.chdir(tmp_path)
    row = '{"context": "c", "question": "q", "answer": "c"}'
    Path("broken.jsonl").write_text(f"{row}\n{{oops\n")
    Path("empty.json").write_text("[]")
    Path("other").mkdir()
    Path("mine.json").write_text('{"1": [0]}')
    Path("other/mine.json").write_text('{"1": [1]}')
    Path("unanswered.json").write_text('[{"context": "c", "question": "q"}]')
    if "dense" in wrong:
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small)).save_pretrained("dense")
        tokenizer.save_pretrained("dense")
    arguments = wrong if "--model" in wrong else f"--model organism {wrong}"
    monkeypatch.setattr(sys, "argv", ["intervene", *arguments.split(), "--limit", "4", "--out", "out"])
    with pytest.raises(SystemExit) as stopped:
        console.run(intervene.main)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.strip().splitlines()[-1].startswith("error: ")
    assert says in captured.err
    assert not Path("out").exists()
