"""Plans: what a masking run will do and how it is judged, written at the first run and held to by later ones."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_lens.choosing.verdicts import THRESHOLD
from moe_lens.commands import console
from moe_lens.commands.masking_tasks import Tasks
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions import Mode
from moe_lens.metrics import Metric, metrics_named
from moe_lens.storage import as_json, read_sealed_json, write_sealed_json


def planned(
    tasks: Tasks,
    mode: Mode,
    experts: dict[str, Any],
    saved: dict[str, str],
    controls: int | str,
    max_new_tokens: int,
    metrics: Sequence[Metric],
) -> dict[str, Any]:
    """What a plan holds runs to; experts: as `NamedExperts.told` says them."""
    sets = {"sets": experts["chosen"], "layers": experts["layers"], "saved": saved, "random sets": controls}
    names = [metric.name for metric in metrics_named(["em", *metrics])]
    judged = {"metrics": names, "threshold": THRESHOLD, "level": 0.95, "seed": experts["seed"]}
    asked = {"targets": tasks.targets, "spared": tasks.spared, "max_new_tokens": max_new_tokens}
    return mode.facts() | sets | asked | judged


def hold_to_plan(path: Path, plan: dict[str, Any], weights: str, examples: Iterable[Example]) -> str:
    """Write the plan at the first run, hold later ones to it; returns the stage, "exploratory" or "confirmatory".

    A run under the plan is confirmatory where its model is another one (`weights`, a digest), or none of its examples
    was among those that the plan was written for; else it is exploratory, as the first one is.
    Raises MoELensError for a run that departs from the plan, naming in what, and for a plan changed by hand.
    """
    known = sorted({hashlib.sha256(as_json(asdict(example)).encode()).hexdigest()[:16] for example in examples})
    here = json.loads(as_json({"plan": plan, "weights": weights, "examples": known}))
    if not path.exists():
        write_sealed_json(path, here)
        console.say(f"the plan is written to {path}; later runs with it, on other data or trainings, are confirmatory")
        return "exploratory"
    there = read_sealed_json(path, remedy="a plan that was changed confirms nothing: write a new one")
    old, new = there["plan"], here["plan"]
    differing = [name for name in old | new if old.get(name) != new.get(name)]
    if differing:
        told = "; ".join(f"its {name} is {old.get(name)}, here it is {new.get(name)}" for name in differing)
        raise MoELensError(
            f"this run departs from the plan in {path}: {told}. Run it as planned, or write another plan"
        )
    again = len(set(known) & set(there["examples"])) if there["weights"] == here["weights"] else 0
    stage = "exploratory" if again else "confirmatory"
    why = f"{again} of its {len(known)} examples, and the model, are those of the plan" if again else "all is new to it"
    console.say(f"held to the plan in {path}: {stage}, since {why}")
    return stage
