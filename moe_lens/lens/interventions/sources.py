"""Runs whose values are put into another run: on paired examples, matched by id and position."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from moe_lens.data import Batch, Example, PromptTemplate, without_context
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions.layer_values import Site
from moe_lens.lens.interventions.protocol import Intervention
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.routing import contribution


class Runs(Protocol):
    """What a source needs of a lens."""

    module: nn.Module

    @property
    def template(self) -> PromptTemplate: ...

    def records(
        self,
        examples: Any,
        *,
        capture: Collection[str],
        positions: Any,
        with_answer: bool,
        batch_size: int | None,
        progress: bool | None,
    ) -> Iterator[Record]: ...

    def at_rest(self) -> AbstractContextManager[Any]: ...

    def intervene(self, *interventions: Intervention) -> AbstractContextManager[Any]: ...


class Source(Protocol):
    """Another run, whose values `Patch` and `Replay` take; digest: what tells it from others."""

    @property
    def digest(self) -> str: ...

    def records(
        self, batch: Batch, capture: Collection[str], positions: Positions | Set[Positions]
    ) -> Sequence[Record]:
        """What the run shows on the examples of a batch, matched by id."""


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A run of examples through a lens: the same model's or another's, whose values `Patch` and `Replay` take.

    examples: of the same ids as those that are run under the intervention, such as the same questions with another
    context. They are run when their batch's turn comes, so that memory does not grow with their number.
    under: interventions that this run is under; those in force on the lens do not act in it.
    with_answer: whether answers are appended to these examples where the batch has them too.
    """

    lens: Runs
    examples: Sequence[Example]
    under: tuple[Intervention, ...] = ()
    with_answer: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", tuple(self.examples))
        if not self.examples:
            raise MoELensError("a run needs examples, one for each that is to be patched")
        if len(self._by_id) != len(self.examples):
            raise MoELensError("the examples of a run are matched by id; some of these have the same")

    def __repr__(self) -> str:
        under = f", under {', '.join(map(repr, self.under))}" if self.under else ""
        return f"Run({len(self.examples)} examples{under})"

    @cached_property
    def digest(self) -> str:
        """What tells the run from others: weights, examples, how they are asked, and what it is under."""
        asked = self.examples, self.lens.template.facts(), self.with_answer
        told = weights_digest(self.lens.module), asked, [own.digest for own in self.under]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def of(self, ids: Iterable[str]) -> list[Example]:
        """Its examples of these ids; MoELensError, naming it, for one that it lacks."""
        ids = tuple(ids)
        lacking = [name for name in ids if name not in self._by_id]
        if lacking:
            raise MoELensError(
                f"the run that values are taken from has no example {lacking[0]!r}; give one for each that is run"
            )
        return [self._by_id[name] for name in ids]

    def records(
        self, batch: Batch, capture: Collection[str], positions: Positions | Set[Positions]
    ) -> Sequence[Record]:
        """What the run shows on the examples of a batch, each once, in any order; as `of` for one that it lacks."""
        asked = self.of(dict.fromkeys(batch.ids))  # a batch has an example once for each text that it is given for it
        with self.lens.at_rest(), self.lens.intervene(*self.under):
            return list(
                self.lens.records(
                    asked,
                    capture=capture,
                    positions=positions,
                    with_answer=self.with_answer and batch.labels is not None,
                    batch_size=len(asked),
                    progress=False,
                )
            )

    @cached_property
    def _by_id(self) -> Mapping[str, Example]:
        return {example.id: example for example in self.examples}


@dataclass(frozen=True, eq=False, repr=False)
class Remembered(Run):
    """A run that remembers what the last batch showed, for many patches of that batch one after another.

    at: all positions that any of them takes values from.
    """

    at: frozenset[Positions] = frozenset({"all"})

    def records(
        self, batch: Batch, capture: Collection[str], positions: Positions | Set[Positions]
    ) -> Sequence[Record]:
        asked = batch.ids, tuple(capture), batch.labels is not None
        if asked not in self._last:
            self._last.clear()  # before the next is there, so that memory never holds two
            self._last[asked] = super().records(batch, capture, self.at)
        return self._last[asked]

    @cached_property
    def _last(self) -> dict[Any, Sequence[Record]]:
        return {}


def values_at(record: Record, site: Site, layer: int) -> Tensor:
    """What a record holds of a site in a layer, [batch, row, d_model]."""
    if site.name != "expert_outputs":
        found: Tensor = record.captured[site.name][layer]
        return found
    routing, kept = record.routing[layer], record.kept.to(record.routing[layer].indices.device)
    indices, weights = (part.index_select(1, kept) for part in (routing.indices, routing.weights))
    return contribution(indices, weights, record.expert_outputs[layer], site.chosen(layer))


def mean_values(
    lens: Runs, examples: Sequence[Example], *, what: str = "residual", positions: Positions = "all"
) -> dict[int, Tensor]:
    """The mean over examples' positions of what a lens has at one of `SITES`, by layer, float32 [d_model]."""
    site = Site(what)
    captures = ("routing", "expert_outputs") if what == "expert_outputs" else (what,)
    total: dict[int, Tensor] = {}
    count = 0
    for record in lens.records(
        examples, capture=captures, positions=positions, with_answer=False, batch_size=None, progress=None
    ):
        kept = record.kept_mask(positions)
        count += int(kept.sum())
        for layer in record.captured[captures[-1]]:
            values = values_at(record, site, layer)
            counted = values[kept.to(values.device)].double().sum(0)
            total[layer] = total[layer] + counted if layer in total else counted
    if not count:
        raise MoELensError(f"there is no position {positions!r} in these examples to take means over")
    return {layer: (summed / count).float() for layer, summed in total.items()}


def context_vectors(
    lens: Runs, examples: Sequence[Example], *, what: str = "residual", positions: Positions = "last"
) -> dict[int, Tensor]:
    """What a context adds to the values at one of `SITES`, by layer, float32 [d_model].

    The mean over the examples' positions with their context minus the mean without it: contrastive activation addition
    where it is put into `AddVector(layer, vector)`. MoELensError for an example that has no context.
    """
    bare = []
    for example in examples:
        without = without_context(example)
        if without is None:
            raise MoELensError(f"example {example.id!r} has no context to leave out; give examples that all have one")
        bare.append(without)
    given = mean_values(lens, examples, what=what, positions=positions)
    alone = mean_values(lens, bare, what=what, positions=positions)
    return {layer: given[layer] - alone[layer] for layer in given}
