"""A causal masking run: experts chosen, answers under each mask and under random controls, and what they show."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.evaluation import UNMASKED, evaluate, q_values, summarise
from moe_lens.choosing.controls import CONTROL, Controls, against_random, compared_summary
from moe_lens.choosing.saved_controls import SAVED, Drawn, against_twins, drawn_for, twins
from moe_lens.choosing.selection import Choice
from moe_lens.data import Example
from moe_lens.decoding import PLAIN, Decoding
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Intervention, Mode, check_interventions, parse_mode
from moe_lens.lens.lens import MoELens
from moe_lens.metrics.catalogue import DEFAULT_METRICS, Named
from moe_lens.results import write_json, write_table

MEAN = "random mean"
"""The family of a control's mean over its sets."""


@dataclass(frozen=True)
class Masked:
    """What a masking run found.

    answers: those of `evaluate`, one row per mask and example. rows: see `masking_rows`. summary: of more metrics than
        those, as `compared_summary` gives it; None without any. `joined` gives each a first column `task`.
    """

    answers: pd.DataFrame
    rows: pd.DataFrame
    summary: pd.DataFrame | None = None


def mask(
    lens: MoELens,
    examples: Sequence[Example],
    chosen: Sequence[Choice],
    mode: str | Mode = "zero",
    *,
    saved: Mapping[str, Intervention] = MappingProxyType({}),
    metrics: Sequence[Named] = (),
    controls: int | Controls = 20,
    max_new_tokens: int = 16,
    stop: Sequence[str] = (),
    decoding: Decoding = PLAIN,
    batch_size: int | None = None,
    out: Path | None = None,
    made_by: dict[str, Any] | None = None,
    seed: int = 0,
) -> Masked:
    """Masks each choice of experts, and random sets like it, and says what the answers lose by it.

    mode: a `Mode`, or what `parse_mode` reads, such as zero or bias:1,2,5: every choice, and every random set, is
    answered at every strength. saved: more interventions by name; one on a set of experts is compared, by EM,
    with the same on random sets.
    metrics: more than DEFAULT_METRICS, as `evaluate` takes them; the answers are scored by these too.
    controls: random sets for every shape among the choices, 0 for none; or `Controls`, such as sets that are matched by
    usage, which is measured on these examples unless it was before. seed: of these, the bootstrap and the
    permutation tests. stop, decoding, out, made_by: as in `evaluate`, where parts are kept.
    Every choice is checked before the first is answered; MoELensError for experts the model lacks or cannot spare. One
    that is there twice counts once.
    """
    chosen, mode = expect_choices(chosen), parse_mode(mode)
    asked = Controls(controls) if isinstance(controls, int) else controls.measured(lens, examples, mode)
    draw: dict[str, Any] = {"n_experts": lens.architecture.n_experts, "seed": seed}
    drawn, beside = asked.drawn(chosen, **draw), drawn_for(saved, asked, **draw)
    sets, others = [*chosen, *drawn], twins(saved, beside)
    answers = evaluate(
        lens,
        examples,
        with_saved(named(sets, mode), {**saved, **others}),
        metrics=[*DEFAULT_METRICS, *metrics],
        max_new_tokens=max_new_tokens,
        stop=stop,
        decoding=decoding,
        batch_size=batch_size,
        out=out,
        made_by=None if made_by is None else made_by | mode.facts(),
    ).answers
    rows = masking_rows(answers, sets, mode, saved=saved, beside=beside, usage=asked.usage, seed=seed)
    if not metrics:
        return Masked(answers, rows)
    own = answers[~answers["intervention"].isin(others)]
    return Masked(
        answers,
        rows,
        compared_summary(own, chosen, drawn, metrics, mode=mode, usage=asked.usage, seed=seed),
    )


def joined(found: Mapping[str, Masked]) -> Masked:
    """What was found on several tasks, by their names, as one, with a first column `task`."""
    parts = (
        [one.answers.assign(task=task) for task, one in found.items()],
        [one.rows.assign(task=task) for task, one in found.items()],
        [one.summary.assign(task=task) for task, one in found.items() if one.summary is not None],
    )
    return Masked(*(_with_first(pd.concat(part, ignore_index=True), "task") for part in parts if part))


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
    """Writes answers.parquet, masking.parquet (doses.parquet of a mode with strengths) and summary.json.

    Of more metrics summary.parquet too.

    Returns the names of the files.
    """
    name = "doses.parquet" if found.rows["strength"].notna().any() else "masking.parquet"
    write_table(found.answers, out / "answers.parquet", made_by)
    write_table(found.rows, out / name, made_by)
    if found.summary is not None:
        write_table(found.summary, out / "summary.parquet", made_by)
    clean = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in found.rows.to_dict("records")
    ]
    write_json(out / "summary.json", {"rows": clean, "provenance": made_by})
    return ["answers.parquet", name, *(["summary.parquet"] if found.summary is not None else []), "summary.json"]


