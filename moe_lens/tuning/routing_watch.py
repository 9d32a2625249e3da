"""RoutingWatch: what the routers do while they, or the experts, are trained: load, entropy, dead experts, drift."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from moe_lens.data import Example
from moe_lens.lens.lens import MoELens
from moe_lens.statistics import RouterLoad, SelectedExperts
from moe_lens.tuning.methods import Trainable

WATCHED = 32
"""Of the dev examples the first so many are watched."""
NUMBERS = ("entropy", "load_entropy", "max_load", "unused", "drift")


class RoutingWatch:
    """Compares how a lens routes a few examples with how it did when this was made, as training begins.

    trained: what is trained; what it adds to the model is in force while it routes.
    """

    def __init__(self, lens: MoELens, examples: Sequence[Example], trained: Trainable) -> None:
        self._lens, self._trained = lens, trained
        self._examples = [replace(one, id=str(place)) for place, one in enumerate(examples[:WATCHED])]
        self._chosen: pd.DataFrame | None = None
        self.start = self.now()

    def now(self) -> dict[str, list[float]]:
        """By number of NUMBERS and "layer" one for each MoE layer, as `course` takes them.

        entropy, load_entropy, max_load, unused: as in `RouterLoad`. drift: the share of the tokens' selected experts
        that were not selected at the start.
        """
        with self._lens.intervene(*self._trained.interventions()):
            load, chosen = self._lens.measure(self._examples, RouterLoad(), SelectedExperts(), progress=False)
        now = chosen.table().drop(columns=["rank", "weight"])
        self._chosen = now if self._chosen is None else self._chosen
        shared = now.merge(self._chosen).groupby("layer").size()
        table = load.table().set_index("layer")
        table["drift"] = 1 - shared.reindex(table.index, fill_value=0) / now.groupby("layer").size()
        return {name: table.reset_index()[name].astype(float).tolist() for name in ("layer", *NUMBERS)}


def course(found: Sequence[tuple[int, dict[str, list[float]]]]) -> pd.DataFrame:
    """What `RoutingWatch` found after steps, a row for each of these and layer: step, layer, NUMBERS."""
    parts = [pd.DataFrame(numbers).assign(step=step) for step, numbers in found]
    columns = ["step", "layer", *NUMBERS]
    return (
        pd.concat(parts, ignore_index=True)[columns].astype({"layer": int}) if parts else pd.DataFrame(columns=columns)
    )
