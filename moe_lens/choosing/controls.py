"""Random sets of experts of the same shape as chosen ones, and what sets a chosen one apart from them."""

import warnings
from collections.abc import Iterable, Iterator, Sequence, Set
from hashlib import sha256
from itertools import islice

import pandas as pd

from moe_lens.causal.evaluation import summary_table
from moe_lens.choosing.selection import Choice
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Mode, parse_mode
from moe_lens.metrics import metrics_named, seeds_interval
from moe_lens.metrics.bounds import Bounds
from moe_lens.metrics.catalogue import Named

Shape = tuple[tuple[int, int], ...]
CONTROL = "random"
"""The family of the random sets that masks are compared with."""
DRAWS = 100
"""How many sets are drawn for each control at most, until there are enough different ones."""


def random_controls(chosen: Sequence[Choice], count: int, *, n_experts: int, seed: int) -> list[Choice]:
    """`count` random sets for every shape (members per layer) among the choices, named `random:SIZE#number`.

    Where several shapes have as many members per layer, but in other layers, the name lists layers and members. All are
    different, and none is among the choices; where a shape has not so many others, a warning tells how many it has.
    The sets of other shapes and of other seeds are drawn independently.
    """
    names = _control_names(chosen)
    likes = {_shape(choice): choice.experts for choice in chosen}
    taken = {choice.experts for choice in chosen}  # a set is no control of itself
    controls = []
    for shape, like in likes.items():
        seeds = (_draw_seed(seed, shape, number) for number in range(DRAWS * count))
        drawn = (ExpertSet.random_like(like, own, n_experts=n_experts) for own in seeds)
        others = list(islice(_new(drawn, taken), count))
        if len(others) < count:
            warnings.warn(
                f"{names[shape]}: expected {count} random sets, but found only {len(others)} others of that shape "
                f"among {n_experts} experts per layer; their p-values go no lower than 1/{len(others) + 1}",
                stacklevel=2,
            )
        controls += [Choice(f"{names[shape]}#{number}", CONTROL, experts) for number, experts in enumerate(others)]
    return controls


def against_random(
    answers: pd.DataFrame,
    chosen: Sequence[Choice],
    controls: Sequence[Choice],
    metric: str,
    *,
    bounds: Bounds | None = (-1, 1),
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each choice that has controls of its shape: how its answers' score differs from theirs.

    answers: one row per intervention and example, as `evaluate` gives them, with the score in the column `metric`.
    bounds: of a difference of two scores, as `seeds_interval` takes them.

    Columns: intervention; below_random, how much lower its mean is than theirs on average, with the ends of its 95 %
    interval over sets and examples in _low and _high; random_p, the p-value of its being one of them, against a lower
    mean: its rank over the number of sets; and rank, the place of its mean among theirs and itself, 1 for the lowest,
    so 1 of 21 means that no random set did as much damage. Examples without the score in any set are left out.
    """
    places = answers.groupby("intervention").cumcount()  # every intervention is answered in the same order
    scores = answers.assign(place=places).pivot(index="place", columns="intervention", values=metric)
    names = _control_names(choice for choice in chosen if choice.experts)
    rows = []
    for choice in chosen:
        control = names.get(_shape(choice))
        sets = [one.name for one in controls if one.name.rpartition("#")[0] == control]
        both = scores[[choice.name, *sets]].dropna()
        if not sets or both.empty:
            continue
        own, theirs = both[choice.name].to_numpy(), both[sets].to_numpy().T  # [example], [set, example]
        below = seeds_interval(theirs - own, bounds=bounds, seed=seed)
        rank, of = 1 + int((theirs.mean(1) <= own.mean() + 1e-12).sum()), len(sets) + 1
        row = {"intervention": choice.name, "below_random": below.mean, "below_random_low": below.low}
        rows.append(row | {"below_random_high": below.high, "random_p": rank / of, "rank": f"{rank} of {of}"})
    return pd.DataFrame(rows)


def compared_summary(
    answers: pd.DataFrame,
    chosen: Sequence[Choice],
    controls: Sequence[Choice],
    metrics: Sequence[Named],
    *,
    mode: str | Mode = "zero",
    seed: int = 0,
) -> pd.DataFrame:
    """`summary_table` without the controls, with the columns of `against_random` for every metric that is paired.

    mode: under which the choices were; at each strength they are compared with the controls of the same.
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
                part = against_random(own, chosen, controls, metric.name, bounds=bounds, seed=seed)
                parts.append(part.replace({"intervention": {name: label for label, name in labels.items()}}))
                parts[-1]["metric"] = metric.name
    known = [part for part in parts if len(part)]
    return summary.merge(pd.concat(known), on=["intervention", "metric"], how="left") if known else summary


def _draw_seed(seed: int, shape: Shape, number: int) -> int:
    """A seed for one draw, which no other seed, shape or number shares."""
    return int.from_bytes(sha256(repr((seed, shape, number)).encode()).digest()[:8])


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
