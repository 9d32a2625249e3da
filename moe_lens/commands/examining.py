"""What the doctor does: finds and checks a model, or a tiny one of every family, and says what came of it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from transformers import logging

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.listed import normalize
from moe_lens.checks.description import describe, in_words
from moe_lens.checks.each import PASSES
from moe_lens.checks.models_page import MARKS, family_refusals, family_row, models_page, versions
from moe_lens.checks.reference import bare_logits, padded
from moe_lens.checks.suite import CRASHES, FIRST_PASSES, run_checks
from moe_lens.checks.survey import survey_families
from moe_lens.commands import console
from moe_lens.commands.options import Opening
from moe_lens.lens.lens import MoELens
from moe_lens.lens.loading import load_skeleton
from moe_lens.results import provenance
from moe_lens.storage import try_folder, write_bytes


def examine(
    opening: Opening, prompts: Sequence[str], names: Sequence[str] | None, *, config_only: bool, as_json: bool
) -> pd.DataFrame:
    """Find and check one model and print the result; the table of `run_checks`, without rows if nothing is checked."""
    dtype = console.dtype_named(opening.dtype)
    skeleton = load_skeleton(opening.model, dtype=dtype, trust_remote_code=opening.trust_remote_code)
    normalize(skeleton)
    found = describe(skeleton, MoEArchitecture.of(skeleton))
    if not as_json:
        console.show(pd.DataFrame(in_words(found), columns=["what", "found"]), title=f"Found in {opening.model}")
    console.note(f"weights: {_gigabytes(skeleton):.2g} GB in {found['dtype']}")
    table = pd.DataFrame({"outcome": []})
    if not config_only:
        lens = opening.load()
        console.note(_forecast(lens, prompts, names))
        table = run_checks(lens, prompts, names=names, progress=True)
    if as_json:
        facts = {"prompts": prompts, "device": opening.device}
        made_by = provenance(model=opening.model, delta=opening.delta, facts=facts)
        print(json.dumps({"found": found, "checks": plain_rows(table), "made_by": made_by}, indent=2))
    elif not config_only:
        console.show(readable(table), title=f"Checks of {opening.model}")
    return table


def examine_families(names: Sequence[str] | None, *, as_json: bool, markdown: Path | None) -> pd.DataFrame:
    """Check a tiny model of every family and print the result; the table of `survey_families`."""
    if markdown:
        try_folder(markdown.parent)
    logging.set_verbosity_error()  # transformers says of many families which kernels they lack
    table, found = survey_families(names=names, progress=True)
    by_family = dict(list(table.groupby("family", sort=False)))
    if markdown:
        rows = [family_row(family, of_one, found.get(family)) for family, of_one in by_family.items()]
        refusals = [item for family, of_one in by_family.items() for item in family_refusals(family, of_one)]
        write_bytes(markdown, models_page(rows, refusals).encode())
    if as_json:
        made_by = provenance(model="families")
        print(json.dumps({"found": found, "checks": plain_rows(table), "made_by": made_by}, indent=2))
        return table
    marks = table.assign(mark=table["outcome"].map(MARKS)).pivot(index="family", columns="check", values="mark")
    marks = marks[list(dict.fromkeys(table["check"]))].reset_index()
    console.show(marks, title=f"Tiny models of {len(by_family)} families under {versions()}")
    for family, of_one in by_family.items():
        for item in family_refusals(family, of_one):
            console.say(item)
    failed = table[table["outcome"] == "failed"]
    if len(failed):
        console.show(readable(failed, "family"), title="Failed")
    worst = table.groupby("check", sort=False)[["error", "seconds"]].agg({"error": "max", "seconds": "sum"})
    console.say("largest differences: " + ", ".join(f"{name} {error:.1g}" for name, error in worst["error"].items()))
    console.say(f"{len(found)} of {len(by_family)} families are opened; {worst['seconds'].sum():.0f} s of checks")
    return table


def readable(table: pd.DataFrame, *first: str) -> pd.DataFrame:
    """The table of `run_checks` for people: errors as powers of ten, seconds, the detail last; columns before them."""
    shown = table[[*first, "check", "outcome", "error", "allowed", "seconds", "detail"]].copy()
    for column in ("error", "allowed"):
        shown[column] = [None if pd.isna(value) else f"{value:.1e}" if value else "0" for value in table[column]]
    shown["seconds"] = [f"{value:.1f}" for value in table["seconds"]]
    return shown


def plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `run_checks` as JSON can hold them: no number where a check was refused, "inf" for no bound."""
    rows = table.to_dict("records")
    return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if value != value else "inf" if value == float("inf") else value


def _forecast(lens: MoELens, prompts: Sequence[str], names: Sequence[str] | None) -> str:
    """What the checks will take, from one forward pass of the model as it is; MoELensError as from `padded`."""
    tokens = padded(lens, prompts)["input_ids"].numel()
    try:
        bare_logits(lens, prompts)  # the first pass of a process does more than a pass
        started = time.perf_counter()
        bare_logits(lens, prompts)
        one = time.perf_counter() - started
    except CRASHES as crash:
        return f"the model's own forward pass ends in {type(crash).__name__}: {crash}"
    passes = FIRST_PASSES + sum(count for name, count in PASSES.items() if names is None or name in names)
    return (
        f"one forward pass of {len(prompts)} texts ({tokens} tokens with pads) takes {one:.2g} s; "
        f"the checks take up to {passes} of them: about {passes * one:.0f} s"
    )


def _gigabytes(module: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e9
