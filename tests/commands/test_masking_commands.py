"""The masking commands: what --experts, --compare and --mask name, on which model scores are measured, and files."""

import json
import shutil
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from moe_lens import SCORES, ExpertSaliency, ExpertSet, ExpertUsage, MoELens, evaluate, intervene, load_examples
from moe_lens.causal import evaluation
from moe_lens.causal.evaluation import answer_table
from moe_lens.choosing import Ground, Models, choices, parse, score_tables
from moe_lens.choosing.selection import scores_of
from moe_lens.commands import console
from moe_lens.lens.greedy import until
from moe_lens.lens.interventions import Bias
from moe_lens.report import build_report
from moe_lens.results import read_provenance, read_table
from moe_lens.tuning import Schedule, TuneRouters, save_merged, save_trained, tune

SHORT = "--data swap --limit 4 --score-limit 8 --max-new-tokens 3"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command in this process and in a folder of its own; its tables are in what it gives back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "find_spec", lambda name: None)  # no browser, which takes seconds

    def started(command: Any, options: str, *, out: str = "out", short: str = SHORT) -> Path:
        monkeypatch.setattr(sys, "argv", ["command", *f"--model organism {short} --out {out} {options}".split()])
        with pytest.raises(SystemExit) as ended:
            console.run(command.main)
        assert not ended.value.code
        return tmp_path / out

    return started


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The organism with its routers lightly tuned: as a delta, and in merged/ as a model of its own."""
    folder = tmp_path_factory.mktemp("tuned")
    lens = MoELens.from_pretrained("organism")
    train = load_examples("swap", split="train", limit=32)
    found = tune(lens, train, [], TuneRouters(), Schedule(learning_rate=3e-2, epochs=1))
    save_trained(lens.module, found.trained, folder, facts={"method": "router"})
    save_merged(lens, folder / "merged")
    return folder


def scored() -> list:
    return load_examples("swap", split="train", limit=8)


def masked(out: Path) -> dict[str, ExpertSet]:
    """The experts of every mask by its name."""
    rows = read_table(out / "masking.parquet")
    return {row.intervention: ExpertSet.parse(row.experts) for row in rows.itertuples() if row.family != "random mean"}


def test_a_saliency_ranks_experts_of_the_base_by_the_name_of_its_score(run, tuned):
    out = run(intervene, f"--delta {tuned} --experts reap:2 --compare ean:1 --control none")
    [saliency] = MoELens.from_pretrained("organism").measure(scored(), ExpertSaliency(), progress=False)
    assert masked(out)["reap:2"] == ExpertSet.top(saliency.table(), 2, score="reap")
    assert masked(out)["ean:1"] == ExpertSet.top(saliency.table(), 1, score="ean")
    [other] = MoELens.from_pretrained("organism", delta=tuned).measure(scored(), ExpertSaliency(), progress=False)
    assert masked(out)["reap:2"] != ExpertSet.top(other.table(), 2, score="reap")
    kept = read_table(out / "score-reap.parquet")
    assert kept["score"].to_numpy() == pytest.approx(saliency.table()["reap"].to_numpy())


WORDS = ("ce:2", "oe:2", "ce-gain:2", "esft-gate:p=0.2", "random:3", "1:2,3;2:0")


def test_every_command_understands_the_same_words(run, tuned):
    experts = [selection for word in WORDS for selection in parse(word)]
    base, lens = (MoELens.from_pretrained("organism", delta=delta) for delta in (None, tuned))
    models = Models(base=lambda: nullcontext(base), tuned=lambda: nullcontext(lens))
    tables = score_tables(scores_of(experts), models, scored())
    ground = Ground(lens.architecture, "organism", tables, seed=5)
    expected = {choice.name: choice.experts for choice in choices(experts, ground)}
    assert len(set(expected.values())) == len(WORDS)

    options = " ".join(f"--experts {word}" for word in WORDS)
    out = run(intervene, f"--delta {tuned} --seed 5 --control none {options}")
    assert masked(out) == {"none": ExpertSet()} | expected
    options = " ".join(f"--mask {word}" for word in WORDS)
    by_name = run(evaluate, f"--delta {tuned} --seed 5 {options}", out="named")
    options = " ".join(f"--mask {experts}" for experts in expected.values())
    literally = run(evaluate, f"--delta {tuned} {options}", out="literal")
    answers, same = (read_table(folder / "answers.parquet") for folder in (by_name, literally))
    assert list(answers["intervention"].unique()) == ["none", *expected]
    assert (
        answers["intervention"]
        .map({"none": "none"} | {n: str(e) for n, e in expected.items()})
        .equals(same["intervention"])
    )
    pd.testing.assert_frame_equal(answers.drop(columns="intervention"), same.drop(columns="intervention"))
    assert answers.groupby("intervention")["prediction"].agg(tuple).nunique() > 1, "no mask took"
    masking = read_table(out / "answers.parquet")
    assert masking["prediction"].tolist() == answers["prediction"].tolist()


def test_evaluation_compares_masks_with_random_sets_and_ends_answers_before_a_stop(run, capsys):
    plain = run(evaluate, "--mask 1:2,3;2:0", out="plain")
    assert "a drop alone may be any mask's: --control random:20" in capsys.readouterr().err
    whole = read_table(plain / "answers.parquet")["prediction"]
    letter = whole[0][1]
    out = run(evaluate, f"--mask 1:2,3;2:0 --control random:2 --stop {letter}", out="compared")
    answers, summary = (read_table(out / f"{name}.parquet") for name in ("answers", "summary"))
    assert list(summary["intervention"].unique()) == ["none", "1:2,3;2:0"]
    assert summary.set_index(["intervention", "metric"]).loc[("1:2,3;2:0", "em"), "rank"].endswith(" of 3")
    assert answers["intervention"].nunique() == 4
    own = answers[answers["intervention"].isin(["none", "1:2,3;2:0"])]
    assert own["prediction"].tolist() == [until(text, [letter]).strip() for text in whole]


def test_a_tuned_model_is_compared_with_the_base_beside_it(run, tuned):
    words = "--experts ce:2 --compare oe:2 --compare ce-gain:2 --control none"
    delta = run(intervene, f"--delta {tuned} {words}", out="delta")
    whole = run(intervene, f"--model {tuned / 'merged'} --base organism {words}", out="whole")
    assert masked(whole) == masked(delta)
    assert read_provenance(whole / "score-oe.parquet")["base"] == "organism"
    for name in ("ce", "oe", "ce-gain"):
        first, second = (read_table(folder / f"score-{name}.parquet") for folder in (delta, whole))
        assert first["score"].to_numpy() == pytest.approx(second["score"].to_numpy())


def test_a_base_beside_it_is_known_by_its_weights_and_read_in_the_same_batches(run, tuned, tmp_path, monkeypatch):
    """Another model came to lie in the folder: what was measured on the first is not taken for the second's."""
    sizes = []
    measure = MoELens.measure

    def noted(lens, *rest, batch_size=None, **more):
        sizes.append(batch_size)
        return measure(lens, *rest, batch_size=batch_size, **more)

    monkeypatch.setattr(MoELens, "measure", noted)
    base = tmp_path / "base"
    line = f"--model {tuned / 'merged'} --base {base} --mask oe:2 --batch-size 3"
    own = MoELens.from_pretrained("organism")
    own.module.save_pretrained(base)
    own.tokenizer.save_pretrained(base)
    first = read_table(run(evaluate, line) / "score-oe.parquet")["score"].to_numpy()
    shutil.copytree(tuned / "merged", base, dirs_exist_ok=True)
    with pytest.raises(AssertionError):  # refused: it is not what the folder holds
        run(evaluate, line)
    second = read_table(run(evaluate, line, out="again") / "score-oe.parquet")["score"].to_numpy()
    assert sizes == [3, 3]
    assert first != pytest.approx(second)


