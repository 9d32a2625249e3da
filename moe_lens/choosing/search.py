"""find_set: experts that do something together, found by masks that are trained against the model's own answers.

No score of single experts is needed, no label and no tuned router: what the model answers unmasked is what a set of
experts is to hurt, or to be enough for. A mask is drawn around learned logits (Gumbel top-k), another one for every row
of a pass; the gradient by the gating weights' factors says, straight through, which logits are to rise.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.choosing.procedures import Examples
from moe_lens.data import Encoded
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.batching import encode_prompt, run_pieces
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import gathered, own_part
from moe_lens.progress import progress_bar

SEEDS = 3
"""Searches from different random numbers, of which the best is taken."""


@dataclass(frozen=True)
class Recipe:
    """How a set is searched for; the defaults were chosen on dev examples of `organism`.

    passes: forward and backward passes of each seed. rows: examples of every task in a pass. rate: what the logits
    move by in a pass, about. floor: nats by which an answer that became less probable is lost, so that nothing is won
    by losing it more. held: examples of every task that are not trained on, by which exchanges and seeds are judged.
    exchanges: how many are tried at most.
    """

    passes: int = 150
    rows: int = 12
    rate: float = 0.1
    floor: float = 12.0
    held: int = 48
    exchanges: int = 8

    def __post_init__(self) -> None:
        counted = all(type(one) is int for one in (self.passes, self.rows, self.held, self.exchanges))
        if not counted or min(self.passes, self.rows) < 1 or min(self.held, self.exchanges) < 0:
            raise MoELensError(f"a search takes whole numbers, passes and rows from 1; got {self}")
        if not (0 < self.rate < math.inf and self.floor > 0):
            raise MoELensError(f"a search takes a finite rate and a floor, above 0; got {self}")


@dataclass(frozen=True)
class Wanted:
    """What is to be found: `size` experts of each layer, or `budget` over all layers.

    keep: whether they are to suffice for the answers, all others masked, instead of hurting them when masked.
    """

    size: int | None = None
    budget: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        asked = [number for number in (self.size, self.budget) if number is not None]
        if len(asked) != 1 or type(asked[0]) is not int or asked[0] < 1:
            raise MoELensError(
                f"a set has either a size of each layer or a budget over all, from 1; got size={self.size}, "
                f"budget={self.budget}"
            )

    def check(self, architecture: MoEArchitecture) -> None:
        """MoELensError unless the model has more experts than that."""
        layers, n_experts = len(architecture.moe_layers), architecture.n_experts
        most = n_experts if self.budget is None else layers * n_experts
        if (self.size or self.budget or 0) >= most:
            raise MoELensError(f"expected fewer than all {most} experts to be found; got {self.size or self.budget}")

    def members(self, logits: Tensor) -> Tensor:
        """The highest of logits [..., layer, expert]: 1 where an expert is chosen, 0 elsewhere."""
        flat = logits if self.budget is None else logits.flatten(-2)
        chosen = flat.topk(self.size or self.budget or 0, -1).indices
        return torch.zeros_like(flat).scatter(-1, chosen, 1.0).view_as(logits)


@dataclass(frozen=True)
class FoundSet:
    """What `find_set` found.

    experts: the set of the seed that did best on the held-out examples. by_seed: that of every seed.
    table: columns layer, expert, score (the logit learned, mean over seeds), returned (the share of seeds whose set has
        the expert) and chosen. passes: forward and backward ones, of all seeds; seconds: that all took.
    """

    experts: ExpertSet
    by_seed: tuple[ExpertSet, ...]
    table: pd.DataFrame
    passes: int
    seconds: float

    @property
    def agreement(self) -> float:
        """Mean Jaccard index of the sets of two seeds; NaN of a single seed."""
        pairs = list(combinations(self.by_seed, 2))
        return float(np.mean([first.jaccard(second) for first, second in pairs])) if pairs else float("nan")


def find_set(
    lens: MoELens,
    examples: Examples,
    wanted: Wanted,
    *,
    spare: Mapping[str, Examples] = MappingProxyType({}),
    recipe: Recipe = Recipe(),
    seeds: int = SEEDS,
    seed: int = 0,
    max_new_tokens: int = 16,
    progress: bool | None = None,
) -> FoundSet:
    """Experts without which the model gives other answers to the examples, but the same ones to the spared tasks.

    The same call gives the same set. seeds: searches from different random numbers, of which the best is taken; seed:
    of all of them. max_new_tokens: of the model's own answers, which are generated first. In a `sharing` block of
    moe_lens.lens.parallel the processes share the searches.
    Raises MoELensError for no examples, more experts than there are, or a set that is to suffice and to spare.
    """
    _check(lens, examples, wanted, spare)
    if seeds < 1 or seed < 0:
        raise MoELensError(f"expected one search or more, seeds=, of a seed from 0; got seeds={seeds}, seed={seed}")
    began, shown = time.perf_counter(), lens.progress if progress is None else progress
    tasks = [examples, *spare.values()]
    rows = [_own_answers(lens, one, recipe.floor, max_new_tokens, progress=shown) for one in tasks]
    search = _Search.of(lens, rows, wanted, recipe, seed)
    start, of = part = own_part(lens.module)
    own = range(start, seeds, of)
    with progress_bar(total=len(own) * recipe.passes, desc="finding experts", unit="pass", disable=not shown) as bar:
        runs = gathered(((number, search.run((seed, number), bar.update)) for number in own), part)
    found = [one for _, one in sorted(runs, key=lambda pair: pair[0])]
    best = min(found, key=lambda one: one.best.loss)
    return FoundSet(
        _as_set(lens, best.best.members),
        tuple(_as_set(lens, one.best.members) for one in found),
        _table(lens, found, best),
        passes=sum(one.passes for one in found),
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Row:
    """A prompt with the model's own answer; floor: the log-probability (nats) at which that is lost."""

    prompt: Encoded
    floor: float


