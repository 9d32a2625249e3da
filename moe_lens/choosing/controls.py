"""Random sets of experts of the same shape as chosen ones, and what sets a chosen one apart from them."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.evaluation import summary_table
from moe_lens.choosing.matched_usage import near_sets, share_of, usage_by_layer
from moe_lens.choosing.selection import Choice
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Mode, parse_mode
from moe_lens.lens.lens import MoELens
from moe_lens.metrics import metrics_named, seeds_interval
from moe_lens.metrics.bounds import Bounds
from moe_lens.metrics.catalogue import Named
from moe_lens.statistics import ExpertUsage

Shape = tuple[tuple[int, int], ...]
CONTROL = "random"
"""The family of the random sets that masks are compared with."""
DRAWS = 100
"""How many sets are drawn for each control at most, until there are enough different ones."""


@dataclass(frozen=True, eq=False)
class Controls:
    """What random sets each choice is compared with.

    count: how many; 0 for none. matched: whether they are as much used as the choice, too, and not only as large in
    each layer. usage: then how much each expert is used, columns layer, expert and score; see `measured`.
    """

    count: int
    matched: bool = False
    usage: pd.DataFrame | None = None

    @classmethod
    def parse(cls, text: str) -> "Controls":
        """What random:N, matched:N and none name; MoELensError for anything else."""
        if text == "none":
            return cls(0)
        name, _, count = text.partition(":")
        if name not in ("random", "matched") or not re.fullmatch(r"0*[1-9][0-9]{0,5}", count):
            raise MoELensError(
                f"--control must be random:N or matched:N with N from 1 to 999999, or none; got {text!r:.80}"
            )
        return cls(int(count), matched=name == "matched")

    @property
    def told(self) -> int | str:
        """For provenance: their number, and that they are matched by usage."""
        return f"matched:{self.count}" if self.matched else self.count

    def measured(self, lens: MoELens, examples: Sequence[Example], mode: Mode) -> "Controls":
        """With the usage of a lens's experts on examples, where that is needed: at the positions where `mode` acts."""
        if not self.matched or self.usage is not None:
            return self
        positions = "decode" if mode.steps == "decode" else mode.positions
        [usage] = lens.measure(examples, ExpertUsage(positions=positions))
        return replace(self, usage=usage.table())

    def drawn(self, chosen: Sequence[Choice], *, n_experts: int, seed: int) -> list[Choice]:
        """The random sets of all choices."""
        if not self.matched:
            return random_controls(chosen, self.count, n_experts=n_experts, seed=seed)
        if self.usage is None:
            raise MoELensError("sets are matched by usage, which is not measured; take Controls(…).measured(lens, …)")
        return matched_controls(chosen, self.count, usage=self.usage, seed=seed)


def matched_controls(chosen: Sequence[Choice], count: int, *, usage: pd.DataFrame, seed: int) -> list[Choice]:
    """`count` random sets for every choice, as large in each layer and about as much used, `matched to NAME#number`.

    usage: columns layer, expert and score, each layer's sum being 1, as `ExpertUsage` has them.
    In each layer a set's part is drawn from the `count` whose usage is nearest to the choice's (`near_sets`). All are
    different, and none is among the choices; where there are not so many, a warning tells how many. Raises MoELensError
    where there is none at all.
    """
    by_layer, taken = usage_by_layer(usage), {choice.experts for choice in chosen}
    controls = []
    for choice in dict.fromkeys(one for one in chosen if one.experts):
        members = choice.experts.members
        seeds = [_draw_seed(seed, members, number) for number in range(DRAWS * count)]
        pools = {layer: near_sets(by_layer[layer], ids, count, seed=(seeds[0], layer)) for layer, ids in members}
        drawn = (_one_of_each(pools, own) for own in seeds)
        others = list(islice(_new(drawn, taken), count))
        if not others:
            raise MoELensError(
                f"no other set is as large as {choice.name} in each layer: all experts of its layers are chosen; "
                "choose fewer, or take --control none"
            )
        name = matched_name(choice)
        _tell_few(name, others, count, len(next(iter(by_layer.values()))))
        controls += [Choice(f"{name}#{number}", CONTROL, experts) for number, experts in enumerate(others)]
    return controls


def random_controls(chosen: Sequence[Choice], count: int, *, n_experts: int, seed: int) -> list[Choice]:
    """`count` random sets for every shape (members per layer) among the choices, named `random:SIZE#number`.

    Where several shapes have as many members per layer, but in other layers, the name lists layers and members. All are
    different, and none is among the choices; where a shape has not so many others, a warning tells how many it has.
    The sets of other shapes and of other seeds are drawn independently.
    """
    names = _control_names(chosen)
    likes = {_shape(choice): choice.experts for choice in chosen if choice.experts}
    taken = {choice.experts for choice in chosen}  # a set is no control of itself
    controls = []
    for shape, like in likes.items():
        seeds = (_draw_seed(seed, shape, number) for number in range(DRAWS * count))
        drawn = (ExpertSet.random_like(like, own, n_experts=n_experts) for own in seeds)
        others = list(islice(_new(drawn, taken), count))
        _tell_few(names[shape], others, count, n_experts)
        controls += [Choice(f"{names[shape]}#{number}", CONTROL, experts) for number, experts in enumerate(others)]
    return controls