def test_scores_are_kept_and_other_options_are_refused(run, tuned, monkeypatch, capsys):
    first = run(intervene, f"--delta {tuned} --experts ce:2 --control none")
    measured = []
    measure = MoELens.measure

    def counted(self, examples, *statistics, **rest):
        measured.append(len(examples))
        return measure(self, examples, *statistics, **rest)

    monkeypatch.setattr(MoELens, "measure", counted)
    written = (first / "score-ce.parquet").read_bytes()
    run(intervene, f"--delta {tuned} --experts ce:2 --control none")
    assert (measured, (first / "score-ce.parquet").read_bytes()) == ([], written)
    for other in ("--score-limit 5", "--limit 2", "--mode reroute", "--experts ce:1", "--seed 9", "--layers 0"):
        with pytest.raises(AssertionError):
            run(intervene, f"--delta {tuned} --experts ce:2 --control none {other}")
        assert "out holds the results of another run: its" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="trained on prompts of another template"):
        run(evaluate, f"--delta {tuned} --mask ce:2 --template plain", out="plain")
    assert measured == [8]


def test_one_command_gives_doses_on_several_tasks_a_matrix_and_a_plan_that_holds_later_runs(run, tmp_path, capsys):
    saved = Bias(ExpertSet.of({1: [2]}), 5.0, positions="from_question")
    saved.save(tmp_path / "mine")
    options = "--experts 1:2,3 --mode bias:0,9 --positions from_question --spare closed_book --control random:1"
    out = run(intervene, f"{options} --intervention mine --plan plan.json")
    assert "the plan is written to plan.json" in capsys.readouterr().out
    rows, matrix = (read_table(out / f"{name}.parquet") for name in ("doses", "selectivity"))
    assert rows["task"].unique().tolist() == ["swap", "closed_book"]
    per_task = ["none", "1:2,3@bias=0", "random:2#0@bias=0", "random:2@bias=0", "1:2,3@bias=9"]
    assert rows["intervention"].tolist()[:5] == per_task
    assert set(matrix["intervention"]) == {"1:2,3@bias=0", "1:2,3@bias=9", "mine"}
    answers = read_table(out / "answers.parquet").set_index(["task", "intervention"])
    lens = MoELens.from_pretrained("organism")
    for task in ("swap", "closed_book"):
        for name, bias in {"1:2,3@bias=9": (ExpertSet.of({1: [2, 3]}), 9.0), "mine": (saved.experts, 5.0)}.items():
            with lens.intervene(Bias(*bias, positions="from_question")):
                by_hand = answer_table(lens, load_examples(task, limit=4), max_new_tokens=3, progress=False)
            assert answers.loc[(task, name), "prediction"].tolist() == by_hand["prediction"].tolist()
    assert (out / "doses.html").exists()
    assert (out / "selectivity.html").exists()
    assert read_provenance(out / "doses.parquet")["stage"] == "exploratory"

    run(intervene, f"{options} --intervention mine --plan plan.json")
    part = run(intervene, f"{options} --intervention mine --plan plan.json --limit 3", out="part")
    assert "exploratory, since 6 of its 6 examples, and the model, are those of the plan" in capsys.readouterr().out
    assert read_provenance(part / "doses.parquet")["stage"] == "exploratory"
    later = run(intervene, f"{options} --intervention mine --plan plan.json --split dev", out="later")
    assert read_provenance(later / "doses.parquet")["stage"] == "confirmatory"
    departures = {"--seed 4": "its seed is 0, here it is 4", "--mode bias:0,8": "is bias:0,9, here it is bias:0,8"}
    for other, told in departures.items():
        with pytest.raises(AssertionError):
            run(intervene, f"{options} --intervention mine --plan plan.json {other}", out="other")
        assert told in capsys.readouterr().err
    (tmp_path / "plan.json").write_text((tmp_path / "plan.json").read_text().replace("bias:0,9", "bias:0,8"))
    with pytest.raises(AssertionError):
        run(intervene, f"{options} --intervention mine --plan plan.json --mode bias:0,8", out="other")
    assert "a plan that was changed confirms nothing" in capsys.readouterr().err


