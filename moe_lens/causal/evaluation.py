"""Answers of a lens to examples, scored one by one, and their summary with uncertainty."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.causal.judge import Judge
from moe_lens.causal.outputs import Run, outputs, scores, without_reasoning
from moe_lens.data import Example, PromptTemplate
from moe_lens.data.thoughts import without_thoughts
from moe_lens.decoding import PLAIN, Decoding
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import Intervention, check_interventions
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import from_first_process
from moe_lens.metrics import benjamini_hochberg, bootstrap_interval, compare, metrics_named
from moe_lens.metrics.bounds import Bounds
from moe_lens.metrics.catalogue import (
    DEFAULT_METRICS,
    JUDGE,
    OF_MEMORY,
    OPTIONS,
    PREDICTION,
    RIVALS,
    Metric,
    Named,
    same_as_memory,
)
from moe_lens.results import provenance

UNMASKED = "none"


@dataclass(frozen=True)
class Evaluation:
    """Scored answers.

    answers: one row per intervention and example: intervention ("none" first), id, question, gold (the right answers),
        original_answer (what memory says, None where that is unknown), prediction (None where no metric reads it), with
        a template's `answer_after` answered (what of it is scored, None where nothing is), a column per
        metric (NaN where it is not defined), `same` (whether a gold answer is also what memory
        says), and with a judge `unjudged`, why there is no verdict. summary: see `summary_table`.
    """

    answers: pd.DataFrame
    summary: pd.DataFrame


def evaluate(
    lens: MoELens,
    examples: Sequence[Example],
    interventions: Mapping[str, Intervention | Sequence[Intervention]] | None = None,
    *,
    metrics: Sequence[Named] = DEFAULT_METRICS,
    max_new_tokens: int = 16,
    stop: Sequence[str] = (),
    decoding: Decoding = PLAIN,
    batch_size: int | None = None,
    judge: Judge | None = None,
    out: Path | None = None,
    made_by: dict[str, Any] | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> Evaluation:
    """Scores the answers to the examples, as the model is ("none") and under each intervention.

    interventions: name -> one, or several that act in that order. metrics: names of `metrics.METRICS`,
        or functions of one's own, see `metrics_named`.
    decoding: how the answers come about, such as `CAD(1)` of moe_lens.decoding; the model as it is, too.
    stop: texts before which an answer ends, as in `lens.generate`. judge: whom the metric "acc_llm" asks.
    out: folder in which finished parts of the work are kept: the same call goes on where an interrupted one stopped.
    made_by: the provenance of the parts; by default the weights and the data.

    Examples whose exact match cannot be 1, as their gold answers are longer than max_new_tokens, are told in a warning.
    Under torchrun or `accelerate launch` the processes share the work, and each gets the whole result, the same as that
    of one process alone. Batches that do not fit in memory are halved.
    Raises MoELensError for unknown metrics, metrics that lack a package, their data, options or a judge, interventions
    that the model cannot be put under, no examples, or inside a `lens.intervene` block.
    """
    scored = metrics_named(metrics)
    named = {UNMASKED: ()} | {name: _several(given) for name, given in (interventions or {}).items()}
    _check(lens, examples, named, scored, judge, interventions or {})
    run = Run(
        max_new_tokens,
        lens.batch_size if batch_size is None else batch_size,
        out,
        made_by or _provenance(lens, examples, out),
        lens.progress if progress is None else progress,
        tuple(stop),
        decoding=decoding,
    )
    reads = {PREDICTION if metric.reads == JUDGE else metric.reads for metric in scored}
    if PREDICTION in reads:
        tell_unreachable(lens, examples, max_new_tokens)
    found = outputs(lens, examples, named, sorted(reads), run)

    def finish() -> Evaluation:
        answers = _answers(lens.template, examples, found, tuple(named), scored, judge)
        return Evaluation(answers, summary_table(answers, metrics=scored, seed=seed))

    return from_first_process(finish)


def answer_table(
    lens: MoELens,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 16,
    decoding: Decoding = PLAIN,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """One row per example, in the order given, of the model as it is now.

    Columns: id, question, gold, original_answer, prediction, same and DEFAULT_METRICS, as in `Evaluation.answers`.
    """
    tell_unreachable(lens, examples, max_new_tokens)
    texts = decoding.generate(lens, examples, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    texts = [without_thoughts(text).strip() for text in texts]
    columns = {metric.name: scores(metric, texts, examples, lens.template) for metric in metrics_named(DEFAULT_METRICS)}
    same = _same(without_reasoning(examples, lens.template))
    return pd.DataFrame(_asked(examples) | {"prediction": texts, "same": same} | columns)


def tell_unreachable(lens: MoELens, examples: Sequence[Example], max_new_tokens: int) -> None:
    """Warn of examples whose shortest gold answer has more tokens than an answer may have, so that EM cannot be 1."""
    texts = [f" {answer}" for example in examples for answer in example.answers]
    if not texts or os.environ.get("RANK", "0") != "0":
        return
    lengths = iter(map(len, lens.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    shortest = [min(next(lengths) for _ in example.answers) for example in examples]
    longer = sum(length > max_new_tokens for length in shortest)
    if longer:
        warnings.warn(
            f"{longer} of {len(examples)} examples have gold answers longer than {max_new_tokens} new tokens (up to "
            f"{max(shortest)}): their exact match cannot be 1; raise --max-new-tokens (max_new_tokens)",
            stacklevel=3,
        )


def summary_table(answers: pd.DataFrame, *, metrics: Sequence[Named], seed: int = 0) -> pd.DataFrame:
    """One row per intervention and metric of a table of answers in which "none" is the model as it is.

    Columns: intervention, metric, n (answers that have a score), missing (that have none), same (left out too, as a
    gold answer is also what memory says), mean, low, high (its 95 % interval), and against "none", paired by example:
    drop (by how much the mean is lower than unmasked), drop_low, drop_high, cohens_d (the drop in standard deviations
    over examples), p_value (permutation test), q_value (corrected for the number of interventions, Benjamini-Hochberg).
    """
    parts = {name: part.reset_index(drop=True) for name, part in answers.groupby("intervention", sort=False)}
    rows = []
    for metric in metrics_named(metrics):
        for name, part in parts.items():
            counted = part[~part["same"]] if metric.name in OF_MEMORY else part
            row = {"intervention": name, "metric": metric.name} | _mean(counted[metric.name], metric.bounds, seed)
            row["same"] = len(part) - len(counted)
            if name != UNMASKED and metric.paired:
                before, after = parts[UNMASKED][metric.name], part[metric.name]
                row |= _drop(before, after, metric.bounds_of_difference, seed)
            rows.append(row)
    columns = ["intervention", "metric", "n", "missing", "same", "mean", "low", "high"]
    if len(parts) == 1:
        return pd.DataFrame(rows, columns=columns)
    table = pd.DataFrame(rows, columns=[*columns, "drop", "drop_low", "drop_high", "cohens_d", "p_value"])
    return table.assign(q_value=table.groupby("metric")["p_value"].transform(q_values))


def q_values(p_values: pd.Series) -> pd.Series:
    """The p-values corrected for their number (Benjamini-Hochberg), missing ones left out."""
    known = p_values.dropna()
    return pd.Series(benjamini_hochberg(known) if len(known) else [], index=known.index, dtype=float).reindex(
        p_values.index
    )


def summarise(
    answers: pd.DataFrame, unmasked: pd.DataFrame | None = None, *, seed: int = 0
) -> dict[str, float | int | None]:
    """n, em with its 95 % interval, f1, memory and memory_ratio; against `unmasked`, em_drop, cohens_d, p_value.

    The answers are paired with the unmasked ones, example by example, for the drop's interval, its size in standard
    deviations and the permutation test.

    `memory` and `memory_ratio` are None where no example has the score.
    """
    em = bootstrap_interval(answers["em"].to_numpy(), bounds=(0, 1), seed=seed)
    summary = {
        "n": len(answers),
        "em": em.mean,
        "em_low": em.low,
        "em_high": em.high,
        "f1": float(answers["f1"].mean()),
        **{name: None if answers[name].isna().all() else float(answers[name].mean()) for name in OF_MEMORY},
    }
    if unmasked is not None:
        drop = _drop(unmasked["em"].reset_index(drop=True), answers["em"].reset_index(drop=True), (-1, 1), seed)
        summary |= {name if name in ("cohens_d", "p_value") else f"em_{name}": value for name, value in drop.items()}
    return summary


def _mean(scores: pd.Series, bounds: Bounds | None, seed: int) -> dict[str, float | int]:
    known = scores.dropna().to_numpy()
    row: dict[str, float | int] = {"n": len(known), "missing": len(scores) - len(known)}
    if len(known):
        interval = bootstrap_interval(known, bounds=bounds, seed=seed)
        row |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return row


def _drop(before: pd.Series, after: pd.Series, bounds: Bounds | None, seed: int) -> dict[str, float]:
    """How much lower scores are after than before, over the examples that have both."""
    both = before.notna() & after.notna()
    if not both.any():
        return {}
    found = compare(before[both].to_numpy(), after[both].to_numpy(), bounds=bounds, seed=seed)
    interval = found.difference
    return {
        "drop": interval.mean,
        "drop_low": interval.low,
        "drop_high": interval.high,
        "cohens_d": found.cohens_d,
        "p_value": found.p,
    }


def _answers(
    template: PromptTemplate,
    examples: Sequence[Example],
    found: Mapping[tuple[str, str], Sequence[Any]],
    names: Sequence[str],
    metrics: Sequence[Metric],
    judge: Judge | None,
) -> pd.DataFrame:
    tables = []
    for name in names:
        texts = found.get((name, PREDICTION), [None] * len(examples))
        table = pd.DataFrame({"intervention": name} | _asked(examples) | {"prediction": texts})
        if template.answer_after:
            table["answered"] = [None if text is None else template.answered(text) for text in texts]
            if name == UNMASKED:
                _tell_unmarked(template, texts)
        golds = without_reasoning(examples, template)
        table["same"] = _same(golds)
        for metric in metrics:
            if metric.reads == JUDGE and judge is not None:
                verdicts = judge.verdicts(golds, [template.answered(text) or "" for text in texts])
                table[metric.name] = metric.scores([verdict.right for verdict in verdicts], examples)
                table["unjudged"] = [verdict.failure for verdict in verdicts]
            else:
                table[metric.name] = scores(metric, found[name, metric.reads], examples, template)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _asked(examples: Sequence[Example]) -> dict[str, list[str | None]]:
    """What tables of answers say of the examples; of several right answers all, with " | " between them."""
    return {
        "id": [example.id for example in examples],
        "question": [example.question for example in examples],
        "gold": [" | ".join(example.answers) for example in examples],
        "original_answer": [example.original_answer for example in examples],
    }


def _tell_unmarked(template: PromptTemplate, texts: Sequence[str | None]) -> None:
    """Warn of the model's own answers that never come to what `answer_after` matches, and so are scored as none."""
    said = [text for text in texts if text is not None]
    unmarked = sum(template.answered(text) is None for text in said)
    if unmarked:
        warnings.warn(
            f"{unmarked} of {len(said)} answers have nothing that --answer-after {template.answer_after!r} matches "
            "and count as none: raise --max-new-tokens (max_new_tokens), or give another expression",
            stacklevel=2,
        )


