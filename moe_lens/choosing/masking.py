"""A causal masking run: experts chosen, answers under each mask and under random controls, and what they show."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.evaluation import UNMASKED, evaluate, q_values, summarise
from moe_lens.choosing.selection import Choice
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import MODES, Intervention, check_interventions, check_mode
from moe_lens.lens.lens import MoELens
from moe_lens.metrics import seeds_interval
from moe_lens.results import write_json, write_table

CONTROL = "random"
"""The family of the random sets that masks are compared with."""
MEAN = "random mean"
"""The family of a control's mean over its sets."""
DRAWS = 100
"""How many sets are drawn for each control at most, until it is none of the chosen sets."""


@dataclass(frozen=True)
class Masked:
    """What a masking run found.

    answers: those of `evaluate`, one row per mask and example. rows: see `masking_rows`.
    """

    answers: pd.DataFrame
    rows: pd.DataFrame


def mask(
    lens: MoELens,
    examples: Sequence[Example],
    chosen: Sequence[Choice],
    mode: str = "zero",
    *,
    controls: int = 20,
    max_new_tokens: int = 16,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    out: Path | None = None,
    made_by: dict[str, Any] | None = None,
    seed: int = 0,
) -> Masked:
    """Masks each choice of experts, and random sets like it, and says what the answers lose by it.

    mode: one of `moe_lens.lens.interventions.MODES`. controls: random sets for every shape among the choices, 0 for
    none. seed: of these, the bootstrap and the permutation tests. stop, out, made_by: as in `evaluate`, where parts are
    kept.
    Every choice is checked before the first is answered; MoELensError for experts the model lacks or cannot spare. One
    that is there twice counts once.
    """
    chosen = expect_choices(chosen)
    sets = [*chosen, *random_controls(chosen, controls, n_experts=lens.architecture.n_experts, seed=seed)]
    answers = evaluate(
        lens,
        examples,
        named(sets, mode),
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=batch_size,
        out=out,
        made_by=None if made_by is None else made_by | {"mode": mode},
    ).answers
    return Masked(answers, masking_rows(answers, sets, mode, seed=seed))


def expect_choices(chosen: Iterable[Choice]) -> list[Choice]:
    """The choices, each once; MoELensError for what is none."""
    found = [chosen] if isinstance(chosen, (Choice, str)) or not isinstance(chosen, Iterable) else list(chosen)
    for one in found:
        if not isinstance(one, Choice):
            raise MoELensError(
                'expected choices of experts, as choices(parse("ce:4"), ground) gives them, or '
                f"Choice(name, family, experts) of one's own; got {one!r:.80}"
            )
    return list(dict.fromkeys(found))


def write_masked(found: Masked, out: Path, made_by: dict[str, Any]) -> list[str]:
    """Writes answers.parquet, masking.parquet and summary.json; returns the names of the files."""
    write_table(found.answers, out / "answers.parquet", made_by)
    write_table(found.rows, out / "masking.parquet", made_by)
    clean = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in found.rows.to_dict("records")
    ]
    write_json(out / "summary.json", {"rows": clean, "provenance": made_by})
    return ["answers.parquet", "masking.parquet", "summary.json"]


def named(chosen: Iterable[Choice], mode: str) -> dict[str, Intervention]:
    """The intervention of every choice by its name; a choice that is there twice counts once.

    mode: one of `MODES`. Raises MoELensError for another, and where one name stands for different experts.
    """
    check_mode(mode)
    different = expect_choices(chosen)
    repeated = [name for name, count in Counter(choice.name for choice in different).items() if count > 1]
    if repeated:
        raise MoELensError(
            f"different experts need different names; these repeat: {', '.join(repeated)}; rename a file"
        )
    return {choice.name: MODES[mode](choice.experts) for choice in different}


def check_choices(lens: MoELens, chosen: Iterable[Choice], mode: str) -> None:
    """MoELensError, naming layer and experts, unless every choice can be masked in this model."""
    for intervention in named(chosen, mode).values():
        check_interventions((intervention,), lens.architecture)


def random_controls(chosen: Sequence[Choice], count: int, *, n_experts: int, seed: int) -> list[Choice]:
    """`count` random sets for every shape (members per layer) among the choices, named `random:SIZE#number`.

    Where several shapes have as many members per layer, but in other layers, the name lists layers and members. A drawn
    set that is among the choices is drawn anew; where no other set has the shape, there is no control.
    """
    names = _control_names(chosen)
    likes = {names[_shape(choice)]: choice.experts for choice in chosen}
    taken = {choice.experts for choice in chosen}  # a set is no control of itself
    controls = []
    for name, like in likes.items():
        drawn = (
            ExpertSet.random_like(like, seed * 100_003 + number, n_experts=n_experts) for number in range(DRAWS * count)
        )
        others = islice((experts for experts in drawn if experts not in taken), count)
        controls += [Choice(f"{name}#{number}", CONTROL, experts) for number, experts in enumerate(others)]
    return controls