def length(prediction: str, example: Any) -> int:
    return len(prediction)


def test_evaluation_takes_strengths_saved_interventions_and_metrics_of_ones_own(run, tmp_path):
    Bias(ExpertSet.of({1: [2]}), 5.0).save(tmp_path / "mine")
    metrics = f"--metrics em,{__name__}:length"
    out = run(evaluate, f"--mask 1:2,3 --mode scale:0,2 --steps prefill --intervention mine {metrics}")
    answers = read_table(out / "answers.parquet")
    assert list(answers["intervention"].unique()) == ["none", "1:2,3@scale=0", "1:2,3@scale=2", "mine"]
    assert answers[f"{__name__}:length"].tolist() == answers["prediction"].str.len().tolist()


def test_layers_positions_and_steps_mean_the_same_in_both_commands_also_for_matched_sets(run):
    place = "--layers 1,2 --positions from_question --steps prefill --control matched:2 --mode bias:9"
    first = run(intervene, f"--experts 0:1;1:2,3;2:0 {place}", out="first")
    second = run(evaluate, f"--mask 0:1;1:2,3;2:0 {place}", out="second")
    answers, same = (read_table(folder / "answers.parquet") for folder in (first, second))
    names = ["none", "1:2,3;2:0@bias=9", *(f"matched to 1:2,3;2:0#{number}@bias=9" for number in (0, 1))]
    assert answers["intervention"].unique().tolist() == names
    pd.testing.assert_frame_equal(answers[same.columns], same)
    lens = MoELens.from_pretrained("organism")
    examples = load_examples("swap", limit=4)
    experts = ExpertSet.parse("1:2,3;2:0")
    with lens.intervene(Bias(experts, 9.0, positions="from_question", steps="prefill")):
        by_hand = answer_table(lens, examples, max_new_tokens=3, progress=False)
    assert same[same["intervention"] == names[1]]["prediction"].tolist() == by_hand["prediction"].tolist()
    [usage] = lens.measure(examples, ExpertUsage(positions="from_question"), progress=False)
    by_layer = usage.table().set_index(["layer", "expert"])["score"]
    share = (by_layer[1][[2, 3]].sum() + by_layer[2][0]) / 2
    rows = read_table(first / "doses.parquet").set_index("intervention")
    summary = read_table(second / "summary.parquet").set_index(["intervention", "metric"])
    for row in (rows.loc[names[1]], summary.loc[(names[1], "em")]):
        assert row["control"] == "matched to 1:2,3;2:0"
        assert row["usage"] == pytest.approx(share)
        assert row["control_usage"] == pytest.approx(share, abs=0.03)


