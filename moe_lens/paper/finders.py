"""How ways to find experts do on the organism: every score, and learned sets, under several tunings of the routers.

Where a score counts (its span, integrated or not) is chosen on dev questions; the test questions are asked once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import process_time
from typing import Any

import pandas as pd

from moe_lens.causal.evaluation import evaluate
from moe_lens.causal.sweep import single_expert_effects
from moe_lens.choosing.masking import Masked, joined, mask, named
from moe_lens.choosing.measuring import Models, score_tables
from moe_lens.choosing.planted import has_planted, planted_experts
from moe_lens.choosing.scores import Score
from moe_lens.choosing.search import Wanted, find_set
from moe_lens.choosing.selection import Choice, Planted
from moe_lens.choosing.verdicts import selectivity
from moe_lens.data import Example, load_examples
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.metrics import auc, rank_correlation
from moe_lens.results import kept, provenance

TARGETS, SPARED, ALSO = ("swap", "novel"), ("closed_book", "consistent"), ("hops", "summary")
"""Tasks that need reading, those that do not, and two more that read, on which no verdict is built."""
STRONGEST = "strongest"
"""What the experts with the largest exact effects on dev are called."""
LEARNED = {"set": ("swap", ())}
UNTUNED = {"set;spare, base": ("novel", ("closed_book",))}
"""Learned sets by name: the task to hurt and those to spare, on the tuned model and on the base model."""
ENDS = ("-from_question", "-question", "-last", "-all", "-mass", "-integrated")


def kind_of(name: str) -> str:
    """A finder's name without where it counts, which dev decides: what is compared in the end."""
    end = next((end for end in ENDS if name.endswith(end)), "")
    return kind_of(name.removesuffix(end)) if end else name


def best_of_kinds(dev: pd.DataFrame) -> list[str]:
    """Of the finders of each kind the one whose sets leave least on dev, mean over seeds; dev: finder, seed, em_dev."""
    left = dev.groupby("finder", sort=False)["em_dev"].mean()
    return [own.idxmin() for _, own in left.groupby(kind_of, sort=False)]


@dataclass(frozen=True)
class Sizes:
    """How much is asked. size: experts per layer; n_random: random sets; then examples.

    scored: what scores are measured on, dev: to choose by, test: of the task to be hit, other: of each other task.
    """

    size: int = 4
    n_random: int = 10
    scored: int | None = None
    dev: int | None = None
    test: int | None = None
    other: int | None = None
    searches: int = 3


@dataclass(frozen=True)
class Found:
    """A finder's experts. table: its score of every expert, None where it has none; seconds: of CPU, of its kind."""

    name: str
    experts: ExpertSet
    seconds: float = float("nan")
    table: pd.DataFrame | None = None

    @property
    def choice(self) -> Choice:
        return Choice(self.name, kind_of(self.name), self.experts)