def named(chosen: Iterable[Choice], mode: str | Mode) -> dict[str, Intervention]:
    """The intervention of every choice at every strength by its name; a choice that is there twice counts once.

    mode: as `mask` takes it. Raises MoELensError for another, and where one name stands for different experts.
    """
    mode, different = parse_mode(mode), expect_choices(chosen)
    repeated = [name for name, count in Counter(choice.name for choice in different).items() if count > 1]
    if repeated:
        raise MoELensError(
            f"different experts need different names; these repeat: {', '.join(repeated)}; rename a file"
        )
    return {mode.label(choice.name, dose): mode.on(choice.experts, dose) for choice in different for dose in mode.doses}


def with_saved(masks: Mapping[str, Intervention], saved: Mapping[str, Intervention]) -> dict[str, Intervention]:
    """The interventions of masks and saved ones; MoELensError where a name stands for two."""
    both = [name for name in saved if name in masks or name == UNMASKED]
    if both:
        raise MoELensError(f"the saved intervention {both[0]!r} has the name of another run; rename its folder")
    return {**masks, **saved}


def check_choices(lens: MoELens, chosen: Iterable[Choice], mode: str | Mode) -> None:
    """MoELensError, naming layer and experts, unless every choice can be masked in this model."""
    for intervention in named(chosen, mode).values():
        check_interventions((intervention,), lens.architecture)


def masking_rows(
    answers: pd.DataFrame,
    chosen: Sequence[Choice],
    mode: str | Mode,
    *,
    saved: Mapping[str, Intervention] = MappingProxyType({}),
    beside: Drawn = MappingProxyType({}),
    usage: pd.DataFrame | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for the unmasked run, for each choice at each strength and for each saved intervention.

    Columns: intervention, set (its name without the strength), family, experts, size, mode, strength, positions,
    steps, then those of `summarise`, `q_value`: p_value corrected for the number of rows that are no controls
    (Benjamini-Hochberg), and those of `against_random` for EM, against the random sets of the same strength. Each
    control has a row of its own and one for the mean of its sets.
    """
    mode = parse_mode(mode)
    unmasked = answers[answers["intervention"] == UNMASKED]
    nothing = {"intervention": UNMASKED, "set": UNMASKED, "family": UNMASKED, "experts": "", "size": 0.0}
    parts = [pd.DataFrame([nothing | {"mode": None} | summarise(unmasked, seed=seed)])]
    for dose in mode.doses if chosen else ():
        labels = {mode.label(choice.name, dose): choice.name for choice in chosen}
        own = answers[answers["intervention"].isin([UNMASKED, *labels])].replace({"intervention": labels})
        rows = _rows(own, chosen, usage, seed).assign(mode=mode.name, strength=dose)
        rows["positions"], rows["steps"] = str(mode.positions), str(mode.steps)
        rows["intervention"] = [mode.label(name, dose) for name in rows["set"]]
        parts.append(rows)
    for name, intervention in saved.items():
        about = _about_saved(name, intervention)
        own = answers[answers["intervention"] == name]
        about |= against_twins(answers, name, intervention, beside, usage=usage, seed=seed)
        parts.append(pd.DataFrame([about | summarise(own, unmasked, seed=seed)]))
    table = pd.concat(parts, ignore_index=True)
    columns = ("intervention", "set", "family", "experts", "size", "mode", "strength", "positions", "steps")
    table = table.reindex(columns=[*columns, *(name for name in table if name not in columns)])
    if "p_value" in table:
        table["q_value"] = q_values(table["p_value"].where(~table["family"].isin([CONTROL, MEAN])))
    return table.astype({"strength": float})


def _rows(answers: pd.DataFrame, chosen: Sequence[Choice], usage: pd.DataFrame | None, seed: int) -> pd.DataFrame:
    """The rows of the choices at one strength and of the means of controls; `set` says whose each is."""
    by_name = dict(iter(answers.groupby("intervention", sort=False)))
    unmasked = by_name[UNMASKED]
    rows = [_about(choice) | summarise(by_name[choice.name], unmasked, seed=seed) for choice in chosen]
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
        about = {"set": control, "family": MEAN, "experts": f"mean of {len(members)} sets", "size": members[0].size}
        told = summarise(mean, unmasked, seed=seed)
        ratios = [ratio for row in rows if row["set"] in names and (ratio := row["memory_ratio"]) is not None]
        told["memory_ratio"] = float(np.mean(ratios)) if ratios else None
        rows.append(about | told)
    drawn = [choice for choice in chosen if choice.family == CONTROL]
    own = [one for one in chosen if one.family != CONTROL]
    compared = against_random(answers, own, drawn, "em", usage=usage, seed=seed)
    table = pd.DataFrame(rows)
    compared = compared.rename(columns={"intervention": "set"})
    return table if compared.empty else table.merge(compared, on="set", how="left")


def _about(choice: Choice) -> dict[str, Any]:
    """What was masked."""
    return {"set": choice.name, "family": choice.family, "experts": str(choice.experts), "size": choice.size}


def _about_saved(name: str, intervention: Intervention) -> dict[str, Any]:
    """What a saved intervention is."""
    experts = getattr(intervention, "experts", ExpertSet())
    about = _about(Choice(name, SAVED, experts)) | {"intervention": name, "mode": type(intervention).__name__.lower()}
    return about | {"positions": str(intervention.positions), "steps": str(intervention.steps)}


def _with_first(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table with a column moved to the front."""
    return table[[column, *(name for name in table if name != column)]]