def test_verdicts_by_other_metrics_stand_beside_those_by_em_and_in_the_plan(run, capsys):
    options = "--experts 1:2,3 --spare novel --control random:1 --plan plan.json"
    out = run(intervene, f"{options} --metrics answer_log_probability,{__name__}:length")
    matrix = read_table(out / "selectivity.parquet").set_index(["metric", "task"])
    own = f"{__name__}:length"
    measures = matrix["measure"].to_dict()
    assert list(dict.fromkeys(matrix.index.get_level_values("metric"))) == ["em", "answer_log_probability", own]
    assert measures["em", "swap"] == "share"
    assert measures["answer_log_probability", "swap"] == measures[own, "swap"] == "drop"
    scores = read_table(out / "answers.parquet").set_index(["task", "intervention"])["answer_log_probability"]
    drop = scores["novel", "none"].mean() - scores["novel", "1:2,3"].mean()
    assert matrix.loc[("answer_log_probability", "novel"), "effect"] == pytest.approx(drop)
    with pytest.raises(AssertionError):
        run(intervene, f"{options} --metrics answer_log_probability", out="other")
    assert "its metrics is ['em', 'answer_log_probability'" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        run(intervene, f"{options} --metrics memory", out="other")
    assert "no verdict of selectivity on memory" in capsys.readouterr().err


