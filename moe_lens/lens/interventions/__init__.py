"""Interventions on routing, one file for each kind; a new one is a class that is listed here."""

from collections.abc import Callable

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions.per_row import Rows
from moe_lens.lens.interventions.protocol import Intervention, OnExperts, check_interventions, excluded_by
from moe_lens.lens.interventions.rerouting import Reroute, WithoutExperts
from moe_lens.lens.interventions.zeroing import Renormalize, Zero

__all__ = [
    "MODES",
    "Intervention",
    "OnExperts",
    "Renormalize",
    "Reroute",
    "Rows",
    "WithoutExperts",
    "Zero",
    "check_interventions",
    "check_mode",
    "excluded_by",
]

MODES: dict[str, Callable[[ExpertSet], OnExperts]] = {kind.mode: kind for kind in (Zero, Renormalize, Reroute)}
"""The interventions on an `ExpertSet`, by name."""


def check_mode(mode: str) -> None:
    """MoELensError unless it is one of `MODES`."""
    if mode not in MODES:
        raise MoELensError(f"the mode of masking must be one of {', '.join(MODES)}; got {mode!r}")
