"""The causal effect of every single expert: what changing it costs the right answer, or any other score."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.outputs import READINGS, Run, predictions, scores
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import Intervention, Mode, Rows, parse_mode
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import connected, gathered, kept_by_all, part_of_work
from moe_lens.metrics import (
    UNBOUNDED,
    benjamini_hochberg,
    bootstrap_interval,
    cohens_d,
    metrics_named,
    permutation_p_values,
)
from moe_lens.metrics.bounds import Bounds
from moe_lens.metrics.catalogue import JUDGE, OPTIONS, PREDICTION, RIVALS, Metric, Named, expect_single
from moe_lens.metrics.resampling import bounds_of_differences
from moe_lens.progress import progress_bar
from moe_lens.results import provenance
from moe_lens.storage import as_json, try_folder

Expert = tuple[int, int]
Change = Callable[[ExpertSet], Intervention]
UNMASKED = "none"
ENDED_ANSWER = "answer with its end"
WITH_END = Metric(
    "log_probability", "log-probability (nats) of the first gold answer, end-of-sequence included", "this package",
    ENDED_ANSWER, lambda found, example: found, bounds=UNBOUNDED,
)  # fmt: skip


def single_expert_effects(
    lens: MoELens,
    examples: Sequence[Example],
    *,
    mode: str | Mode | Change = "zero",
    metric: Named = WITH_END,
    only: Sequence[Expert] | None = None,
    max_new_tokens: int = 16,
    batch_size: int | None = None,
    out: Path | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per expert: layer, expert, effect, effect_low, effect_high, cohens_d, p_value, q_value.

    effect: the mean over examples of how far the metric falls when this one expert is changed; with its 95 %
    interval. Negative where it rises. Examples of which the metric is not defined are left out.
    cohens_d: the effect in standard deviations over examples. p_value: of the paired permutation test of no effect.
    q_value: p_value corrected for the number of experts (Benjamini-Hochberg): of the experts with q <= 0.05, some 5 %
    at most are expected to have no effect.
    Measured by intervention alone, without a score; what pretraining planted shows in it too.

    mode: a word such as zero, reroute or bias:2, a `Mode` of one strength, or a function from an `ExpertSet` to an
        intervention, such as `Zero`. It acts in addition to what is in force.
    metric: a name of `metrics.METRICS`, such as logit_difference, or a function of one's own, as in `evaluate`; by
        default the log-probability (nats) of the first gold answer, end-of-sequence included. Metrics of
        log-probabilities take a fraction of one whole run for each expert, see `lens.answer_log_probabilities_under`;
        those of generated answers (of at most max_new_tokens) take whole runs.
    only: the experts to measure, (layer, expert) each; by default all.
    out: folder in which finished parts of the work are kept: the same call goes on where an interrupted one stopped.

    Under torchrun or `accelerate launch` the processes share the work, and each gets the whole table.
    """
    [scored] = metrics_named([metric])
    batch_size = lens.batch_size if batch_size is None else batch_size
    shown = lens.progress if progress is None else progress
    sweep = _Sweep(lens, scored, _changes(lens, mode, only), Run(max_new_tokens, batch_size, out, {}, shown))
    _check(lens, examples, scored)
    scores = sweep.scores(examples)
    drops = scores[:, :1] - scores[:, 1:]
    defined = ~np.isnan(drops).any(1)
    if not defined.any():
        raise MoELensError(f"{scored.name} is defined for none of the examples; choose another metric, or other data")
    bounds = scored.bounds_of_difference or bounds_of_differences(scores[defined])
    return pd.DataFrame(list(sweep.changes), columns=["layer", "expert"]).join(_effects(drops[defined], bounds, seed))


def _changes(lens: MoELens, mode: str | Mode | Change, only: Sequence[Expert] | None) -> dict[Expert, Intervention]:
    """What is done to each expert, by layer and expert; MoELensError for a mode that is not of one intervention."""
    if not callable(mode):
        parsed = parse_mode(mode)
        if len(parsed.doses) != 1 or not parsed.needs_experts:
            raise MoELensError(f"a sweep changes one expert at a time, at one strength, such as bias:2; got {parsed}")
        return _changes(lens, lambda experts: parsed.on(experts, parsed.doses[0]), only)
    every = [(layer, e) for layer in lens.architecture.moe_layers for e in range(lens.architecture.n_experts)]
    unknown = [one for one in only or () if one not in every]
    if unknown or only == []:
        raise MoELensError(f"only= takes experts of the model, (layer, expert) each, one or more; got {unknown}")
    wanted = every if only is None else [one for one in every if one in set(only)]
    return {(layer, expert): mode(ExpertSet.of({layer: [expert]})) for layer, expert in wanted}