def test_topk_is_on_the_router_and_takes_no_experts(run, capsys):
    out = run(intervene, f"--mode topk:1,4 --layers 0,1 --metrics logit_difference,{__name__}:length")
    summary = read_table(out / "summary.parquet")
    assert summary["metric"].unique().tolist() == ["logit_difference", f"{__name__}:length"]
    rows = read_table(out / "doses.parquet").set_index("intervention")
    assert list(rows.index) == ["none", "router@topk=1", "router@topk=4"]
    answers = read_table(out / "answers.parquet").set_index("intervention")["prediction"]
    assert answers["router@topk=4"].tolist() == answers["none"].tolist(), "4 is the organism's own k"
    with pytest.raises(AssertionError):
        run(intervene, "--mode topk:1 --experts 1:2", out="other")
    assert "topk is on all experts of its layers; leave 1:2 out" in capsys.readouterr().err


def test_a_template_reaches_scores_and_answers_and_their_provenance(run, tmp_path):
    texts = {"with_context": "{context}\n\n{question}", "closed_book": "{question}", "answer_cue": "\n\nA:"}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    out = run(intervene, "--experts ce:2 --control random:1 --template mine.json", out="own")
    usual = run(intervene, "--experts ce:2 --control random:1", out="usual")
    told = run(evaluate, "--mask ce:2 --template mine.json", out="told")
    lens = MoELens.from_pretrained("organism", template=tmp_path / "mine.json")
    [usage] = lens.measure(scored(), ExpertUsage(), progress=False)
    for folder in (out, told):
        kept = read_table(folder / "score-ce.parquet")["score"].to_numpy()
        assert kept == pytest.approx(usage.table()["score"].to_numpy())
        assert kept != pytest.approx(read_table(usual / "score-ce.parquet")["score"].to_numpy())
    answers = read_table(out / "answers.parquet")
    plain = answer_table(lens, load_examples("swap", limit=4), max_new_tokens=3, progress=False)
    assert answers[answers["intervention"] == "none"]["prediction"].tolist() == plain["prediction"].tolist()
    for folder, tables in ((out, 3), (told, 3)):
        written = [file for file in folder.glob("*.parquet") if read_provenance(file)["template"] == texts]
        assert len(written) == tables
        assert all(read_provenance(part)["template"] == texts for part in (folder / "parts").iterdir())
    assert json.loads((out / "summary.json").read_text())["provenance"]["template"] == texts


def test_every_score_can_be_asked_for_by_itself(run, tuned):
    words = " ".join(f"--mask {name}:1" for name in SCORES)
    out = run(evaluate, f"--delta {tuned} --limit 1 --max-new-tokens 1 {words}")
    assert {file.name for file in out.glob("score-*")} == {f"score-{name}.parquet" for name in SCORES}


def test_the_command_lines_tune_mask_and_go_on_where_they_stopped(run, tmp_path, capsys):
    planted = "--model organism:planted --data swap --max-new-tokens 4"
    routers = "--method router --learning-rate 1e-2 --epochs 1 --limit 40 --batch-size 8"
    run(import_module("moe_lens.tune"), routers, out="router", short=planted)
    assert "8,192 of" in capsys.readouterr().out
    assert set(pd.read_parquet(tmp_path / "router" / "tuning.parquet")) >= {"step", "loss", "learning_rate"}
    lens = MoELens.from_pretrained("organism:planted", delta=tmp_path / "router")
    dev = json.loads((tmp_path / "router" / "dev.json").read_text())
    again = answer_table(lens, load_examples("swap", split="dev"), max_new_tokens=4, progress=False)
    assert dev["em"] == pytest.approx(again["em"].mean())

    experts = "--experts ce:1,4 --experts planted --compare oe:4 --control random:2"
    mask = f"--delta router --limit 12 --score-limit 20 {experts}"
    run(intervene, mask, out="masking", short=planted)
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
    run(intervene, mask, out="masking", short=planted)
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
        ("--data swap --experts 0:1 --mode delete", "the mode of masking must be one of zero, renormalize, reroute"),
        ("--data swap --experts 0:1 --mode bias", "bias needs strengths, each added to the router logits"),
        ("--data swap --experts 0:1 --positions there", "positions must be one of all, prompt"),
        ("--data swap --experts 0:1 --positions last --steps decode", "never meet"),
        ("--data swap,novel --spare novel --experts 0:1", "'novel' is named twice"),
        ("--data swap --intervention nowhere", "expected a saved intervention"),
        ("--data swap", "nothing is to be done: name experts with --experts"),
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


