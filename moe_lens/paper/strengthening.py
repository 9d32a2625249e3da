"""How ways to make an untuned model read its context do: biased experts, vectors, decoding, and pairs of these.

Each family is a list of points, a strength each; dev chooses one of them, and the test questions are answered with that
one, with random ones like it, and with the model as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moe_lens.causal.evaluation import UNMASKED, evaluate
from moe_lens.choosing.doses import Candidate, dose_table
from moe_lens.data import Example, load_examples
from moe_lens.decoding import CAD, PLAIN, AdaCAD, Decoding
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import (
    AddVector,
    Bias,
    Intervention,
    LogitBias,
    context_vectors,
    load_intervention,
)
from moe_lens.lens.lens import MoELens
from moe_lens.paper.finders import ALSO, SPARED, TARGETS
from moe_lens.results import provenance
from moe_lens.tuning import Schedule, tune
from moe_lens.tuning.router_bias import TuneBias

SPARE = ("closed_book",)
"""What has to be kept where a strength is chosen; a model that reads answers `consistent` no better than it reads."""
PLACE: dict[str, Any] = {"positions": "from_question"}
"""Where all of them act: from the question on, answers included."""
BIASES = (2.0, 3.0, 4.0, 5.0, 7.0)
SCALES = (1.0, 2.0, 3.0)
FACTORS = (0.25, 0.5, 0.75, 1.0)
"""Of a trained bias."""
ALPHAS = (0.5, 1.0, 2.0, 4.0)
PLUS = (0.0, 0.5, 1.0)
PAIRED = (0.5, 1.0)
"""CAD's alphas beside another one."""


@dataclass(frozen=True)
class Point:
    """One strength of one way. of: the way; distance: from doing nothing; acts: what is in force; decoding: answers."""

    of: str
    told: str
    distance: float
    acts: tuple[Intervention, ...] = ()
    decoding: Decoding = PLAIN

    @property
    def name(self) -> str:
        return f"{self.of} {self.told}"

    def with_decoding(self, decoding: Decoding) -> "Point":
        more = float(str(decoding).partition(":")[2])
        name = f"{self.of} + {str(decoding).partition(':')[0]}"
        return replace(self, of=name, told=f"{self.told}, {more:g}", distance=self.distance + more, decoding=decoding)

    def random_like(self, number: int, n_experts: int) -> "Point":
        """The same with other experts, or another direction as long."""
        acts = tuple(random_like(one, number, n_experts) for one in self.acts)
        return replace(self, of=f"random like {self.of}", told=f"{self.told}#{number}", acts=acts)


def random_like(act: Intervention, number: int, n_experts: int) -> Intervention:
    """A bias on as many random experts of each layer, trained biases in random order, or a random vector as long."""
    if isinstance(act, Bias):
        return replace(act, experts=ExpertSet.random_like(act.experts, number, n_experts=n_experts))
    drawn = torch.Generator().manual_seed(number)
    if isinstance(act, LogitBias):
        mixed = {layer: own[torch.randperm(len(own), generator=drawn)] for layer, own in act.biases.items()}
        return replace(act, biases=mixed)
    if isinstance(act, AddVector):
        other = torch.randn(act.vector.shape, generator=drawn)
        return replace(act, vector=other * act.vector.norm() / other.norm())
    raise MoELensError(f"expected a bias or a vector to draw a random one like it; got {act!r}")


def biased(name: str, experts: ExpertSet) -> list[Point]:
    return [Point(f"bias, {name}", f"{dose:g}", dose, (Bias(experts, dose, **PLACE),)) for dose in BIASES]


def trained_biases(bias: LogitBias, name: str = "trained bias") -> list[Point]:
    return [Point(name, f"{factor:g}", factor, (bias.scaled(factor),)) for factor in FACTORS]


def vectors(lens: MoELens, examples: Sequence[Example]) -> list[Point]:
    found = context_vectors(lens, examples)
    return [
        Point("vector", f"layer {layer}, {scale:g}", scale, (AddVector(layer, vector, scale, **PLACE),))
        for layer, vector in found.items()
        for scale in SCALES
    ]


def decodings() -> list[Point]:
    cad = [Point("CAD", f"{alpha:g}", alpha, decoding=CAD(alpha)) for alpha in ALPHAS]
    return [*cad, *(Point("AdaCAD", f"{plus:g}", plus, decoding=AdaCAD(plus)) for plus in PLUS)]


