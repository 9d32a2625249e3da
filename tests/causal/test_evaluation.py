"""Evaluation: scores under interventions, options, judges, memory that runs out, processes, and resumed runs."""

import csv
import math
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_masking import EXAMPLES, answers_of

from moe_lens import Example, ExpertSet, MoELens, MoELensError, Zero, load_examples
from moe_lens.causal.evaluation import answer_table, evaluate, summary_table
from moe_lens.causal.judge import Judge, Verdict
from moe_lens.causal.outputs import Run, outputs
from moe_lens.data import FIGURE_10, Encoded
from moe_lens.lens.batching import run_batches
from moe_lens.lens.greedy import until
from moe_lens.lens.interventions import Renormalize, Rows
from moe_lens.metrics.wordnet import wordnet
from moe_lens.results import read_provenance, read_table

HALF = Zero(ExpertSet.of({layer: range(4) for layer in range(3)}))
CHOICES = [replace(e, answers=e.answers[:1], options=(e.answers[0], "the sun", "a mat")) for e in EXAMPLES]
QUIET = {"max_new_tokens": 3, "batch_size": 2, "progress": False}


def test_answers_are_those_as_the_model_is_and_under_each_intervention(olmoe):
    two = (HALF, Renormalize(ExpertSet.of({0: [5]})))
    found = evaluate(olmoe, EXAMPLES, {"half": HALF, "two": two}, **QUIET)
    for name, interventions in {"none": (), "half": [HALF], "two": two}.items():
        with olmoe.intervene(*interventions):
            expected = answer_table(olmoe, EXAMPLES, max_new_tokens=3, batch_size=2, progress=False)
        part = found.answers[found.answers["intervention"] == name].drop(columns="intervention").reset_index(drop=True)
        assert part.equals(expected)
        assert part["question"].tolist() == [example.question for example in EXAMPLES]
    predictions = found.answers.groupby("intervention", sort=False)["prediction"].agg(tuple)
    assert list(predictions.index) == ["none", "half", "two"]
    assert predictions.nunique() > 1, "no intervention took"
    assert list(found.summary["intervention"].unique()) == ["none", "half", "two"]
    assert found.summary.set_index(["intervention", "metric"]).loc[("none", "memory"), "missing"] == 1


def test_answers_stand_beside_their_question_all_right_answers_and_what_memory_says(olmoe):
    known = replace(EXAMPLES[0], answers=("the mat", "a mat"), original_answer="the moon")
    unknown = replace(EXAMPLES[1], original_answer=None)
    told = evaluate(olmoe, [known, unknown], **QUIET).answers[["question", "gold", "original_answer"]]
    assert told.iloc[0].tolist() == [known.question, "the mat | a mat", "the moon"]
    assert told["gold"].iloc[1] == " | ".join(unknown.answers)
    assert told["original_answer"].isna().tolist() == [False, True]


def test_m_r_stands_beside_memory_with_its_interval_and_examples_of_no_conflict_apart(olmoe, monkeypatch):
    asked = [Example(str(i), "c", "q", ("Lyon",), "Rome", original_aliases=("Roma",)) for i in range(10)]
    asked.append(Example("same", "c", "q", ("The Beatles",), "Beatles"))
    said = ["Rome", "Roma", "Lyon", *["Bern"] * 7, "Beatles"]
    monkeypatch.setattr(olmoe, "generate", lambda examples, **_: [said[asked.index(example)] for example in examples])
    table = evaluate(olmoe, asked, {"half": HALF}, **QUIET).summary.set_index(["intervention", "metric"])
    assert table.loc[("none", "memory"), ["n", "missing", "same", "mean"]].tolist() == [10, 0, 1, 0.2]
    row = table.loc[("none", "memory_ratio")]
    assert row[["n", "missing", "same"]].tolist() == [3, 7, 1]
    assert row[["mean", "low", "high"]].tolist() == pytest.approx([2 / 3, 0.0943, 0.9916], abs=1e-4)  # 2 of 3
    assert pd.isna(table.loc[("half", "memory_ratio"), "drop"]), "other masks, other examples"
    assert table.loc[("none", "em"), ["n", "same", "mean"]].tolist() == pytest.approx([11, 0, 2 / 11])
    monkeypatch.setattr(olmoe, "generate", lambda examples, **_: ["Bern"] * len(examples))
    none = evaluate(olmoe, asked, **QUIET).summary.set_index("metric")
    assert none.loc["memory_ratio", "n"] == 0
    assert pd.isna(none.loc["memory_ratio", "mean"]), "0 / 0"