def test_random_sets_of_no_mask_are_refused_instead_of_left_out(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", f"evaluate --model nowhere --data swap --control random:3 --out {out}".split())
    with pytest.raises(SystemExit) as stopped:
        console.run(evaluate.main)
    assert stopped.value.code == 2
    assert "--control compares masks with random sets of their shape; give --mask" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("words", ["ce:2 oe:2", "ce-gain:2", "ce:2 reap:2", "0:1 ce-gain-last:2"])
@pytest.mark.parametrize(("command", "option"), [(evaluate, "--mask"), (intervene, "--experts")])
def test_scores_that_compare_need_the_other_model(command, option, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = " ".join(f"{option} {word}" for word in words.split())
    monkeypatch.setattr(sys, "argv", f"command --model nowhere --data swap --out out {options}".split())
    with pytest.raises(SystemExit) as stopped:
        console.run(command.main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "these scores compare a tuned model with its base; give --delta, or --base for a tuned --model" in said
    assert not Path("out").exists()  # and the model, which is not there, was not asked for


def test_one_command_leaves_a_patching_map_and_goes_on_where_it_stopped(run, capsys, monkeypatch):
    options = "--patch memory --positions question,last --layers 2,3 --limit 8"
    out = run(intervene, options)
    table, effects = (read_table(out / f"{name}.parquet") for name in ("patching", "patching_effects"))
    assert list(zip(table["layer"], table["position"], strict=True)) == [
        (layer, place) for layer in (2, 3) for place in ("question", "last")
    ]
    last = effects[(effects["layer"] == 3) & (effects["position"] == "last")]
    assert last["score"].to_numpy() == pytest.approx(last["source"].to_numpy(), abs=1e-4)
    whole = evaluation.evaluate(
        MoELens.from_pretrained("organism"), load_examples("swap", limit=8), metrics=["logit_difference"]
    ).answers.set_index("id")["logit_difference"]
    assert last["source"].tolist() == pytest.approx(whole[last["id"]].tolist(), abs=1e-4), "not --data's own run"
    assert read_provenance(out / "patching.parquet")["direction"] == "denoising"
    assert (out / "patching.html").exists()
    assert "the strongest of 4 places" in capsys.readouterr().out
    build_report(out, title="Where")
    assert "Where does what another run knows come in" in (out / "report.html").read_text()
    monkeypatch.setattr(MoELens, "next_token_log_probabilities", lambda *args, **named: pytest.fail("ran again"))
    pd.testing.assert_frame_equal(read_table(run(intervene, options) / "patching.parquet"), table)


def test_noising_runs_the_data_itself_and_patches_from_its_other_half(run):
    out = run(intervene, "--patch no_context --direction noising --over experts --positions last --layers 3")
    table, effects = (read_table(out / f"{name}.parquet") for name in ("patching", "patching_effects"))
    assert list(table["expert"]) == list(range(16))
    lens, examples = MoELens.from_pretrained("organism"), load_examples("swap", limit=4)
    found = evaluation.evaluate(lens, examples, metrics=["logit_difference"]).answers
    assert effects["unpatched"][:4].tolist() == pytest.approx(found["logit_difference"].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--patch memory --experts 1:2", "leave --experts out"),
        ("--patch memory --mode force", "leave --mode out"),
        ("--over experts --experts 1:2", "give --patch too"),
        ("--patch no_context --over tokens", "equally many tokens where it is patched"),
        ("--patch novel --positions last", "paired by id"),
        ("--data novel --patch memory", "none of 2 examples has another half"),
    ],
)
def test_a_patching_map_refuses_what_it_would_not_do(options, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = f"--model organism --data swap --limit 2 --out out {options}"
    monkeypatch.setattr(sys, "argv", ["command", *line.split()])
    with pytest.raises(SystemExit) as ended:
        console.run(intervene.main)
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