@dataclass(frozen=True)
class _Tried:
    """Members [layer, expert] as the held-out examples judge them.

    loss: how far from what is wanted, the lower the better. slopes: its gradient by membership, [layer, expert].
    """

    members: Tensor
    loss: float
    slopes: Tensor


@dataclass(frozen=True)
class _Found:
    """What one seed found: learned logits [layer, expert], the members, and passes forward and back."""

    logits: Tensor
    best: _Tried
    passes: int


@dataclass(frozen=True)
class _Search:
    """The search of one set: trained on `fitted`, judged on `held`, rows of each task.

    The first task is the one that is to be hurt, or kept; the others are to be spared.
    """

    lens: MoELens
    wanted: Wanted
    recipe: Recipe
    fitted: tuple[Sequence[_Row], ...]
    held: tuple[Sequence[_Row], ...]

    @classmethod
    def of(cls, lens: MoELens, tasks: Sequence[Sequence[_Row]], wanted: Wanted, recipe: Recipe, seed: int) -> "_Search":
        """Of few examples half are held out; a single one is trained on and judged by."""
        fitted, held = [], []
        for number, task in enumerate(tasks):
            order = np.random.default_rng((seed, number)).permutation(len(task)).tolist()
            cut = min(recipe.held, len(task) // 2)
            held.append([task[place] for place in order[:cut] or order])
            fitted.append([task[place] for place in order[cut:]])
        return cls(lens, wanted, recipe, tuple(fitted), tuple(held))

    def run(self, seeds: tuple[int, int], advance: Callable[[], object]) -> _Found:
        """One seed's set: learned, then improved by exchanges."""
        logits = self._learned(np.random.default_rng(seeds), advance)
        best, tried = self._tried(self.wanted.members(logits)), 1
        refused: set[tuple[int, int]] = set()
        while tried <= self.recipe.exchanges:
            swap = next((one for one in self._offers(best) if one not in refused), None)
            if swap is None:
                break
            members = best.members.flatten().clone()
            members[list(swap)] = 1 - members[list(swap)]
            new, tried = self._tried(members.view_as(best.members)), tried + 1
            best, refused = (new, set()) if new.loss < best.loss else (best, refused | {swap})
        return _Found(logits, best, self.recipe.passes + tried * len(self.held))

    def _learned(self, rng: np.random.Generator, advance: Callable[[], object]) -> Tensor:
        """Logits [layer, expert] of being chosen, by Adam with one scale for all; the noise ends with the passes."""
        architecture = self.lens.architecture
        logits = torch.zeros(len(architecture.moe_layers), architecture.n_experts)
        mean, square = torch.zeros_like(logits), torch.zeros_like(logits)
        for number in range(self.recipe.passes):
            rows, weights = self._drawn(rng)
            noise = torch.from_numpy(rng.gumbel(size=(len(rows), *logits.shape))).float()
            members = self.wanted.members(logits + noise * (1 - number / self.recipe.passes))
            slope = self._judged(rows, weights, members)[1]
            mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope**2
            size = (square / (1 - 0.99 ** (number + 1))).sqrt().mean() + 1e-12
            logits = logits - self.recipe.rate * mean / (1 - 0.9 ** (number + 1)) / size
            advance()
        return logits

    def _offers(self, now: _Tried) -> Iterator[tuple[int, int]]:
        """Exchanges, (member, outsider) as places in all layers' experts, those that promise most first.

        The weakest member for the strongest outsider, of each layer, or over all of them where there is one budget.
        """
        members, slopes = now.members.flatten(), now.slopes.flatten()
        width = now.members.shape[1] if self.wanted.budget is None else len(members)
        offers = []
        for start in range(0, len(members), width):
            own = slice(start, start + width)
            out = start + int(slopes[own].masked_fill(members[own] == 0, -torch.inf).argmax())
            into = start + int(slopes[own].masked_fill(members[own] == 1, torch.inf).argmin())
            if members[out] > members[into]:
                offers.append((float(slopes[into] - slopes[out]), (out, into)))
        return (swap for _, swap in sorted(offers))

    def _drawn(self, rng: np.random.Generator) -> tuple[list[_Row], Tensor]:
        """The rows of a pass, and what each counts in the loss."""
        rows, weights = [], []
        for number, task in enumerate(self.fitted):
            chosen = rng.permutation(len(task))[: self.recipe.rows].tolist()
            rows += [task[place] for place in chosen]
            weights += [self._weight(number) / len(chosen)] * len(chosen)
        return rows, torch.tensor(weights)

    def _weight(self, task: int) -> float:
        """What a task's mean log-probability counts in the loss: those to spare together as much as the first."""
        if task:
            return -1 / (len(self.held) - 1)
        return -1 if self.wanted.keep else 1

    def _tried(self, members: Tensor) -> _Tried:
        """The members, judged on all held-out examples."""
        loss, slopes = 0.0, torch.zeros_like(members)
        for number, task in enumerate(self.held):
            weights = torch.full((len(task),), self._weight(number) / len(task))
            own, slope = self._judged(task, weights, members.expand(len(task), -1, -1))
            loss, slopes = loss + own, slopes + slope
        return _Tried(members, loss, slopes)

    def _judged(self, rows: Sequence[_Row], weights: Tensor, members: Tensor) -> tuple[float, Tensor]:
        """The loss of rows with members of their own, [row, layer, expert], and its gradient by membership, summed."""
        factors = members if self.wanted.keep else 1 - members
        loss, slopes = 0.0, torch.zeros_like(members[0])
        batch = [(tuple(range(len(rows))), [row.prompt for row in rows])]
        floors = torch.tensor([row.floor for row in rows])
        run = self.lens.answer_gradients
        for places, (values, gradient) in run_pieces(batch, lambda at, some: run(some, factors[list(at)])):
            own, floor = weights[list(places)], floors[list(places)]
            loss += float((own * values.maximum(floor)).sum())
            counted = own * (values > floor)
            slopes += (counted[:, None, None] * gradient).sum(0)
        return loss, slopes if self.wanted.keep else -slopes


def _own_answers(lens: MoELens, examples: Examples, floor: float, max_new_tokens: int, *, progress: bool) -> list[_Row]:
    """The examples as the lens asks them, with what it answers."""
    texts = lens.generate(examples, max_new_tokens=max_new_tokens, progress=progress)
    sure = lens.answer_log_probabilities(examples, continuations=texts, progress=progress)
    return [
        _Row(encode_prompt(place, one, lens.tokenizer, template=lens.template, continuation=text), whole - floor)
        for place, (one, text, whole) in enumerate(zip(examples, texts, sure, strict=True))
    ]


def _as_set(lens: MoELens, members: Tensor) -> ExpertSet:
    """Members [layer, expert] as a set."""
    layers = lens.architecture.moe_layers
    return ExpertSet.of({layer: own.nonzero()[:, 0].tolist() for layer, own in zip(layers, members, strict=True)})


def _table(lens: MoELens, found: Sequence[_Found], best: _Found) -> pd.DataFrame:
    """`FoundSet.table`."""
    layers, n_experts = lens.architecture.moe_layers, lens.architecture.n_experts
    columns = {
        "score": torch.stack([one.logits for one in found]).mean(0),
        "returned": torch.stack([one.best.members for one in found]).mean(0),
        "chosen": best.best.members.bool(),
    }
    places = pd.MultiIndex.from_product([layers, range(n_experts)], names=["layer", "expert"]).to_frame(index=False)
    return places.assign(**{name: values.flatten().numpy() for name, values in columns.items()})


def _check(lens: MoELens, examples: Examples, wanted: Wanted, spare: Mapping[str, Examples]) -> None:
    """MoELensError for what cannot be searched for, before anything runs."""
    empty = [name for name, task in {"the target": examples, **spare}.items() if not task]
    if empty:
        raise MoELensError(f"a set is learned from examples; there are none of {', '.join(empty)}")
    wanted.check(lens.architecture)
    if wanted.keep and spare:
        raise MoELensError("a set that is to suffice for one task hurts what it does not need; leave out what to spare")
    if lens.interventions:
        raise MoELensError("a set is learned on the model as it is; call it outside `with lens.intervene(...)`")