def letters(prediction: str, example: Example) -> float:
    return float(len(prediction))


def test_logits_and_functions_of_ones_own_are_metrics_of_any_size_under_interventions(olmoe):
    """The difference of two first tokens' log-probabilities is that of their logits at the prompt's last token."""
    metrics = ["logit_difference", "answer_log_probability", letters]
    found = evaluate(olmoe, EXAMPLES, {"half": HALF}, metrics=metrics, **QUIET)
    assert set(found.summary["metric"]) == {"logit_difference", "answer_log_probability", "letters"}
    for name, interventions in {"none": (), "half": [HALF]}.items():
        own = found.answers[found.answers["intervention"] == name].set_index("id")
        with olmoe.intervene(*interventions):
            whole = olmoe.answer_log_probabilities(EXAMPLES, with_end=False, progress=False)
            assert own["answer_log_probability"].tolist() == pytest.approx(whole, abs=1e-5)
            assert own["letters"].tolist() == [len(text) for text in own["prediction"]]
            for example in EXAMPLES:
                if example.id != "a":  # without a memory, or both begin with "The"
                    assert math.isnan(own.loc[example.id, "logit_difference"])
                    continue
                prompt = olmoe.template.render(example, olmoe.tokenizer)
                texts = (f" {text}" for text in (example.answers[0], example.memory[0]))
                gold, rival = (olmoe.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts)
                logits, _ = olmoe.run_with_cache(prompt.text, positions="last")
                expected = (logits[0, -1, gold] - logits[0, -1, rival]).item()
                assert own.loc[example.id, "logit_difference"] == pytest.approx(expected, abs=1e-4)
    rows = found.summary.set_index(["intervention", "metric"])
    assert rows.loc[("none", "answer_log_probability"), "mean"] < 0
    drops = found.answers.pivot(index="id", columns="intervention", values="answer_log_probability")
    assert rows.loc[("half", "answer_log_probability"), "drop"] == pytest.approx((drops["none"] - drops["half"]).mean())


def test_a_logit_difference_needs_examples_with_a_memory(olmoe):
    with pytest.raises(MoELensError, match="logit_difference needs examples with an original_answer"):
        evaluate(olmoe, [EXAMPLES[1]], metrics=["logit_difference"], **QUIET)


