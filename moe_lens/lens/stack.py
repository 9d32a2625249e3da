"""The interventions in force on a model: which, for which batch, and when none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from moe_lens.architecture import MoEArchitecture
from moe_lens.data import Batch
from moe_lens.lens.acting import Acting
from moe_lens.lens.interventions import Intervention, check_interventions
from moe_lens.lens.reader import TraceReader


class InterventionStack(Acting):
    """The interventions in force, from the outermost block to the innermost, in which order they act.

    interventions: as they were given; a new tuple whenever they change.
    """

    def __init__(self, architecture: MoEArchitecture) -> None:
        super().__init__(architecture)
        self.interventions: tuple[Intervention, ...] = ()
        self._acting: tuple[Intervention, ...] = ()

    def __reduce__(self) -> tuple[type[Acting], tuple[Any, ...]]:
        """What travels to a server that runs the model: what acts there on this batch."""
        return Acting, (self._architecture, self._acting_in, self._batch, self.before is not None)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that any of them acts on, in rising order."""
        return tuple(sorted({layer for own in self.interventions for layer in own.layers_in(self._architecture)}))

    @contextmanager
    def adding(self, interventions: Sequence[Intervention]) -> Iterator[None]:
        """Inside the block these are in force too; MoELensError if the model cannot be put under them."""
        outer = self.interventions
        together = (*outer, *interventions)
        check_interventions(together, self._architecture)
        self.interventions = together
        try:
            with self._act(together):
                yield
        finally:
            self.interventions = outer

    @contextmanager
    def for_examples(self, places: Sequence[int]) -> Iterator[None]:
        """Inside the block, interventions that differ by example are those of the examples at `places`."""
        taken = tuple(own.take(places) for own in self.interventions)
        if all(mine is own for mine, own in zip(taken, self._acting, strict=True)):
            yield  # nothing differs by example
            return
        with self._act(taken):
            yield

    @contextmanager
    def resumed_at(self, layer: int) -> Iterator[None]:
        """Inside the block nothing acts before `layer`, where a pass is resumed that has had it before."""
        outer = self._acting_in
        self._acting_in = {later: acting for later, acting in outer.items() if later >= layer}
        try:
            yield
        finally:
            self._acting_in = outer

    @contextmanager
    def for_batch(self, batch: Batch, reader: TraceReader) -> Iterator[None]:
        """Inside the block, this batch runs in the model that `reader` reads.

        MoELensError, naming the example, for one where nothing could act.
        """
        for own in self._acting:
            own.expect(batch)
        rows = range(len(batch.ids))
        prepared = {whose: what for own in self._acting for whose, what in own.prepare(batch, rows).items()}
        outer = self._batch, self._kept, self._prepared
        acting = self._acting, self._acting_in, self._asked
        self._batch, self._kept, self._prepared = batch, {}, prepared
        moe = self._architecture.moe_layers
        singly = [layer for layer in moe if any(map(_by_expert, self._acting_in.get(layer, ())))]
        try:
            with reader.watching_experts(singly):
                yield
        finally:
            self._batch, self._kept, self._prepared = outer
            self._acting, self._acting_in, self._asked = acting

    @property
    def rows_may_leave(self) -> bool:
        """Whether all that act do the same to a row when others have left its batch."""
        return all(own.lets_rows_leave for own in self._acting)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """From now on in this batch, whose prompts have been read, only these of its rows run."""
        assert self._batch is not None, "a batch runs"
        self._batch, self._kept = self._batch.of_rows(rows), {}
        taken = tuple(own.take(rows) for own in self._acting)
        if any(mine is not own for mine, own in zip(taken, self._acting, strict=True)):
            self._take_up(taken)

    @property
    def thoughts(self) -> tuple[int | None, ...]:
        """`Batch.thoughts` of the rows that run."""
        assert self._batch is not None, "a batch runs"
        return self._batch.thoughts

    def keep_thoughts(self, thoughts: Sequence[int | None]) -> None:
        """From now on in this batch, whose prompts have been read, its rows' answers begin after these many tokens."""
        assert self._batch is not None, "a batch runs"
        self._batch = replace(self._batch, thoughts=tuple(thoughts))

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside the block none of them acts."""
        outer = self.interventions
        self.interventions = ()
        try:
            with self._act(()):
                yield
        finally:
            self.interventions = outer

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the block, what runs leaves the routing from before the interventions in `before`, by layer."""
        self.before = {}
        try:
            yield
        finally:
            self.before = None

    @contextmanager
    def _act(self, interventions: tuple[Intervention, ...]) -> Iterator[None]:
        """Inside the block these act; what they ask is worked out once, not at every step."""
        outer = self._acting, self._acting_in, self._asked, self._kept
        self._take_up(interventions)
        self._kept = {}
        try:
            yield
        finally:
            self._acting, self._acting_in, self._asked, self._kept = outer

    def _take_up(self, interventions: tuple[Intervention, ...]) -> None:
        """From now on these act."""
        self._acting, self._acting_in, self._asked = interventions, {}, {}
        for own in interventions:
            for layer in own.layers_in(self._architecture):
                self._acting_in.setdefault(layer, []).append(own)


def _by_expert(own: Intervention) -> bool:
    """Whether an intervention changes what single experts put out."""
    return any(site.name == "expert_outputs" for site in own.sites)
