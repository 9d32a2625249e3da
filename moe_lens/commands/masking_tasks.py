"""The tasks of a masking command: those that shall be hit and those to spare, answered one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lens.causal.evaluation import evaluate
from moe_lens.choosing.controls import Controls
from moe_lens.choosing.masking import Masked, joined, mask
from moe_lens.choosing.selection import Choice
from moe_lens.commands import console
from moe_lens.data import Example
from moe_lens.data.lookup import names_in
from moe_lens.decoding import Decoding
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import Intervention, Mode
from moe_lens.lens.lens import MoELens
from moe_lens.metrics import Metric, bootstrap_interval
from moe_lens.results import data_digest


@dataclass(frozen=True)
class Tasks:
    """The data that --data (the targets) and --spare name; MoELensError for one that is named twice."""

    targets: tuple[str, ...]
    spared: tuple[str, ...]

    @classmethod
    def parse(cls, data: str, spare: str | None) -> "Tasks":
        found = cls(names_in(data), () if spare is None else names_in(spare))
        repeated = [name for name in found.all if found.all.count(name) > 1]
        if repeated:
            raise MoELensError(f"every task is either hit or spared, once; {repeated[0]!r} is named twice")
        return found

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.targets, *self.spared)

    def facts(self, examples: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
        """For the provenance: of more than one task which they are, with their examples."""
        if len(self.all) == 1:
            return {}
        digests = {task: data_digest(examples[task]) for task in self.all}
        return {"targets": self.targets, "spared": self.spared, "tasks": digests}


@dataclass(frozen=True)
class TaskRun:
    """What the answers of every task share: as `mask` takes them."""

    chosen: Sequence[Choice]
    mode: Mode
    saved: Mapping[str, Intervention]
    metrics: Sequence[Metric]
    controls: Controls
    max_new_tokens: int
    stop: Sequence[str]
    decoding: Decoding
    out: Path
    made_by: dict[str, Any]
    seed: int

    def on_all(
        self,
        lens: MoELens,
        base: Callable[[], MoELens] | None,
        examples: Mapping[str, Sequence[Example]],
        spared: Sequence[str],
    ) -> Masked:
        """What was found on every task, by its name.

        base: opens the model before tuning, where there is one: a spared task that tuning itself has lowered is
        measured on it, since there would be little left to lose.
        """
        found = {}
        for task, asked in examples.items():
            on = lens
            if base is not None and task in spared:
                before = base()
                before.batch_size = lens.batch_size
                on = before if self._is_lowered(task, lens, before, asked) else lens
            found[task] = self._on(on, asked, tuned=on is lens)
        return joined(found)

    def _on(self, lens: MoELens, examples: Sequence[Example], *, tuned: bool) -> Masked:
        found = mask(
            lens,
            examples,
            self.chosen,
            self.mode,
            saved=self.saved,
            metrics=self.metrics,
            controls=self.controls,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            decoding=self.decoding,
            out=self.out,
            made_by=self._made_by(lens, examples, tuned=tuned),
            seed=self.seed,
        )
        return replace(found, rows=found.rows.assign(measured_on="model" if tuned else "base"))

    def _is_lowered(self, task: str, lens: MoELens, base: MoELens, examples: Sequence[Example]) -> bool:
        """Whether the tuned model's EM is below the base's, by an interval over examples that is above 0."""
        scores = []
        for one in (lens, base):
            made_by = self._made_by(one, examples, tuned=one is lens) | self.mode.facts()
            answers = evaluate(
                one,
                examples,
                max_new_tokens=self.max_new_tokens,
                stop=self.stop,
                decoding=self.decoding,
                out=self.out,
                made_by=made_by,
            ).answers
            scores.append(answers["em"].to_numpy())
        lost = bootstrap_interval(scores[1] - scores[0], bounds=(-1, 1), seed=self.seed)
        if lost.low > 0:
            console.say(f"{task}: tuning lowered EM by {lost}; what it loses is measured on the base model")
        return lost.low > 0

    def _made_by(self, lens: MoELens, examples: Sequence[Example], *, tuned: bool) -> dict[str, Any]:
        """The provenance of one task's parts."""
        own = self.made_by | {"data": data_digest(examples)}
        return own if tuned else own | {"delta": None, "weights": weights_digest(lens.module)}