def test_answers_that_are_too_long_to_be_given_are_told_with_their_number(olmoe):
    texts = ["a b", "the mat and the cat", "in the sun of the day"]
    asked = [Example(str(i), "", "q", (text, *(["x"] if i == 2 else []))) for i, text in enumerate(texts)]
    lengths = [len(olmoe.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) for text in texts]
    with pytest.warns(
        UserWarning, match=rf"^1 of 3 examples have gold answers longer than {lengths[1] - 1} new tokens"
    ):
        evaluate(olmoe, asked, max_new_tokens=lengths[1] - 1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(olmoe, asked, max_new_tokens=lengths[1], progress=False)


def test_answers_end_before_a_stop_and_parts_with_another_stop_are_not_taken_over(olmoe, tmp_path):
    def said(stop: list[str]) -> list[str]:
        return evaluate(olmoe, EXAMPLES, stop=stop, out=tmp_path, made_by={}, **QUIET).answers["prediction"].tolist()

    whole = said([])
    cut = whole[0][1]
    assert said([cut]) == [until(text, [cut]).strip() for text in whole] != whole


def test_a_text_ends_before_the_first_stop_after_it_has_begun():
    assert until("\n\n Paris\nQuestion: what", ["Question", "\n"]) == "\n\n Paris"
    assert until("Paris", ["\n"]) == "Paris"
    thinks = "<think>\nIt is\n\nFrance.\n</think>\n\nParis"
    assert until(f"{thinks}\nQuestion: what", ["\n"]) == thinks, "a thought has ended the answer to come"
    for wrong in ("\n", [""]):
        with pytest.raises(MoELensError, match="texts to stop before"):
            until("Paris", wrong)


def test_rows_meet_their_own_examples_though_these_are_sorted(olmoe):
    examples = [replace(example, context=example.context * times) for times in (1, 3, 2) for example in EXAMPLES]
    rows = Rows(tuple(HALF if place % 2 else None for place in range(len(examples))))
    found = evaluate(olmoe, examples, {"rows": rows, "half": HALF}, **QUIET).answers
    said = {name: list(part["prediction"]) for name, part in found.groupby("intervention")}
    assert said["rows"] == [said["half" if place % 2 else "none"][place] for place in range(len(examples))]
    assert said["none"] != said["half"]


@pytest.mark.parametrize("examples", [[EXAMPLES[0], *CHOICES, EXAMPLES[1], CHOICES[0]], EXAMPLES])
def test_rows_meet_every_option_of_their_own_examples_of_which_some_have_none(olmoe, examples):
    rows = Rows(tuple(HALF if place % 2 else None for place in range(len(examples))))
    run = Run(max_new_tokens=1, batch_size=2, out=None, provenance={}, progress=False)
    found = outputs(olmoe, examples, {"none": (), "half": (HALF,), "rows": (rows,)}, ["options"], run)
    for place, values in enumerate(found["rows", "options"]):
        own, other = (found[name, "options"][place] for name in (("half", "none") if place % 2 else ("none", "half")))
        if not examples[place].options:
            assert values is None
        else:
            assert values == pytest.approx(own, abs=1e-4)
            assert values != pytest.approx(other, abs=1e-4)


def test_the_summary_compares_with_none_pair_by_pair():
    em = {"none": [1, 1, 1, 0], "mask": [0, 0, 1, 0], "same": [1, 1, 1, 0]}
    table = summary_table(answers_of(em).assign(memory=[math.nan] * 4 + [1.0] * 8), metrics=["em", "memory"])
    rows = table.set_index(["intervention", "metric"])
    assert rows.loc[("none", "em"), ["n", "missing", "mean"]].tolist() == [4, 0, 0.75]
    assert pd.isna(rows.loc[("none", "em"), "drop"])
    mask = rows.loc[("mask", "em")]
    assert mask["drop"] == 0.5
    assert mask["cohens_d"] == pytest.approx(0.5 / (1 / 3) ** 0.5)
    assert mask["p_value"] == pytest.approx(0.5, abs=0.02)
    assert mask["q_value"] == pytest.approx(min(1, 2 * mask["p_value"]))
    assert rows.loc[("same", "em"), ["drop", "cohens_d", "p_value"]].tolist() == [0, 0, 1]
    assert rows.loc[("none", "memory"), "n"] == 0
    assert pd.isna(rows.loc[("mask", "memory"), "drop"]), "no pair has both scores"


def by_hand(lens: MoELens, example: Example) -> list[float]:
    """Each option's log-probability from the bare model's logits, without end-of-sequence."""
    start = lens.tokenizer(FIGURE_10.render(example, lens.tokenizer).text)["input_ids"]
    found = []
    for option in example.options:
        ids = start + lens.tokenizer(" " + option)["input_ids"]
        with torch.no_grad():
            log_probabilities = lens.module(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(log_probabilities[i - 1, ids[i]]) for i in range(len(start), len(ids))))
    return found


