"""A paper-sized model with random weights, opened: what captures, masks and masked generation cost beside plain ones.

    python analyses/benchmarks/full_size.py --out RUN/full_size
    python analyses/benchmarks/full_size.py --device cuda --out RUN/full_size_cuda

OLMoE-1B-7B takes 14 GB in bfloat16, on the CPU or on a GPU; --layers makes it smaller. `make gpu-check` measures this
and more on a GPU.
"""

import time
from pathlib import Path
from typing import Annotated

import opened
import pandas as pd
import turns as timing
from typer import Exit, Option

from moe_lens.commands import console
from moe_lens.results import provenance, write_table
from moe_lens.storage import try_folder


def main(
    out: Annotated[Path, Option(help="Folder for full_size.parquet.")],
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[str, Option(help=f"Of the model: {', '.join(opened.SETTINGS)}.")] = "olmoe",
    layers: Annotated[int | None, Option(help="Decoder layers; default the model's own, 16.")] = None,
    batch_size: Annotated[int, Option(help="Prompts in the one batch.")] = 4,
    tokens: Annotated[int, Option(help="Tokens of each prompt.")] = 64,
    turns: Annotated[int, Option(min=1, help="Turns that each way takes, after one that is not timed.")] = 5,
    new_tokens: Annotated[int, Option(help="Tokens generated after each prompt.")] = 8,
) -> None:
    """Time forward passes and generation, each way in turns with the plain one; exit code 1 if something fails."""
    try_folder(out)
    timing.is_accelerator(device)  # MoELensError for one that is not there
    started = time.perf_counter()
    lens = opened.random_lens(size, layers=layers, device=device)
    print(f"built in {time.perf_counter() - started:.0f} s", flush=True)
    examples = opened.examples_of(lens, batch_size, tokens)
    rows = [{"what": "forward pass", **row} for row in opened.checked(lens, examples)]
    ways = {
        "forward pass": opened.passes(lens, examples),
        f"{new_tokens} tokens generated": opened.generation(lens, examples, new_tokens),
    }
    for what, its_ways in ways.items():
        rows += [{"what": what, **row} for row in timing.in_turns(its_ways, turns, device)]
    facts = {"weights": "random", "dtype": "bfloat16", "device": device, "batch_size": batch_size, "tokens": tokens}
    facts |= {"layers": lens.architecture.n_layers, "parameters": sum(p.numel() for p in lens.module.parameters())}
    write_table(pd.DataFrame(rows), out / "full_size.parquet", provenance(model=size, seed=0, facts=facts))
    table = timing.compared(rows, ["what"], clock="cpu_seconds" if device == "cpu" else "seconds")
    console.show(table, title=f"A random model, {facts}")
    if table["outcome"].str.startswith("failed").any():
        raise Exit(1)


if __name__ == "__main__":
    console.run(main)