def _same(examples: Sequence[Example]) -> list[bool]:
    return [same_as_memory(example) for example in examples]


def _several(given: Intervention | Sequence[Intervention]) -> tuple[Intervention, ...]:
    return (given,) if isinstance(given, Intervention) else tuple(given)


def _check(
    lens: MoELens,
    examples: Sequence[Example],
    named: Mapping[str, Sequence[Intervention]],
    metrics: Sequence[Metric],
    judge: Judge | None,
    given: Mapping[str, object],
) -> None:
    """MoELensError for what `evaluate` cannot do, before anything is computed."""
    if not examples:
        raise MoELensError("there is nothing to evaluate: expected one or more examples")
    if not all(isinstance(example, Example) for example in examples):
        raise MoELensError(
            "answers are scored against an Example's own, and bare texts have none; make Example(id=…, context='', "
            "question=…, answers=(…,)) of each, or take lens.generate(texts)"
        )
    if UNMASKED in given:
        raise MoELensError(f"{UNMASKED!r} is the model as it is; give that intervention another name")
    if lens.interventions:
        raise MoELensError("evaluate names its interventions itself; call it outside `with lens.intervene(...)`")
    for interventions in named.values():
        check_interventions(tuple(interventions), lens.architecture)
    check_metrics(metrics, examples, judge)


def check_metrics(metrics: Sequence[Metric], examples: Sequence[Example], judge: Judge | None) -> None:
    """MoELensError for metrics that lack a package, their data, options or a judge."""
    of_options = [metric.name for metric in metrics if metric.reads == OPTIONS]
    if of_options and not any(example.options for example in examples):
        raise MoELensError(f"{', '.join(of_options)} needs multiple-choice examples; none of these has options")
    of_rivals = [metric.name for metric in metrics if metric.reads == RIVALS]
    if of_rivals and not any(example.memory for example in examples):
        raise MoELensError(f"{', '.join(of_rivals)} needs examples with an original_answer; none of these has one")
    if judge is None and any(metric.reads == JUDGE for metric in metrics):
        raise MoELensError("acc_llm asks a judge; give one: --judge and --judge-model, or judge=Judge(…) in Python")
    for metric in metrics:
        metric.prepare()


def _provenance(lens: MoELens, examples: Sequence[Example], out: Path | None) -> dict[str, Any]:
    """Of parts whose caller gave none; empty where no parts are kept."""
    if out is None:
        return {}
    return provenance(model=lens.name, data=examples, facts={"weights": weights_digest(lens.module)})
