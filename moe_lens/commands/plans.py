"""Plans: what a run will do and by which thresholds it is judged, written before later runs and held by them."""

import json
from pathlib import Path
from typing import Any

from moe_lens.commands import console
from moe_lens.errors import MoELensError
from moe_lens.storage import as_json, read_sealed_json, write_sealed_json


def hold_to_plan(path: Path, plan: dict[str, Any], measured_on: dict[str, Any]) -> str:
    """Write the plan at the first run, hold later ones to it; returns the stage, "exploratory" or "confirmatory".

    measured_on: the model and the examples. A run on those that the plan was written for is exploratory, also when it
    is done again; on others, under the same plan, it is confirmatory.
    Raises MoELensError for a run that departs from the plan, naming in what, and for a plan changed by hand.
    """
    here = json.loads(as_json({"plan": plan, "written_for": measured_on}))
    if not path.exists():
        write_sealed_json(path, here)
        console.say(f"the plan is written to {path}: later runs with it, on other data or trainings, are confirmatory")
        return "exploratory"
    there = read_sealed_json(path, remedy="a plan that was changed confirms nothing: write a new one")
    old, new = there["plan"], here["plan"]
    differing = [name for name in old | new if old.get(name) != new.get(name)]
    told = [f"its {name} is {old.get(name)}, here it is {new.get(name)}" for name in differing]
    if told:
        raise MoELensError(
            f"this run departs from the plan in {path}: {'; '.join(told)}. Run it as planned, or write another plan"
        )
    if there["written_for"] == here["written_for"]:
        console.say(f"held to the plan in {path}, on the model and data it was written for: exploratory")
        return "exploratory"
    console.say(f"held to the plan in {path}, on another model or other data than it was written for: confirmatory")
    return "confirmatory"
