"""A causal masking run: experts chosen, answers under each mask and under random controls, and what they show."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.evaluation import UNMASKED, evaluate, q_values, summarise
from moe_lens.choosing.controls import CONTROL, against_random, random_controls
from moe_lens.choosing.selection import Choice
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import MODES, Intervention, check_interventions, check_mode
from moe_lens.lens.lens import MoELens
from moe_lens.results import write_json, write_table

MEAN = "random mean"
"""The family of a control's mean over its sets."""


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


def masking_rows(answers: pd.DataFrame, chosen: Sequence[Choice], mode: str, *, seed: int = 0) -> pd.DataFrame:
    """One row for the unmasked run and for each choice: what was masked, how, and how the answers changed.

    Columns: intervention, family, experts, size, mode, then those of `summarise`, `q_value`: p_value corrected for the
    number of choices that are no controls (Benjamini-Hochberg), and those of `against_random` for EM. Each control has
    a row of its own and one for the mean of its sets.
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
    drawn = [choice for choice in chosen if choice.family == CONTROL]
    compared = against_random(answers, [one for one in chosen if one.family != CONTROL], drawn, "em", seed=seed)
    return table if compared.empty else table.merge(compared, on="intervention", how="left")


def _row(choice: Choice, mode: str | None) -> dict[str, Any]:
    """What was masked and how."""
    about = {"intervention": choice.name, "family": choice.family, "experts": str(choice.experts)}
    return about | {"size": choice.size, "mode": mode}
