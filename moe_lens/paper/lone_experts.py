"""One expert alone in its layer: the interventions, whose answer comes out, and the case that shows both (Figure 1)."""

import pandas as pd

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Force, Intervention, TopK
from moe_lens.metrics import exact_match


def alone(layer: int, expert: int) -> tuple[Intervention, ...]:
    """What leaves one expert alone in its layer, with the old sum of the weights."""
    return TopK(1, layers=(layer,)), Force(ExpertSet.of({layer: [expert]}), weights="sum")


def whose(said: str, example: Example) -> str:
    """Whose answer it is, by exact match: "context", "memory" or "other"."""
    if exact_match(said, example.answers):
        return "context"
    return "memory" if exact_match(said, example.memory) else "other"


def case_of(changed: pd.DataFrame, ids: list[str]) -> tuple[str, int]:
    """The first example, and of it the first layer, in which experts alone give either answer."""
    for name in ids:
        for layer, part in changed[changed["id"] == name].groupby("layer"):
            if {"context", "memory"} <= set(part["says"]):
                return name, int(layer)
    raise MoELensError(
        f"of {len(ids)} questions none has a layer in which one expert alone gives the context's answer and another "
        "memory's; take other --data or another model"
    )
