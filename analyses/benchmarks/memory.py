"""A process's memory while many examples pass through a model: evaluated, measured and recorded.

    python analyses/benchmarks/memory.py --out RUN/memory

The model is a random OLMoE of a few layers. Each way runs in a process of its own, whose resident memory is read (on
Linux) whenever so many more examples have entered the model. The exit code is 1 where memory grows with their number.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from opened import examples_of, random_lens
from typer import Exit, Option

from moe_lens import CoActivation, ExpertSaliency, ExpertUsage, MoELensError
from moe_lens.causal import evaluate
from moe_lens.commands import console
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder

WAYS = ("evaluate", "lens.measure", "lens.records")
STATM = Path("/proc/self/statm")


def main(
    out: Annotated[Path, Option(help="Folder for memory.parquet.")],
    examples: Annotated[int, Option(help="Examples that pass.", min=20)] = 20_000,
    tokens: Annotated[int, Option(help="Tokens of a prompt, about.")] = 24,
    new_tokens: Annotated[int, Option(help="Tokens of an answer.")] = 4,
    batch_size: Annotated[int, Option(help="Examples per batch.")] = 64,
    bound: Annotated[float, Option(help="KiB that one more example may add.")] = 1,
    way: Annotated[str, Option(hidden=True)] = "",
) -> None:
    """Print each way's memory in MiB as examples pass, and what one more example adds."""
    if not STATM.exists():
        raise MoELensError(f"expected {STATM}, from which memory is read; there is none: run this on Linux")
    options = {"examples": examples, "tokens": tokens, "new-tokens": new_tokens, "batch-size": batch_size}
    if way:
        print(json.dumps(measured(way, examples, tokens, new_tokens, batch_size)))
        return
    try_folder(out)
    command = [sys.executable, __file__, "--out", str(out), *(f"--{name}={value}" for name, value in options.items())]
    rows = []
    for name in WAYS:
        done = subprocess.run([*command, "--way", name], stdout=subprocess.PIPE, text=True, check=True)
        rows += [{"way": name, **row} for row in json.loads(done.stdout.splitlines()[-1])]
    table = pd.DataFrame(rows)
    write_table(table, out / "memory.parquet", provenance(model="random", seed=0, facts=options))
    grown = growth(table)
    shown = table.pivot(index="examples", columns="way", values="mib")[list(WAYS)].round().astype(int).reset_index()
    console.show(shown, title=f"MiB held after so many examples, {options}")
    console.say(f"KiB that one more adds: {', '.join(f'{name} {value:.2f}' for name, value in grown.items())}")
    if (grown > bound).any():
        raise Exit(1)


def growth(table: pd.DataFrame) -> pd.Series:
    """KiB by which one more example raises each way's memory: the least-squares slope over the second half.

    What a process sets up once, and what the allocator takes while batches of new shapes come, lies in the first.
    """

    def slope(rows: pd.DataFrame) -> float:
        late = rows[rows["examples"] >= rows["examples"].max() / 2]
        away = late["examples"] - late["examples"].mean()
        return float((away * late["mib"]).sum() / (away**2).sum() * 1024)

    return pd.Series({str(way): slope(rows) for way, rows in table.groupby("way", sort=False)})


def measured(way: str, count: int, tokens: int, new_tokens: int, batch_size: int) -> list[dict[str, Any]]:
    """This process's resident memory at about twenty numbers of examples that have entered the model."""
    lens = random_lens("tiny", layers=None, device="cpu", dtype=torch.float32)
    examples = examples_of(lens, count, tokens)
    asked: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    runs: dict[str, Callable[[], object]] = {
        "evaluate": lambda: evaluate(lens, examples, max_new_tokens=new_tokens, **asked),
        "lens.measure": lambda: lens.measure(examples, ExpertUsage(), ExpertSaliency(), CoActivation(), **asked),
        "lens.records": lambda: sum(
            len(record.ids) for record in lens.records(examples, capture=("routing", "residual"), **asked)
        ),
    }
    rows: list[dict[str, Any]] = []
    entered = 0

    def look(module: torch.nn.Module, args: tuple[object, ...], named: dict[str, Any]) -> None:
        nonlocal entered
        if named["input_ids"].shape[1] == 1:  # the next token of an answer
            return
        if entered >= count // 20 * (len(rows) + 1):
            rows.append({"examples": entered, "mib": resident()})
        entered += len(named["input_ids"])

    with lens.module.register_forward_pre_hook(look, with_kwargs=True):
        found = runs[way]()
    if entered != count:
        raise MoELensError(f"expected {count} examples to enter the model; {entered} did")
    rows.append({"examples": entered, "mib": resident()})
    del found  # held until memory was read
    return rows


def resident() -> float:
    """MiB of memory that this process holds."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    console.run(main)
