"""The answers' log-probabilities under many masks at once: resumed where that is exact, else one whole run for each."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_lens.data import Encoded
from moe_lens.lens.interventions import Intervention, Rows
from moe_lens.lens.resumed import Plain, ResumedRunner, rows_of

Mask = tuple[Intervention, ...]
"""What acts together."""

EXACT = 1e-4
"""Nats by which a resumed run may differ from the whole one."""
TOGETHER = 4
"""Masks whose first layer is run in one batch."""
CHECKED = 4
"""Examples that a mask is run on in the plain way, to see whether resuming it is exact.

One of so many may differ by more: where two experts are all but tied, numbers that are summed in another order, as they
are in batches of other sizes too, select the other.
"""


class Resuming:
    """Runs batches of a lens under many masks; remembers by which kinds of masks resuming has been found exact."""

    def __init__(self, runner: ResumedRunner) -> None:
        self._runner, self._stack = runner, runner.stack
        self._exact: dict[frozenset[type], bool] = {}

    def answers_under(
        self, places: Sequence[int], prompts: Sequence[Encoded], masks: Sequence[Mask], done: Callable[[int], object]
    ) -> list[list[float]]:
        """The log-probability (nats) of each prompt's answer under each mask, [mask][prompt].

        places: of the examples in the data, for what differs by example. done: told how many answers are there.
        """
        acting = [own for mask in (*masks, self._stack.interventions) for own in mask]
        kinds = frozenset(kind for own in acting for kind in _kinds(own))
        if self._exact.get(kinds, True) and not any(own.sites for own in acting):
            found = self._resumed_answers(places, prompts, masks, done if kinds in self._exact else _nobody)
            if kinds in self._exact:
                return found
            differing = self._differing(places, prompts, masks, found)
            self._exact[kinds] = not differing
            if not differing:
                done(len(masks) * len(prompts))
                return found
            warnings.warn(f"{differing}; each mask is run whole instead, which takes longer", stacklevel=2)
        return [self._plain_answers(places, prompts, mask, done) for mask in masks]

    def _plain_answers(
        self, places: Sequence[int], prompts: Sequence[Encoded], mask: Mask, done: Callable[[int], object]
    ) -> list[float]:
        with torch.no_grad(), self._stack.adding(mask), self._stack.for_examples(places):
            found: list[float] = self._runner.answer_log_probabilities(prompts).tolist()
        done(len(prompts))
        return found

    def _differing(
        self, places: Sequence[int], prompts: Sequence[Encoded], masks: Sequence[Mask], found: Sequence[Sequence[float]]
    ) -> str:
        """How far resumed answers are from whole runs' where that is too far; of each first layer's strongest mask."""
        numbers = torch.tensor(found, dtype=torch.float64)
        effects = (numbers - numbers.median(0).values).abs()  # [mask, prompt]
        strongest = {
            layer: max(own, key=lambda number: float(effects[number].max()))
            for layer, own in self._by_first_layer(masks).items()
        }
        for number in strongest.values():
            rows = effects[number].topk(min(CHECKED, len(prompts))).indices.tolist()
            plain = self._plain_answers(
                [places[row] for row in rows], [prompts[row] for row in rows], masks[number], _nobody
            )
            far = (numbers[number, rows] - torch.tensor(plain, dtype=torch.float64)).abs().sort().values
            most = float(far[-2] if len(far) == CHECKED else far[-1])
            if not most <= EXACT:
                return f"under {masks[number]!r} resumed runs differ from whole ones by {most:.2g} nats"
        return ""

    def _by_first_layer(self, masks: Sequence[Mask]) -> dict[int, list[int]]:
        """The masks' numbers by the first layer that they act in, in rising order; nowhere those that act in none."""
        found: dict[int, list[int]] = {}
        for number, mask in enumerate(masks):
            layers = self._layers(mask)
            if layers:
                found.setdefault(min(layers), []).append(number)
        return dict(sorted(found.items()))

    def _layers(self, mask: Mask) -> set[int]:
        return {layer for own in mask for layer in own.layers_in(self._runner.reader.architecture)}

    def _resumed_answers(
        self, places: Sequence[int], prompts: Sequence[Encoded], masks: Sequence[Mask], done: Callable[[int], object]
    ) -> list[list[float]]:
        with self._stack.for_examples(places):
            plain = self._runner.plain(prompts)
        found = [list(plain.found) for _ in masks]
        for layer, own in self._by_first_layer(masks).items():
            for numbers in self._packs(masks, own):
                together = [masks[number] for number in numbers]
                answers = self._pack(plain, places, layer, together)
                for place, number in enumerate(numbers):
                    found[number] = answers[place * len(prompts) : (place + 1) * len(prompts)]
                done(len(answers))
        done(len(prompts) * sum(not self._layers(mask) for mask in masks))
        return found

    def _packs(self, masks: Sequence[Mask], numbers: Sequence[int]) -> list[Sequence[int]]:
        """Masks that may be run in one batch: several of one intervention each, where none differs by example."""
        if any(isinstance(own, Rows) for own in self._stack.interventions):
            return _pieces(numbers, 1)
        alone = [n for n in numbers if len(masks[n]) > 1 or isinstance(masks[n][0], Rows)]
        shared = [n for n in numbers if n not in set(alone)]
        return [*_pieces(shared, TOGETHER), *_pieces(alone, 1)]

    def _pack(self, plain: Plain, places: Sequence[int], layer: int, together: Sequence[Mask]) -> list[float]:
        """The log-probabilities of the answers under each of some masks that begin in `layer`, one after another."""
        size = len(places)
        packed = plain.of_rows([*range(size)] * len(together))
        with self._masking(together, size, places, range(len(packed.places))):
            output, changed = self._runner.masked_layer(packed, layer)
        wanted, rows = self._reach(layer, changed, together)
        found = list(packed.found)
        for chunk in _pieces(rows, size):
            of_chunk = rows_of(output, chunk, len(found))
            with self._masking(together, size, places, chunk):
                answers = self._runner.rest(packed.of_rows(chunk), layer, of_chunk, wanted[list(chunk)])
            for row, answer in zip(chunk, answers, strict=True):
                found[row] = answer
        return found

    def _reach(self, layer: int, changed: Tensor, together: Sequence[Mask]) -> tuple[Tensor, list[int]]:
        """Which positions [row, pos] can differ from the plain pass's after `layer`, and which rows.

        Those from the first that changed on; all, where something acts in later layers too. Pads are positions as
        others: there are models in which they reach tokens.
        """
        if any(self._layers(mask) != {layer} for mask in together):
            changed = torch.ones_like(changed)
        return changed.cumsum(-1) > 0, changed.any(-1).nonzero()[:, 0].tolist()

    @contextmanager
    def _masking(
        self, together: Sequence[Mask], size: int, places: Sequence[int], rows: Sequence[int]
    ) -> Iterator[None]:
        """Inside the block these rows of the masks' common batch run, each under its own mask."""
        if len(together) == 1:
            mask, of_examples = together[0], [places[row] for row in rows]
        else:
            mask, of_examples = (Rows(tuple(own for [own] in together for _ in range(size))),), [*rows]
        with self._stack.adding(mask), self._stack.for_examples(of_examples):
            yield


def _kinds(own: Intervention) -> Iterator[type]:
    """What it is, and what it is of rows."""
    yield type(own)
    if isinstance(own, Rows):
        yield from map(type, own.interventions)


def _nobody(done: int) -> None:
    """Who is told nothing of what is done."""


def _pieces(whole: Sequence[int], size: int) -> list[Sequence[int]]:
    """A sequence in pieces of so many, the last of what is left."""
    return [whole[start : start + size] for start in range(0, len(whole), size)]
