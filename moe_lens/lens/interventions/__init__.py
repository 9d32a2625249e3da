"""Interventions, one file for each kind; a new one is a class that is listed here."""

from collections.abc import Callable
from pathlib import Path

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions.directions import AddVector, OnActivations, ProjectOut
from moe_lens.lens.interventions.layer_values import SITES
from moe_lens.lens.interventions.modes import Mode, parse_mode
from moe_lens.lens.interventions.patching import Patch, Replay, SetTo
from moe_lens.lens.interventions.per_row import Rows
from moe_lens.lens.interventions.place import Here, Steps
from moe_lens.lens.interventions.protocol import Intervention, OnExperts, OnGating, Placed
from moe_lens.lens.interventions.rerouting import Bias, Force, LogitBias, Reroute, TopK
from moe_lens.lens.interventions.sources import Run, context_vectors, mean_values
from moe_lens.lens.interventions.steering import Steer
from moe_lens.lens.interventions.stored import read_folder
from moe_lens.lens.interventions.together import check_interventions
from moe_lens.lens.interventions.transplanting import RouteAs
from moe_lens.lens.interventions.zeroing import Renormalize, Scale, Zero

__all__ = [
    "KINDS",
    "MODES",
    "SITES",
    "AddVector",
    "Bias",
    "Force",
    "Here",
    "Intervention",
    "LogitBias",
    "Mode",
    "OnActivations",
    "OnExperts",
    "OnGating",
    "Patch",
    "Placed",
    "ProjectOut",
    "Renormalize",
    "Replay",
    "Reroute",
    "RouteAs",
    "Rows",
    "Run",
    "Scale",
    "SetTo",
    "Steer",
    "Steps",
    "TopK",
    "Zero",
    "check_interventions",
    "check_mode",
    "context_vectors",
    "load_intervention",
    "mean_values",
    "parse_mode",
]

MODES: dict[str, Callable[[ExpertSet], OnExperts]] = {kind.mode: kind for kind in (Zero, Renormalize, Reroute)}
"""The interventions that silence an `ExpertSet`, by name; `Mode` knows more."""

KINDS: dict[str, type[Intervention]] = {
    kind.__name__: kind
    for kind in (
        AddVector,
        Bias,
        Force,
        LogitBias,
        ProjectOut,
        Renormalize,
        Reroute,
        RouteAs,
        Rows,
        Scale,
        SetTo,
        Steer,
        TopK,
        Zero,
    )
}
"""The interventions that can be saved, by name."""


def load_intervention(folder: str | Path) -> Intervention:
    """The intervention that `Intervention.save` wrote to a folder, equal to what it was.

    Raises MoELensError for a folder without one, or with one that is not, or no longer, what was saved.
    """
    found, digest = read_folder(folder, KINDS)
    if not isinstance(found, Intervention) or found.digest != digest:
        raise MoELensError(f"{folder} is damaged, or of another version: it is not what was saved there; save it again")
    return found


def check_mode(mode: str) -> None:
    """MoELensError unless it is one of `MODES`."""
    if mode not in MODES:
        raise MoELensError(f"the mode of masking must be one of {', '.join(MODES)}; got {mode!r}")
