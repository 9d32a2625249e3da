"""The memory of processes that train one model: a copy in each, or the model split over them from the start.

    python analyses/benchmarks/sharded_training.py --out RUN/sharded

The model is a random OLMoE of a few layers, saved; torchrun's processes train its routers for two steps on the CPU.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pandas as pd
import torch
from opened import examples_of, random_lens
from typer import Option

from moe_lens import MoELens
from moe_lens.commands import console
from moe_lens.commands.options import BaseOpening
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder
from moe_lens.tuning import Schedule, TuneRouters, tune
from moe_lens.tuning.processes import Processes

WAYS = {
    "a copy in each": (False, False),
    "split after each loaded a copy": (True, True),
    "split, the first loaded it": (True, False),
}
"""Whether the model is split, and, if it is, whether the other processes load it too."""


def main(
    out: Annotated[Path, Option(help="Folder for sharded.parquet.")],
    processes: Annotated[int, Option(help="Processes that train together.", min=2)] = 2,
    layers: Annotated[int, Option(help="Layers of the model, of 26 million parameters each.", min=1)] = 8,
    way: Annotated[str, Option(hidden=True)] = "",
    model: Annotated[str, Option(hidden=True)] = "",
) -> None:
    """Print how much memory each process took at most, over the weights' size, and its seconds."""
    if way:
        print(json.dumps(trained(way, model)))
        return
    try_folder(out)
    rows = []
    with TemporaryDirectory() as folder:
        lens = random_lens("mid", layers=layers, device="cpu", dtype=torch.float32)
        size = sum(parameter.nbytes for parameter in lens.module.parameters()) / 2**20
        lens.module.save_pretrained(folder)  # type: ignore[operator]
        lens.tokenizer.save_pretrained(folder)
        del lens
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
        for name in WAYS:
            command = [sys.executable, *launch, "--out", str(out), "--model", folder, "--way", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    table = pd.DataFrame(rows).sort_values(["way", "process"], ignore_index=True)
    table["over_weights"] = table["mib"] / size
    facts = {"layers": layers, "processes": processes}
    write_table(table, out / "sharded.parquet", provenance(model="random", seed=0, facts=facts))
    console.show(table, title=f"MiB added at most by training {size:,.0f} MiB of weights")


def trained(way: str, model: str) -> dict[str, object]:
    """What this process added to its memory at most, in MiB, from before it opened the model."""
    split, whole = WAYS[way]
    process, started, before = Processes.current().rank, time.perf_counter(), peak()
    opening = BaseOpening(model)
    lens: MoELens = opening.load() if process == 0 or whole or not split else opening.load_shapes()
    examples = examples_of(lens, 8, 64)
    tune(lens, examples, (), TuneRouters(), Schedule(epochs=1, batch_size=4), max_length=None, shard=split)
    return {"way": way, "process": process, "mib": peak() - before, "seconds": time.perf_counter() - started}


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    console.run(main, shares=True)