def test_accuracy_chooses_the_most_probable_option(olmoe):
    by_length = []
    for example in CHOICES:
        sums = by_hand(olmoe, example)
        best = max(range(3), key=lambda i: sums[i])
        longest = max(range(3), key=lambda i: sums[i] / len(example.options[i]))
        by_length.append((float(best == 0), float(longest == 0), example.options[best]))
    # Both right and wrong choices have to be among the cases: answers are moved to what the model chooses, or not.
    right = [replace(example, answers=(by_length[i][2],)) for i, example in enumerate(CHOICES)]
    found = evaluate(olmoe, CHOICES, metrics=["accuracy", "accuracy_per_character"], **QUIET).answers
    assert found["accuracy"].tolist() == [case[0] for case in by_length]
    assert found["accuracy_per_character"].tolist() == [case[1] for case in by_length]
    assert found["prediction"].isna().all()
    assert evaluate(olmoe, right, metrics=["accuracy"], **QUIET).answers["accuracy"].tolist() == [1.0] * 3
    mixed = evaluate(olmoe, [CHOICES[0], EXAMPLES[1]], metrics=["accuracy", "em"], **QUIET)
    assert mixed.answers["accuracy"].isna().tolist() == [False, True]
    assert mixed.answers["prediction"].notna().all()


def next_letter(lens: MoELens, folder: Path, subject: str, row: list[str]) -> str:
    """What the bare model chooses, written from the files and the authors' code without this package's data room."""

    def shown(cells: list[str], *, answered: bool) -> str:
        lines = "".join(f"\n{letter}. {cell}" for letter, cell in zip("ABCD", cells[1:5], strict=True))
        return f"{cells[0]}{lines}\nAnswer:" + (f" {cells[5]}\n\n" if answered else "")

    prompt = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    with (folder / "dev" / f"{subject}_dev.csv").open(newline="") as file:
        prompt += "".join(shown(cells, answered=True) for cells in list(csv.reader(file))[:5])
    start = lens.tokenizer(prompt + shown(row, answered=False))["input_ids"]
    sums = {}
    for letter in "ABCD":
        ids = start + lens.tokenizer(f" {letter}")["input_ids"]
        with torch.no_grad():
            log_probabilities = lens.module(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums[letter] = sum(float(log_probabilities[i - 1, ids[i]]) for i in range(len(start), len(ids)))
    return max(sums, key=lambda letter: sums[letter])


def test_mmlu_equals_an_independent_implementation_question_by_question_and_over_subjects(olmoe, mmlu_folder):
    right: dict[str, list[bool]] = {}
    for subject in ("high_school_physics", "law"):
        path = mmlu_folder / "test" / f"{subject}_test.csv"
        rows = list(csv.reader(path.open(newline="")))
        chosen = [next_letter(olmoe, mmlu_folder, subject, row) for row in rows]
        if subject == "law":  # what is right is moved to what is chosen for one of three
            rows = [
                [*row[:5], letter if i == 1 else "ABCDA"["ABCD".index(letter) + 1]]
                for i, (row, letter) in enumerate(zip(rows, chosen, strict=True))
            ]
            path.write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in rows))
        right[subject] = [row[5] == letter for row, letter in zip(rows, chosen, strict=True)]
    examples = load_examples(f"mmlu:{mmlu_folder}")
    found = evaluate(olmoe, examples, metrics=["accuracy", "accuracy_over_groups"], batch_size=2, progress=False)
    assert found.answers["accuracy"].tolist() == [*right["high_school_physics"], *right["law"]]
    assert right["law"] == [False, True, False]
    summary = found.summary.set_index("metric")["mean"]
    physics = sum(right["high_school_physics"])
    assert summary["accuracy"] == pytest.approx((physics + 1) / 5)
    assert summary["accuracy_over_groups"] == pytest.approx((physics / 2 + 1 / 3) / 2)