def against_random(
    answers: pd.DataFrame,
    chosen: Sequence[Choice],
    controls: Sequence[Choice],
    metric: str,
    *,
    bounds: Bounds | None = (-1, 1),
    usage: pd.DataFrame | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each choice that has controls of its shape: how its answers' score differs from theirs.

    answers: one row per intervention and example, as `evaluate` gives them, with the score in the column `metric`.
    bounds: of a difference of two scores, as `seeds_interval` takes them. usage: of experts, as `Controls` has it.

    Columns: intervention; control, its random sets' name; with `usage` also usage, the share of all selections in its
    layers that are of its experts, and control_usage, the mean of that of its random sets; below_random, how much lower
    its mean is than theirs on average, with the ends of its 95 % interval over sets and examples in _low and _high;
    random_p, the p-value of its being one of them, against a lower mean: its rank over the number of sets; and rank,
    the place of its mean among theirs and itself, 1 for the lowest, so 1 of 21 means that no random set did as much
    damage. Examples without the score in any set are left out.
    """
    places = answers.groupby("intervention").cumcount()  # every intervention is answered in the same order
    scores = answers.assign(place=places).pivot(index="place", columns="intervention", values=metric)
    names = _control_names(choice for choice in chosen if choice.experts)
    groups: dict[str, list[Choice]] = {}
    for one in controls:
        groups.setdefault(one.name.rpartition("#")[0], []).append(one)
    rows = []
    for choice in chosen:
        control = matched_name(choice) if matched_name(choice) in groups else names.get(_shape(choice), "")
        own_sets = groups.get(control, [])
        sets = [one.name for one in own_sets]
        both = scores[[choice.name, *sets]].dropna()
        if not sets or both.empty:
            continue
        own, theirs = both[choice.name].to_numpy(), both[sets].to_numpy().T  # [example], [set, example]
        below = seeds_interval(theirs - own, bounds=bounds, seed=seed)
        rank, of = 1 + int((theirs.mean(1) <= own.mean() + 1e-12).sum()), len(sets) + 1
        row: dict[str, Any] = {"intervention": choice.name, "control": control}
        if usage is not None:
            shares = [share_of(one.experts, usage) for one in (choice, *own_sets)]
            row |= {"usage": shares[0], "control_usage": sum(shares[1:]) / len(own_sets)}
        row |= {"below_random": below.mean, "below_random_low": below.low}
        rows.append(row | {"below_random_high": below.high, "random_p": rank / of, "rank": f"{rank} of {of}"})
    return pd.DataFrame(rows)


def compared_summary(
    answers: pd.DataFrame,
    chosen: Sequence[Choice],
    controls: Sequence[Choice],
    metrics: Sequence[Named],
    *,
    mode: str | Mode = "zero",
    usage: pd.DataFrame | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """`summary_table` without the controls, with the columns of `against_random` for every metric that is paired.

    mode: under which the choices were; at each strength they are compared with the controls of the same.
    usage: as `against_random` takes it.
    """
    mode = parse_mode(mode)
    drawn = answers["intervention"].isin([mode.label(one.name, dose) for one in controls for dose in mode.doses])
    summary = summary_table(answers[~drawn], metrics=metrics, seed=seed)
    parts = []
    for dose in mode.doses:
        labels = {mode.label(one.name, dose): one.name for one in (*chosen, *controls)}
        own = answers[answers["intervention"].isin(labels)].replace({"intervention": labels})
        for metric in metrics_named(metrics):
            bounds = metric.bounds_of_difference
            if metric.paired:
                part = against_random(own, chosen, controls, metric.name, bounds=bounds, usage=usage, seed=seed)
                parts.append(part.replace({"intervention": {name: label for label, name in labels.items()}}))
                parts[-1]["metric"] = metric.name
    known = [part for part in parts if len(part)]
    return summary.merge(pd.concat(known), on=["intervention", "metric"], how="left") if known else summary


def matched_name(choice: Choice) -> str:
    """What the sets that are matched to a choice are called together."""
    return f"matched to {choice.name}"


def _one_of_each(pools: Mapping[int, Sequence[Iterable[int]]], seed: int) -> ExpertSet:
    """A set whose part in each layer is one of those in the layer's pool."""
    rng = np.random.default_rng(seed)
    return ExpertSet.of({layer: pool[int(rng.integers(len(pool)))] for layer, pool in pools.items()})


def _tell_few(name: str, found: Sequence[ExpertSet], count: int, n_experts: int) -> None:
    """A warning where there are fewer sets than are asked for."""
    if len(found) < count:
        warnings.warn(
            f"{name}: expected {count} random sets, but found only {len(found)} others of that shape "
            f"among {n_experts} experts per layer; their p-values go no lower than 1/{len(found) + 1}",
            stacklevel=3,
        )


def _draw_seed(seed: int, of: object, number: int) -> int:
    """A seed for one draw, which no other seed, shape or set, or number shares."""
    return int.from_bytes(sha256(repr((seed, of, number)).encode()).digest()[:8])


def _shape(choice: Choice) -> Shape:
    """How many members each layer has: (layer, number of experts)."""
    return tuple((layer, len(ids)) for layer, ids in choice.experts.members)


def _new(drawn: Iterable[ExpertSet], taken: Set[ExpertSet]) -> Iterator[ExpertSet]:
    """What is drawn, each set once, without those that are taken."""
    seen = set(taken)
    for experts in drawn:
        if experts not in seen:
            seen.add(experts)
            yield experts


def _control_names(chosen: Iterable[Choice]) -> dict[Shape, str]:
    """The name of every shape's controls: `random:N` for the only shape of N per layer, else all of the shape."""
    shapes = list(dict.fromkeys(map(_shape, chosen)))
    sizes = {shape: {size for _, size in shape} for shape in shapes}
    names = {}
    for shape in shapes:
        alone = len(sizes[shape]) == 1 and sum(sizes[shape] == sizes[other] for other in shapes) == 1
        listed = "+".join(f"{layer}x{size}" for layer, size in shape)
        names[shape] = f"random:{shape[0][1]}" if alone else f"random~{listed}"
    return names
