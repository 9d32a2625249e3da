"""Random sets for saved interventions that are on a set of experts: the same, done to as many others of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from moe_lens.choosing.controls import Controls, against_random
from moe_lens.choosing.selection import Choice
from moe_lens.lens.interventions import Intervention, OnExperts

SAVED = "saved"
"""The family of interventions that were saved."""
Drawn = Mapping[str, Sequence[Choice]]
"""The random sets of each saved intervention, by its name."""


def drawn_for(saved: Mapping[str, Intervention], controls: Controls, *, n_experts: int, seed: int) -> Drawn:
    """The random sets of those on a set of experts; of others, as a vector or a bias of all experts, there are none."""
    named = {name: own.experts for name, own in saved.items() if isinstance(own, OnExperts)}
    found = {name: controls.drawn([Choice(name, SAVED, experts)], n_experts=n_experts, seed=seed)
             for name, experts in named.items()}  # fmt: skip
    return {name: drawn for name, drawn in found.items() if drawn}


def twins(saved: Mapping[str, Intervention], drawn: Drawn) -> dict[str, Intervention]:
    """Each saved intervention on each of its random sets, by name."""
    changed: dict[str, Any] = dict(saved)
    return {
        twin_name(name, one): replace(changed[name], experts=one.experts)
        for name, sets in drawn.items()
        for one in sets
    }


def twin_name(name: str, control: Choice) -> str:
    """What a saved intervention on a random set is called."""
    return f"{name} on {control.name}"


def against_twins(
    answers: pd.DataFrame, name: str, saved: Intervention, drawn: Drawn, *, usage: pd.DataFrame | None, seed: int
) -> dict[str, Any]:
    """The columns of `against_random` for EM of a saved intervention; none where it has no random sets."""
    if name not in drawn or not isinstance(saved, OnExperts):
        return {}
    labels = {twin_name(name, one): one.name for one in drawn[name]}
    own = answers[answers["intervention"].isin([name, *labels])].replace({"intervention": labels})
    choice = Choice(name, SAVED, saved.experts)
    [found] = against_random(own, [choice], drawn[name], "em", usage=usage, seed=seed).to_dict("records")
    return {str(column): value for column, value in found.items() if column != "intervention"}
