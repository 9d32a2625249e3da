"""A causal masking run: answers under each mask of chosen experts, random controls, and what they show."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from moe_lens.architecture import MoEArchitecture
from moe_lens.causal.evaluation import UNMASKED, evaluate, q_values, summarise
from moe_lens.choosing.selection import Choice
from moe_lens.commands import console
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import MODES, Intervention, check_interventions
from moe_lens.lens.lens import MoELens
from moe_lens.report.plots import masking_figure
from moe_lens.results import write_json, write_table

MEAN = "random mean"
SHOWN = (
    "intervention", "size", "n", "em", "em_low", "em_high", "f1", "memory", "em_drop", "p_value", "q_value", "rank",
)  # fmt: skip


def named(choices: Iterable[Choice], mode: str) -> dict[str, Intervention]:
    """The intervention of every choice by its name; a choice that is there twice counts once.

    mode: one of `moe_lens.lens.interventions.MODES`. Raises MoELensError where one name stands for different experts.
    """
    different = list(dict.fromkeys(choices))
    repeated = [name for name, count in Counter(choice.intervention for choice in different).items() if count > 1]
    if repeated:
        raise MoELensError(
            f"different experts need different names; these repeat: {', '.join(repeated)}; rename a file"
        )
    return {choice.intervention: MODES[mode](choice.experts) for choice in different}


def random_controls(choices: Sequence[Choice], count: int, *, n_experts: int, seed: int) -> list[Choice]:
    """`count` random sets for every shape (members per layer) among the choices, named `random:SIZE#number`.

    Where several shapes have as many members per layer, but in other layers, the name lists layers and members.
    """
    names = _control_names(choices)
    likes = {names[_shape(choice)]: choice for choice in choices}
    return [
        Choice(
            f"{name}#{number}",
            "random",
            ExpertSet.random_like(like.experts, seed * 100_003 + number, n_experts=n_experts),
        )
        for name, like in likes.items()
        for number in range(count)
    ]


Shape = tuple[tuple[int, int], ...]


def _shape(choice: Choice) -> Shape:
    """How many members each layer has: (layer, number of experts)."""
    return tuple((layer, len(ids)) for layer, ids in choice.experts.members)


def _control_names(choices: Iterable[Choice]) -> dict[Shape, str]:
    """The name of every shape's controls: `random:N` for the only shape of N per layer, else all of the shape."""
    shapes = list(dict.fromkeys(map(_shape, choices)))
    sizes = {shape: {size for _, size in shape} for shape in shapes}
    names = {}
    for shape in shapes:
        alone = len(sizes[shape]) == 1 and sum(sizes[shape] == sizes[other] for other in shapes) == 1
        listed = "+".join(f"{layer}x{size}" for layer, size in shape)
        names[shape] = f"random:{shape[0][1]}" if alone else f"random~{listed}"
    return names


def check_choices(choices: Iterable[Choice], mode: str, architecture: MoEArchitecture) -> None:
    """MoELensError, naming layer and experts, unless every choice can be masked in a model of this architecture."""
    for intervention in named(choices, mode).values():
        check_interventions((intervention,), architecture)


def answer_all(
    lens: MoELens,
    examples: Sequence[Example],
    choices: Sequence[Choice],
    mode: str,
    out: Path,
    provenance: dict,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> pd.DataFrame:
    """The answers without a mask and under every choice: those of `evaluate`, its parts kept in `out`.

    Every choice is checked before the first is answered; MoELensError for experts the model lacks or cannot spare.
    """
    return evaluate(
        lens,
        examples,
        named(choices, mode),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        out=out,
        made_by=provenance | {"mode": mode},
    ).answers


def masking_rows(answers: pd.DataFrame, choices: Sequence[Choice], mode: str, *, seed: int = 0) -> pd.DataFrame:
    """One row for the unmasked run and for each choice: what was masked, how, and how the answers changed.

    Columns: intervention, family, experts, size, mode, then those of `summarise`, `q_value`: p_value corrected for the
    number of choices that are no controls (Benjamini-Hochberg), and `rank`: the place of its EM
    among the random sets of the same shape and itself, 1 for the lowest, so 1 of 21 means that no random set did as
    much damage. Each control has a row of its own and one for the mean of its sets.
    """
    choices = [Choice(UNMASKED, UNMASKED, ExpertSet()), *choices]
    by_name = dict(iter(answers.groupby("intervention", sort=False)))
    unmasked = by_name[UNMASKED]
    rows = []
    for choice in choices:
        masked = choice.intervention != UNMASKED
        row = {
            "intervention": choice.intervention,
            "family": choice.family,
            "experts": str(choice.experts),
            "size": choice.size,
            "mode": mode if masked else None,
        }
        rows.append(row | summarise(by_name[choice.intervention], unmasked if masked else None, seed=seed))
    controls: dict[str, list[str]] = {}
    for choice in choices:
        if choice.family == "random":
            controls.setdefault(choice.intervention.rpartition("#")[0], []).append(choice.intervention)
    for name, members in controls.items():
        sets = [by_name[member] for member in members]
        mean = sets[0].assign(
            **{column: np.mean([part[column] for part in sets], axis=0) for column in ("em", "f1", "memory")}
        )
        row = {
            "intervention": name,
            "family": MEAN,
            "experts": f"mean of {len(members)} sets",
            "size": next(choice.size for choice in choices if choice.intervention == members[0]),
            "mode": mode,
        }
        rows.append(row | summarise(mean, unmasked, seed=seed))
    table = pd.DataFrame(rows)
    if "p_value" in table:
        table["q_value"] = q_values(table["p_value"].where(~table["family"].isin(["random", MEAN])))
    chosen = [choice for choice in choices if choice.experts and choice.family != "random"]
    names = _control_names(chosen)
    control_of = {choice.intervention: names[_shape(choice)] for choice in chosen}
    for place, row in table.iterrows():
        members = controls.get(control_of.get(row["intervention"], ""), [])
        if members:
            ems = table.set_index("intervention").loc[members, "em"]
            table.loc[place, "rank"] = f"{1 + int((ems <= row['em']).sum())} of {len(members) + 1}"
    return table


def write_run(answers: pd.DataFrame, rows: pd.DataFrame, out: Path, provenance: dict) -> list[str]:
    """Writes answers.parquet, masking.parquet, summary.json and the figure; returns the names of the files.

    answers: what `answer_all` gave. rows: what `masking_rows` made of it.
    """
    write_table(answers, out / "answers.parquet", provenance)
    write_table(rows, out / "masking.parquet", provenance)
    clean = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in rows.to_dict("records")
    ]
    write_json(out / "summary.json", {"rows": clean, "provenance": provenance})
    figures = console.save_figure(masking_figure(rows), out / "figure3.html")
    return ["answers.parquet", "masking.parquet", "summary.json", *(path.name for path in figures)]


def show_rows(rows: pd.DataFrame, *, title: str) -> None:
    """Prints the rows of `masking_rows`, the random sets as their mean."""
    console.show(rows[rows["family"] != "random"], [name for name in SHOWN if name in rows], title=title)