def masking_rows(answers: pd.DataFrame, chosen: Sequence[Choice], mode: str, *, seed: int = 0) -> pd.DataFrame:
    """One row for the unmasked run and for each choice: what was masked, how, and how the answers changed.

    Columns: intervention, family, experts, size, mode, then those of `summarise`, `q_value`: p_value corrected for the
    number of choices that are no controls (Benjamini-Hochberg), and what sets a choice apart from random sets of the
    same shape: `below_random`, how much lower its EM is than theirs on average, with the ends of its 95 % interval
    over sets and examples in _low and _high; `rank`: the place of its EM among theirs and itself, 1 for the lowest, so
    1 of 21 means that no random set did as much damage; and `random_p`, that place over their number: the p-value of
    its being one of them, against more damage. Each control has a row of its own and one for the mean of its sets.
    """
    by_name = dict(iter(answers.groupby("intervention", sort=False)))
    unmasked = by_name[UNMASKED]
    rows = [_row(Choice(UNMASKED, UNMASKED, ExpertSet()), None) | summarise(unmasked, seed=seed)]
    rows += [_row(choice, mode) | summarise(by_name[choice.name], unmasked, seed=seed) for choice in chosen]
    controls: dict[str, list[Choice]] = {}
    for choice in chosen:
        if choice.family == CONTROL:
            controls.setdefault(choice.name.rpartition("#")[0], []).append(choice)
    for control, members in controls.items():
        names = [member.name for member in members]
        sets = [by_name[one] for one in names]
        mean = sets[0].assign(
            **{column: np.mean([part[column] for part in sets], axis=0) for column in ("em", "f1", "memory")}
        )
        about = {"intervention": control, "family": MEAN, "experts": f"mean of {len(members)} sets"}
        told = summarise(mean, unmasked, seed=seed)
        ratios = [ratio for row in rows if row["intervention"] in names and (ratio := row["memory_ratio"]) is not None]
        told["memory_ratio"] = float(np.mean(ratios)) if ratios else None
        rows.append(about | {"size": members[0].size, "mode": mode} | told)
    table = pd.DataFrame(rows)
    if "p_value" in table:
        table["q_value"] = q_values(table["p_value"].where(~table["family"].isin([CONTROL, MEAN])))
    ems = {one: part["em"].to_numpy() for one, part in by_name.items()}
    return _against_random(table, chosen, controls, ems, seed)


def _row(choice: Choice, mode: str | None) -> dict[str, Any]:
    """What was masked and how."""
    about = {"intervention": choice.name, "family": choice.family, "experts": str(choice.experts)}
    return about | {"size": choice.size, "mode": mode}


def _against_random(
    table: pd.DataFrame,
    chosen: Sequence[Choice],
    controls: Mapping[str, Sequence[Choice]],
    ems: Mapping[str, np.ndarray],
    seed: int,
) -> pd.DataFrame:
    """The rows with what sets each choice apart from the random sets of its shape; ems: [example], by name."""
    own = [choice for choice in chosen if choice.experts and choice.family != CONTROL]
    names = _control_names(own)
    control_of = {choice.name: names[_shape(choice)] for choice in own}
    for place, row in table.iterrows():
        members = controls.get(control_of.get(row["intervention"], ""), [])
        if not members:
            continue
        sets = np.stack([ems[member.name] for member in members])  # [set, example]
        below = seeds_interval(sets - ems[row["intervention"]], bounds=(-1, 1), seed=seed)
        rank, of = 1 + int((sets.mean(1) <= row["em"] + 1e-12).sum()), len(sets) + 1
        told = {"below_random": below.mean, "below_random_low": below.low, "below_random_high": below.high}
        for column, value in (told | {"random_p": rank / of, "rank": f"{rank} of {of}"}).items():
            table.loc[place, column] = value
    return table


Shape = tuple[tuple[int, int], ...]


def _shape(choice: Choice) -> Shape:
    """How many members each layer has: (layer, number of experts)."""
    return tuple((layer, len(ids)) for layer, ids in choice.experts.members)


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