def test_with_answer_after_only_what_comes_after_it_is_scored_of_predictions_and_gold_answers(olmoe, monkeypatch):
    golds = ("1+2 is 3 #### 3", "So: ####  The sun", "no mark", "#### 7")
    asked = [Example(str(i), "", "Add.", (gold,), asked="prompt") for i, gold in enumerate(golds)]
    said = ["hence #### 3", "#### sun", "no mark", "7"]
    monkeypatch.setattr(olmoe, "template", replace(olmoe.template, answer_after="####"))
    monkeypatch.setattr(olmoe, "generate", lambda examples, **_: [said[asked.index(one)] for one in examples])
    with pytest.warns(UserWarning, match="2 of 4 answers have nothing that --answer-after '####' matches"):
        found = evaluate(olmoe, asked, max_new_tokens=99, progress=False).answers
    assert found["prediction"].tolist() == said
    assert found["answered"].fillna("-").tolist() == ["3", "sun", "-", "-"]
    assert found["em"].tolist() == [1, 1, 0, 0], "an answer without the mark is none, be the text what it may"
    assert answer_table(olmoe, asked, max_new_tokens=99, progress=False)["em"].tolist() == [1, 1, 0, 0]
    monkeypatch.setattr(olmoe, "template", replace(olmoe.template, answer_after=""))
    whole = evaluate(olmoe, asked, max_new_tokens=99, progress=False).answers
    assert whole["em"].tolist() == [0, 0, 1, 1], "SQuAD's rule leaves out punctuation such as the mark"
    assert "answered" not in whole


def test_unjudged_answers_are_left_out_and_counted(olmoe, monkeypatch):
    verdicts = [Verdict(True), Verdict(None, "too slow"), Verdict(False)]
    monkeypatch.setattr(Judge, "verdicts", lambda self, examples, predictions: verdicts)
    found = evaluate(olmoe, EXAMPLES, metrics=["acc_llm"], judge=Judge("m", "http://x/v1"), **QUIET)
    assert found.summary.loc[0, ["n", "missing", "mean"]].tolist() == [2, 1, 0.5]
    assert found.answers["unjudged"].tolist()[1] == "too slow"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"examples": []}, "nothing to evaluate"),
        ({"metrics": ["accuracy"]}, "none of these has options"),
        ({"metrics": ["acc_llm"]}, "judge=Judge"),
        ({"metrics": ["best"]}, "metrics must be of em"),
        ({"interventions": {"none": HALF}}, "another name"),
        ({"interventions": {"x": Zero(ExpertSet.of({0: [99]}))}}, "experts 0 to 7"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_computed(olmoe, monkeypatch, options, says):
    monkeypatch.setattr(olmoe, "generate", None)
    with pytest.raises(MoELensError, match=says):
        evaluate(olmoe, **({"examples": EXAMPLES} | options))
    with olmoe.intervene(HALF), pytest.raises(MoELensError, match="outside"):
        evaluate(olmoe, EXAMPLES)


@pytest.mark.parametrize(
    ("metric", "missing", "says"),
    [
        ("bleu", "sacrebleu", "install it with: pip install 'moe_lens[text]'"),
        ("rouge_l", "rouge_score", "install it with: pip install 'moe_lens[text]'"),
        ("meteor", "nltk", "install it with: pip install 'moe_lens[text]'"),
        ("meteor", None, "apt install wordnet-base"),
        ("acc_llm", "openai", "install it with: pip install 'moe_lens[judge]'"),
    ],
)
def test_what_a_metric_lacks_is_said_before_anything_is_computed(olmoe, monkeypatch, tmp_path, metric, missing, says):
    monkeypatch.setattr(olmoe, "generate", None)
    wordnet.cache_clear()
    if missing is None:
        monkeypatch.setattr(pytest.importorskip("nltk").data, "path", [])
        monkeypatch.setattr("moe_lens.metrics.wordnet.DEBIAN", str(tmp_path))
    else:
        for name in [name for name in sys.modules if name.split(".")[0] == missing]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MoELensError) as error:
        evaluate(olmoe, EXAMPLES, metrics=["em", metric], judge=Judge("m", "http://127.0.0.1:9/v1"))
    assert says in str(error.value)


