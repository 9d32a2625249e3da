"""What a model will take, from its configuration: memory by dtype and capture, operations, and which devices do."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pandas as pd

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.listed import normalize
from moe_lens.commands import console
from moe_lens.errors import MoELensError
from moe_lens.lens.footprint import DEVICES, Footprint, Work, plan_rows
from moe_lens.lens.loading import load_skeleton

USED = 0.3
"""The share of a device's peak that the times suppose: a guess, which a run of one's own replaces."""
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}


def published() -> dict[str, Path]:
    """Folders of the configurations of known models that come with the package, by name."""
    return {path.name: path for path in sorted(Path(str(files("moe_lens"))).glob("architecture/published/*"))}


def parse_work(text: str) -> Work:
    """The examples, tokens and batch of EXAMPLESxTOKENSxBATCH; MoELensError for anything else."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text.strip())
    if found is None:
        raise MoELensError(f"--work is EXAMPLESxTOKENSxBATCH, such as 1000x512x8; got {text!r}")
    return Work(*map(int, found.groups()))


def plan(name: str, work: Work, *, dtype: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Prints what a model will take. name: a known one's, a folder, a config.json or a hub id."""
    folder = published().get(name.casefold(), name)
    skeleton = load_skeleton(folder, dtype=console.dtype_named(dtype), trust_remote_code=trust_remote_code)
    normalize(skeleton)
    architecture = MoEArchitecture.of(skeleton)
    footprint = Footprint.of(skeleton, architecture)
    tables = plan_rows(footprint, work)
    counts = footprint.counts
    told = {
        "model": name,
        "layers": architecture.in_short(),
        "parameters": counts.total,
        "of a token": counts.activated,
        "gigaflop of a token": footprint.flops(1, work.tokens) / 1e9,
    }
    if as_json:
        print(json.dumps({"found": told, **tables}, indent=2))
        return
    size = f"{counts.total / 1e9:.1f} billion parameters, {counts.activated / 1e9:.1f} of a token"
    console.say(f"{name}: {told['layers']}; {size}; {told['gigaflop of a token']:.1f} gigaflop of a token")
    console.show(pd.DataFrame(tables["weights"]), title="Weights")
    console.show(pd.DataFrame(tables["devices"]), title="Devices that hold weights and a batch")
    console.show(pd.DataFrame(tables["captures"]), title=f"Captures of {work.batch} texts of {work.tokens} tokens")
    runs = pd.DataFrame(tables["runs"])
    for device in DEVICES:
        runs[f"1 {device.name}"] = [_time(peta * 1e3 / (USED * device.teraflops)) for peta in runs["petaflop"]]
    console.show(runs, title=f"{work.examples} examples; times at {USED:.0%} of a device's peak, a guess")


def _time(seconds: float) -> str:
    unit = next((name for name, size in reversed(SECONDS.items()) if seconds >= size), "s")
    return f"{seconds / SECONDS[unit]:.2g} {unit}"
