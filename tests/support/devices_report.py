"""Prints which features are right on pretend devices, family by family, and what each costs per layer.

    python tests/support/devices_report.py --out FOLDER                         # all families on one and two devices
    python tests/support/devices_report.py olmoe zaya --places two --features surveyed --out FOLDER

Each comparison is a line of FOLDER/features.csv, written as soon as a family is through; a family that is there already
is not run again. FOLDER/costs.csv has the waits and kernels per layer of each feature that is costed.
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from device_costs import COSTED, cost_per_layer
from device_features import FEATURES, SURVEYED, Outcome, differs, opened, outcome, outcomes
from placed_models import Place, placed
from pretend_device import pretend_devices
from tqdm.auto import tqdm
from transformers import logging

from moe_lens.architecture.tiny import FAMILIES, tiny_model

COLUMNS = ["family", "place", "feature", "right", "told"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="which families; default all")
    parser.add_argument("--places", default="one,two", help="with commas, how models are placed")
    parser.add_argument("--features", choices=["all", "surveyed"], default="all", help="which are tried")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for features.csv; what is there is not done again"
    )
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = tuple(FEATURES) if asked.features == "all" else SURVEYED
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "features.csv"
    done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
    with pretend_devices():
        for family in tqdm(asked.families, unit="family"):
            missing = [
                place
                for place in asked.places.split(",")
                if not ((done["family"] == family) & (done["place"] == place)).any()
            ]
            if missing:
                done = pd.concat([done, rows(family, missing, names)], ignore_index=True)
                done.to_csv(file, index=False)
        costs = pd.DataFrame([costed(name) for name in COSTED])
    costs.to_csv(asked.out / "costs.csv", index=False)
    print(told(done.fillna("")), costs.drop(columns="where").to_string(index=False), sep="\n\n")


def rows(family: str, places: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """Each feature of a family at each place: whether it is right, and how it is not."""
    start = time.process_time()
    cpu, parts = found(family, "cpu", names), []
    for place in places:
        here = found(family, place, names)
        named = {name: differs(here[name], cpu[name]) for name in here if name in cpu}
        table = pd.DataFrame({"feature": named.keys(), "told": named.values()})
        parts.append(table.assign(family=family, place=place, right=table["told"] == "")[COLUMNS])
        tqdm.write(f"{family} {place}: {sum(map(bool, named.values()))} wrong of {len(named)}")
    tqdm.write(f"{family}: {time.process_time() - start:.0f} CPU seconds")
    return pd.concat(parts, ignore_index=True)


def found(family: str, place: Place, names: Sequence[str]) -> dict[str, Outcome]:
    """What becomes of opening a family there, and if it opens of each feature."""
    opening = outcome(lambda: opened(placed(tiny_model(family), place)))
    if opening.kind != "done":
        return {"opening": opening}
    return {"opening": Outcome("done", None)} | outcomes(names, opening.value)


def costed(name: str) -> dict[str, object]:
    """A feature's cost for one more layer."""
    return {"feature": name, **asdict(cost_per_layer(name))}


def told(table: pd.DataFrame) -> str:
    """Right and wrong by place, wrong ones by feature and by what was said."""
    lines = []
    for place, part in table.groupby("place"):
        right = part["right"].astype(bool)
        lines += ["", f"{place}: {right.sum()} right, {(~right).sum()} wrong, of {part['family'].nunique()} families"]
        wrong = part[~right]
        for feature, families in wrong.groupby("feature", sort=False)["family"]:
            names = ", ".join(families) if len(families) < 9 else f"{len(families)} families"
            lines.append(f"  {feature}: {names}")
        for said, count in Counter(wrong["told"].str.slice(0, 160)).most_common(12):
            lines.append(f"    {count} x {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