def test_a_judge_that_is_not_there_loses_no_answer(olmoe, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    run = {"metrics": ["em", "acc_llm"], "out": tmp_path, **QUIET}
    with pytest.raises(MoELensError, match="no judge to be reached"):
        evaluate(olmoe, EXAMPLES, judge=Judge("m", "http://127.0.0.1:9/v1", retries=0), **run)
    monkeypatch.setattr(olmoe, "generate", None)
    monkeypatch.setattr(Judge, "verdicts", lambda self, examples, predictions: [Verdict(True)] * len(examples))
    assert evaluate(olmoe, EXAMPLES, judge=Judge("m", "http://x/v1"), **run).answers["acc_llm"].tolist() == [1.0] * 3


def test_processes_have_as_much_to_do_of_each_kind(olmoe, monkeypatch):
    """Scores of given answers and generated ones take unlike times, and so do long questions and short ones."""
    examples = [replace(example, id=f"{example.id} {copy}") for example in EXAMPLES for copy in range(11)]
    done: list[Counter[str]] = []
    monkeypatch.setattr(
        "moe_lens.causal.outputs._outputs", lambda lens, all_of_them, unit, *_: [unit] * len(unit.places)
    )
    monkeypatch.setattr("moe_lens.causal.outputs.gathered", lambda found, share: done.append(_counted(found)) or [])
    for process in range(2):
        monkeypatch.setattr("moe_lens.causal.outputs.part_of_work", lambda module, own=process: (own, 2))
        run = Run(3, 1, None, {}, progress=False)
        outputs(olmoe, examples, {"none": (), "half": (HALF,), "other": (HALF,)}, ["answer", "prediction"], run)
    assert done[0] + done[1] == Counter(answer=3 * 33, prediction=3 * 33)
    assert abs(done[0]["answer"] - done[1]["answer"]) <= 3
    assert abs(done[0]["prediction"] - done[1]["prediction"]) <= 3
    assert done[0].total() == done[1].total()


def _counted(found):
    """How many examples each kind of reading had."""
    counts = Counter()
    for unit, values in found:
        counts[unit.reads] += len(values)
    return counts


def test_finished_parts_are_kept_and_scored_by_other_metrics(olmoe, tmp_path, monkeypatch):
    run = {"interventions": {"half": HALF}, "out": tmp_path, **QUIET}
    first = evaluate(olmoe, EXAMPLES, **run)
    parts = {file: file.read_bytes() for file in (tmp_path / "parts").iterdir()}
    assert len(parts) == 2 * 2
    with monkeypatch.context() as patch:
        patch.setattr(olmoe, "generate", None)
        assert evaluate(olmoe, EXAMPLES, **run).answers.equals(first.answers)
        other = evaluate(olmoe, EXAMPLES, metrics=["em"], **run).answers
        assert other["em"].tolist() == first.answers["em"].tolist()
    next(iter(parts)).unlink()
    assert evaluate(olmoe, EXAMPLES, **run).answers.equals(first.answers)
    assert {file: file.read_bytes() for file in parts} == parts
    changed = evaluate(olmoe, EXAMPLES, **(run | {"max_new_tokens": 1})).answers
    assert not changed["prediction"].equals(first.answers["prediction"]), "parts of another run were taken over"


class Limited:
    """Raises as a full accelerator does for more than `rows` rows; forwards the rest."""

    def __init__(self, forward, rows):
        self.forward, self.rows, self.tried = forward, rows, []

    def __call__(self, ids):
        self.tried.append(len(ids))
        if len(ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return self.forward(ids)


def test_batches_that_do_not_fit_are_halved_and_nothing_changes(olmoe, monkeypatch):
    examples = EXAMPLES * 3
    whole = [olmoe.generate(examples, max_new_tokens=3, progress=False), olmoe.answer_log_probabilities(examples)]
    embedding = olmoe.module.model.embed_tokens
    limited = Limited(embedding.forward, 2)
    monkeypatch.setattr(embedding, "forward", limited)
    with olmoe.intervene(HALF), pytest.warns(UserWarning, match=r"out of memory with 9 examples.* with 4 at a time"):
        olmoe.generate(examples, max_new_tokens=3, batch_size=9, progress=False)
    assert [rows for rows in limited.tried if rows > 2] == [9, 4], "the smaller batch was not kept to"
    with pytest.warns(UserWarning, match="out of memory"):
        assert olmoe.generate(examples, max_new_tokens=3, progress=False) == whole[0]
    with pytest.warns(UserWarning, match="out of memory"):
        assert olmoe.answer_log_probabilities(examples) == pytest.approx(whole[1], abs=1e-5)
    limited.rows = 0
    with pytest.warns(UserWarning, match="memory"), pytest.raises(MoELensError, match=r"single example of .* tokens"):
        olmoe.generate(examples, max_new_tokens=3, progress=False)


def test_a_real_allocation_failure_is_out_of_memory_and_other_errors_are_not():
    prompts = [Encoded(str(i), "", (1,) * 5, None, None, (), 5) for i in range(4)]

    def run(places, prompts):
        torch.empty(2**60 if len(prompts) > 1 else 1, dtype=torch.uint8)
        return [place * 10 for place in places]

    with pytest.warns(UserWarning, match="going on with 1 at a time"):
        assert list(run_batches([((3, 2, 1, 0), prompts)], run)) == [(3, 30), (2, 20), (1, 10), (0, 0)]

    def fail(places, prompts):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        list(run_batches([((0,), prompts[:1])], fail))


def command(*arguments: str, folder: Path, processes: int = 1) -> str:
    launch = [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    found = subprocess.run(
        [sys.executable, "-m", *launch, "moe_lens.evaluate", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


RUN = (
    "--model organism:planted --data swap --limit 60 --batch-size 4 --max-new-tokens 4 "
    "--metrics em,f1,memory --mask planted --mask 0:1,2 --mode renormalize --device cpu"
).split()


@pytest.mark.slow
def test_two_processes_and_resumed_ones_write_the_bytes_of_one(tmp_path):
    names = ("answers.parquet", "summary.parquet")
    said = command(*RUN, "--out", "run", folder=tmp_path)
    assert "60 examples of swap" in said
    alone = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    parts = sorted((tmp_path / "run" / "parts").iterdir())
    assert len(parts) == 3 * 15  # a batch to a part
    with pytest.raises(AssertionError, match=r"holds the results of another run: its data\.examples is 60"):
        command(*RUN, "--out", "run", "--limit", "8", folder=tmp_path)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == alone
    for part in parts[1::2]:
        part.unlink()
    (tmp_path / "run" / "answers.parquet").unlink()
    shared = command(*RUN, "--out", "run", folder=tmp_path, processes=2)
    assert shared.count("written to run") == 1, "each process did all of the work"
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == alone
    (tmp_path / "run").rename(tmp_path / "first")
    command(*RUN, "--out", "run", folder=tmp_path, processes=2)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == alone
    assert {part.name for part in (tmp_path / "run" / "parts").iterdir()} == {part.name for part in parts}
    lens = MoELens.from_pretrained("organism:planted")
    plain = answer_table(lens, load_examples("swap", limit=60), max_new_tokens=4, progress=False)
    answers = read_table(tmp_path / "run" / "answers.parquet")
    assert answers[answers["intervention"] == "none"]["prediction"].tolist() == plain["prediction"].tolist()
    assert read_provenance(tmp_path / "run" / "summary.parquet")["metrics"] == ["em", "f1", "memory"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--metrics em,best", "metrics must be of em"),
        ("--mask ce:4 --mask oe:4", "give --delta, or --base for a tuned --model"),
        ("--mode delete", "the mode of masking must be one of zero, renormalize, reroute"),
        ("--metrics acc_llm", "--judge-model"),
        ("--judge http://127.0.0.1:9/v1", "belong together"),
        ("--mask 9:1", "layer 9"),
        ("--mask mine.json --mask other/mine.json", "these repeat: mine"),
    ],
)
def test_bad_input_ends_with_one_message(wrong, says, tmp_path, monkeypatch, capsys):
    from moe_lens.commands import console
    from moe_lens.evaluate import main

    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    for expert, file in enumerate(("mine.json", "other/mine.json")):
        Path(file).write_text(f'{{"1": [{expert}]}}')
    arguments = f"--model organism --data swap --limit 2 --out out {wrong}".split()
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit) as stopped:
        console.run(main)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert not Path("out").exists()