def _check(lens: MoELens, examples: Sequence[Example], metric: Metric) -> None:
    """MoELensError for what cannot be swept, before anything runs."""
    lacks = {
        OPTIONS: "multiple-choice examples" if not any(example.options for example in examples) else "",
        RIVALS: "examples with an original_answer" if not any(example.memory for example in examples) else "",
        JUDGE: "a judge, who is not asked about each expert; choose another metric",
    }.get(metric.reads, "")
    if not examples or lacks:
        raise MoELensError(f"{metric.name} needs {lacks or 'one or more examples'}")
    expect_single(metric)
    if not metric.paired:
        raise MoELensError(f"{metric.name} is of other examples under each mask; choose one of all, such as memory")
    if any(isinstance(own, Rows) for own in lens.interventions):
        raise MoELensError("a sweep runs examples in an order of its own, which Rows in force would not follow")
    metric.prepare()


@dataclass(frozen=True)
class _Sweep:
    """A score of every example under each of many changes."""

    lens: MoELens
    metric: Metric
    changes: Mapping[Expert, Intervention]
    run: Run

    def scores(self, examples: Sequence[Example]) -> np.ndarray:
        """The scores [example, 1 + change], unchanged first; by all processes, in parts of one batch."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].context) - len(examples[i].question))
        size = self.run.batch_size
        shares = [order[start : start + size] for start in range(0, len(order), size)]
        start, of = part = part_of_work(self.lens.module)
        if self.run.out is not None and connected().is_main_process:
            try_folder(self.run.out)
        made_by = self._made_by(examples)
        mine = range(start, len(shares), of)
        found = ((number, self._part(number, [examples[i] for i in shares[number]], made_by)) for number in mine)
        whole = np.full((len(examples), 1 + len(self.changes)), np.nan)
        for number, scores_of in gathered(found, part):
            whole[shares[number]] = scores_of
        return whole

    def _part(self, number: int, examples: Sequence[Example], made_by: dict[str, Any]) -> np.ndarray:
        """The scores of some examples, [example, 1 + change], by what is read: where it is kept, else of the model.

        What is kept are no scores: of a metric of one's own the name does not tell what it computes.
        """
        path = None
        if self.run.out is not None:
            told = {name: fact for name, fact in made_by.items() if name != "command"}
            digest = hashlib.sha256(as_json(told).encode()).hexdigest()[:16]
            path = self.run.out / "parts" / f"effects-{digest}-{number:05}.parquet"
        names = [UNMASKED, *(f"{layer}:{expert}" for layer, expert in self.changes)]
        table = kept_by_all(
            path,
            made_by,
            lambda: pd.DataFrame(dict(zip(names, self._values(examples), strict=True))),
            self.lens.module,
        )
        read = table.map(lambda value: tuple(value) if isinstance(value, list | np.ndarray) else value)
        found = [scores(self.metric, read[name], examples, self.lens.template) for name in names]
        return np.stack([np.array(of_change, dtype=float) for of_change in found], axis=1)

    def _values(self, examples: Sequence[Example]) -> list[list[Any]]:
        """What the metric reads of each example, unchanged and under each change, [1 + change][example]."""
        masks: list[Sequence[Intervention]] = [(), *((change,) for change in self.changes.values())]
        asked: dict[str, Any] = {"batch_size": self.run.batch_size, "progress": self.run.progress}
        if self.metric.reads in READINGS:
            return READINGS[self.metric.reads].under(self.lens, examples, masks, **asked)
        if self.metric.reads == ENDED_ANSWER:
            return self.lens.answer_log_probabilities_under(examples, masks, **asked)
        said = []
        for mask in progress_bar(masks, desc="changing each expert", unit="expert", disable=not self.run.progress):
            with self.lens.intervene(*mask):
                said.append(predictions(self.lens, examples, self.run))
        return said

    def _made_by(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Of parts; empty where none are kept."""
        if self.run.out is None:
            return {}
        digests = [own.digest for own in (*self.lens.interventions, *self.changes.values())]
        facts = {
            "weights": weights_digest(self.lens.module),
            "changes": hashlib.sha256(as_json(digests).encode()).hexdigest(),
            "read": self.metric.reads,
            "template": self.lens.template.facts(),
            "batch_size": self.run.batch_size,
            "max_new_tokens": self.run.max_new_tokens if self.metric.reads == PREDICTION else None,
        }
        return provenance(model=self.lens.name, data=examples, facts=facts)


def _effects(drops: np.ndarray, bounds: Bounds, seed: int) -> pd.DataFrame:
    """The effects' columns of `single_expert_effects` for drops [example, expert]."""
    intervals = [bootstrap_interval(drop, bounds=bounds, resamples=2000, seed=seed) for drop in drops.T]
    p_values = permutation_p_values(drops, seed=seed)
    return pd.DataFrame(
        {
            "effect": [interval.mean for interval in intervals],
            "effect_low": [interval.low for interval in intervals],
            "effect_high": [interval.high for interval in intervals],
            "cohens_d": [cohens_d(drop) for drop in drops.T],
            "p_value": p_values,
            "q_value": benjamini_hochberg(p_values),
        }
    )