def pairs(table: pd.DataFrame, points: Sequence[Point]) -> list[Point]:
    """CAD beside the best biases and the best vectors by dev: of each kind the three with the highest target.

    table: of `dose_table`, of the points alone.
    """
    target = table[table["role"] == "target"].groupby("intervention")["em"].mean()
    kept_all = table[table["role"] == "spared"].groupby("intervention")["keeps"].agg(lambda own: all(own))
    found = []
    for start in ("bias, ", "vector"):
        own = [point for point in points if point.of.startswith(start) and kept_all[point.name]]
        best = sorted(own, key=lambda point: -target[point.name])[:3]
        both = [replace(point, of=start.strip(", "), told=point.name) for point in best]
        found += [point.with_decoding(CAD(alpha)) for point in both for alpha in PAIRED]
    return found


@dataclass(frozen=True)
class Strengthening:
    """One pretrained model. limits: examples by split, "train", "dev", "test" and "other" (test of all but swap)."""

    model: str
    out: Path
    limits: Mapping[str, int]

    @cached_property
    def lens(self) -> MoELens:
        return MoELens.from_pretrained(self.model)

    def examples(self, task: str, split: str) -> Sequence[Example]:
        limit = self.limits["other" if split == "test" and task != "swap" else split]
        return load_examples(task, split=split, limit=limit)

    def made_by(self, task: str, split: str, seed: int | None = None) -> dict[str, Any]:
        facts = {"part": "strengthening", "weights": weights_digest(self.lens.module)}
        return provenance(model=self.model, data=self.examples(task, split), seed=seed, facts=facts)

    def trained_bias(self, seed: int, schedule: Schedule, rate: float) -> LogitBias:
        """A number for each expert, learnt on the swap training examples."""
        folder = self.out / f"bias-{seed}"
        if not folder.exists():
            train = self.examples("swap", "train")
            method = TuneBias(**PLACE)
            tuned = tune(self.lens, train, [], method, replace(schedule, seed=seed, learning_rate=rate))
            if tuned.trained.added is None:
                raise MoELensError("training left no bias")
            tuned.trained.added.intervention().save(folder)
        found = load_intervention(folder)
        if not isinstance(found, LogitBias):
            raise MoELensError(f"{folder} holds {found!r}, no bias; remove it")
        return found

    def answers(self, points: Iterable[Point], split: str, tasks: Sequence[str]) -> pd.DataFrame:
        """Answers to each task under each point, and by the model as it is, with a column task."""
        ways: dict[str, list[Point]] = {str(PLAIN): []}
        for point in points:
            ways.setdefault(str(point.decoding), []).append(point)
        parts = []
        for task in tasks:
            for own in ways.values():
                parts.append(self._answers(own, task, split).assign(task=task))
        return pd.concat(parts, ignore_index=True)

    def _answers(self, points: Sequence[Point], task: str, split: str) -> pd.DataFrame:
        """The same of one task, of points that share a decoding."""
        decoding = points[0].decoding if points else PLAIN
        alone = next((point.name for point in points if not point.acts), None)
        acting = {point.name: point.acts for point in points if point.acts}
        tokens = 32 if task == "summary" else 8
        found = evaluate(
            self.lens, self.examples(task, split), acting, max_new_tokens=tokens, batch_size=96, decoding=decoding,
            out=self.out, made_by=self.made_by(task, split),
        ).answers  # fmt: skip
        if decoding == PLAIN:
            return found
        found = found[(found["intervention"] != UNMASKED) | (alone is not None)]
        return found.replace({"intervention": {UNMASKED: alone}})

    def chosen(self, points: Sequence[Point]) -> tuple[pd.DataFrame, list[Point]]:
        """`dose_table` of the points on dev, and those that it chooses."""
        answers = self.answers(points, "dev", (*TARGETS, *SPARE))
        among = [Candidate(point.name, point.of, point.distance, point.distance) for point in points]
        table = dose_table(answers, among, targets=TARGETS, spared=SPARE)
        names = set(table.loc[table["chosen"], "intervention"])
        return table, [point for point in points if point.name in names]

    def test(self, chosen: Sequence[Point], n_random: int) -> pd.DataFrame:
        """The one look at test: answers under what was chosen, random ones like it, and by the model as it is."""
        n_experts = self.lens.architecture.n_experts
        drawn = [one.random_like(number, n_experts) for one in chosen if one.acts for number in range(n_random)]
        own = self.answers(chosen, "test", (*TARGETS, *SPARED, *ALSO))
        random = self.answers(drawn, "test", ("swap", "closed_book"))
        return pd.concat([own, random[random["intervention"] != UNMASKED]], ignore_index=True)