@dataclass(frozen=True)
class Finding:
    """One pretrained model with several tunings of its routers. deltas: their folders by seed; out: keeps all parts."""

    model: str
    deltas: Mapping[int, Path]
    out: Path
    sizes: Sizes
    scores: Sequence[Score]

    @cached_property
    def base(self) -> MoELens:
        return MoELens.from_pretrained(self.model)

    @cached_property
    def planted(self) -> ExpertSet | None:
        return planted_experts(self.model) if has_planted(self.model) else None

    def examples(self, task: str, split: str) -> Sequence[Example]:
        first = self.sizes.test if task == "swap" else self.sizes.other
        limit = {"train": self.sizes.scored, "dev": self.sizes.dev, "test": first}[split]
        return load_examples(task, split=split, limit=limit)

    def made_by(self, part: str, task: str, split: str, seed: int | None) -> dict[str, Any]:
        """The provenance of a part; seed: of the tuned routers, None of the base model."""
        facts: dict[str, Any] = {"part": part, "weights": weights_digest(self.base.module)}
        facts |= {"size": self.sizes.size, "searches": self.sizes.searches}
        delta, asked = None if seed is None else self.deltas[seed], self.examples(task, split)
        return provenance(model=self.model, delta=delta, data=asked, seed=seed, facts=facts)

    def of_base(self) -> list[Found]:
        """What is found in the base model, once for all seeds."""
        own = [score for score in self.scores if not score.needs_tuned]
        return [*self._scored(own, self.base, None), *self._learned(UNTUNED, self.base, None)]

    def of_tuned(self, lens: MoELens, seed: int) -> list[Found]:
        """What is found in a tuned model, and the truth."""
        own = [score for score in self.scores if score.needs_tuned]
        planted = [] if self.planted is None else [Found(Planted.name, self.planted)]
        effects, size = self.effects(lens, seed), self.sizes.size
        strongest = Found(STRONGEST, ExpertSet.top(effects, size, score="effect"), effects["seconds"].iloc[0])
        return [*self._scored(own, lens, seed), *self._learned(LEARNED, lens, seed), strongest, *planted]

    def effects(self, lens: MoELens, seed: int) -> pd.DataFrame:
        """The exact effect of every single expert of a tuned model on dev."""
        dev = self.examples("swap", "dev")
        return self._timed("effects", "swap", "dev", seed, lambda: single_expert_effects(lens, dev))

    def dev(self, lens: MoELens, seed: int, found: Sequence[Found]) -> pd.DataFrame:
        """A row for each finder: how it agrees with both truths, and what its set, zeroed, leaves on dev."""
        dev, effects = self.examples("swap", "dev"), self.effects(lens, seed)
        asked = self._asked("dev", "swap", "dev", seed)
        answers = evaluate(lens, dev, named([one.choice for one in found], "zero"), **asked).answers
        left, rows = answers.groupby("intervention")["em"].mean(), []
        for one in found:
            row = {"seed": seed, "finder": one.name, "seconds": one.seconds, "em_dev": left[one.name]}
            if one.table is not None:
                row["spearman"] = rank_correlation(one.table, effects[["layer", "expert", "effect"]])
            if self.planted is not None:
                row["precision"] = len(one.experts & self.planted) / len(self.planted)
                row["auc"] = float("nan") if one.table is None else auc(one.table, self.planted)
            rows.append(row)
        return pd.DataFrame(rows)

    def test(self, lens: MoELens, seed: int, chosen: Sequence[Choice]) -> dict[str, pd.DataFrame]:
        """The one look at test: answers of every task under each set and random ones, and the verdicts.

        Where sets are to cost something else is looked at in the base model: tuning itself has lowered some of it.
        """
        zeroed: dict[str, Masked] = {}
        own: dict[str, Any] = {"seed": seed, "controls": self.sizes.n_random}
        for task in TARGETS:
            asked = self._asked("zero", task, "test", seed)
            zeroed[task] = mask(lens, self.examples(task, "test"), chosen, **asked, **own)
        for task in (*SPARED, *ALSO):
            asked = self._asked("zero", task, "test", None)
            zeroed[task] = mask(self.base, self.examples(task, "test"), chosen, controls=0, **asked)
        found = joined(zeroed)
        asked = self._asked("reroute", "swap", "test", seed)
        rerouted = mask(lens, self.examples("swap", "test"), chosen, "reroute", **asked, **own)
        verdicts = selectivity(found.answers, found.rows, targets=TARGETS, spared=SPARED)
        answers = pd.concat([found.answers.assign(mode="zero"), rerouted.answers.assign(mode="reroute", task="swap")])
        tables = {"answers": answers, "verdicts": verdicts, "rows": found.rows}
        return {name: table.assign(seed=seed) for name, table in tables.items()}

    def _asked(self, part: str, task: str, split: str, seed: int | None) -> dict[str, Any]:
        """How answers are asked for and kept."""
        tokens, made_by = 32 if task == "summary" else 8, self.made_by(part, task, split, seed)
        return {"max_new_tokens": tokens, "batch_size": 96, "out": self._folder(seed), "made_by": made_by}

    def _folder(self, seed: int | None) -> Path:
        return self.out / ("base" if seed is None else f"router-{seed}")

    def _timed(self, part: str, task: str, split: str, seed: int | None, make: Any) -> pd.DataFrame:
        """A table that is kept, with the CPU seconds that it took."""

        def made() -> pd.DataFrame:
            before = process_time()
            table: pd.DataFrame = make()
            return table.assign(seconds=process_time() - before)

        return kept(self._folder(seed) / f"{part}.parquet", self.made_by(part, task, split, seed), made)

    def _scored(self, scores: Sequence[Score], lens: MoELens, seed: int | None) -> list[Found]:
        """The highest experts of each score; those of a kind are measured, and timed, together."""
        train, models, found = self.examples("swap", "train"), Models.opened(self.base, lens), []
        kinds: dict[str, list[Score]] = {}
        for score in scores:
            kinds.setdefault(score.name if "(" in score.name else kind_of(score.name), []).append(score)
        for number, (kind, own) in enumerate(kinds.items()):

            def measured(own: Sequence[Score] = own) -> pd.DataFrame:
                tables = score_tables(own, models, train, load=lambda task: self.examples(task, "train"))
                return pd.concat([table.assign(name=name) for name, table in tables.items()], ignore_index=True)

            rows = self._timed(f"score-{number}-{kind.partition('(')[0]}", "swap", "train", seed, measured)
            for name, table in rows.groupby("name", sort=False):
                top = ExpertSet.top(table, self.sizes.size)
                found.append(Found(str(name), top, table["seconds"].iloc[0], table[["layer", "expert", "score"]]))
        return found

    def _learned(self, wanted: Mapping[str, tuple[str, Sequence[str]]], lens: MoELens, seed: int | None) -> list[Found]:
        """The sets that are learned as a whole."""
        found: list[Found] = []
        for name, (target, spared) in wanted.items():

            def learned(target: str = target, spared: Sequence[str] = spared) -> pd.DataFrame:
                spare = {task: self.examples(task, "train") for task in spared}
                asked, size = self.examples(target, "train"), Wanted(size=self.sizes.size)
                many, first = self.sizes.searches, seed or 0
                return find_set(lens, asked, size, spare=spare, seeds=many, seed=first, max_new_tokens=8).table

            part = f"learned-{len(found)}" + "".join(f"-sparing-{task}" for task in spared)
            rows = self._timed(part, target, "train", seed, learned)
            members = ExpertSet.of({layer: own["expert"] for layer, own in rows[rows["chosen"]].groupby("layer")})
            found.append(Found(name, members, rows["seconds"].iloc[0], rows[["layer", "expert", "score"]]))
        return found
