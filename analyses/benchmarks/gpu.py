"""`make gpu-check`: what moe_lens does right and what it costs on the GPU of this machine, in minutes, offline.

    python analyses/benchmarks/gpu.py                              # all parts; writes docs/gpu.md
    python analyses/benchmarks/gpu.py --parts passes,sweep         # some of them; only prints
    python analyses/benchmarks/gpu.py --device cpu --size tiny     # tries the script itself, where there is no GPU

Each part runs in a process of its own and has a share of the time: what it has found when its time is up, or when it
fails, is kept. The exit code is 1 if a check or a part fails, 2 if there is no such device.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Annotated

import gpu_page
import gpu_parts
import torch
from opened import SETTINGS
from training_cost import known
from transformers import logging
from turns import Row, in_words, is_accelerator
from typer import Exit, Option

from moe_lens import MoELensError
from moe_lens.architecture.tiny import FAMILIES
from moe_lens.checks.suite import CRASHES
from moe_lens.commands import console

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
WHOLE = {"what": "the whole part", "way": "–"}
Run = Callable[[gpu_parts.Where, int, int], Iterator[Row]]


@dataclass(frozen=True)
class Part:
    """run: gives its rows, of one process's share. weight: its share of the time. processes: among how many at most."""

    run: Run
    weight: int
    processes: int = 1


PARTS = {
    "families": Part(gpu_parts.families, 30, processes=8),
    "passes": Part(gpu_parts.passes, 16),
    "attention": Part(gpu_parts.attention, 12),
    "statistics": Part(gpu_parts.statistics, 14),
    "sweep": Part(gpu_parts.sweep, 8),
    "training": Part(gpu_parts.training, 26),
    "devices": Part(gpu_parts.devices, 12),
}


def main(
    device: Annotated[str, Option(help="cuda, or cpu to try the script.")] = "cuda",
    size: Annotated[str, Option(help=f"Of the random model: {', '.join(SETTINGS)}.")] = "olmoe",
    parts: Annotated[str, Option(help="With commas, those to run.")] = ",".join(PARTS),
    families: Annotated[str, Option(help="With commas, those to check; default all.")] = ",".join(FAMILIES),
    minutes: Annotated[float, Option(min=0.1, help="That all parts together may take.")] = 7.5,
    page: Annotated[Path | None, Option(help="Where to write; default docs/gpu.md, of all parts on a GPU.")] = None,
) -> None:
    """Check and time what moe_lens does on this device, print one table and write it with the card's name."""
    chosen, of = known(parts, [*PARTS], "--parts"), known(families, FAMILIES, "--families")
    if size not in SETTINGS:
        raise MoELensError(f"--size must be one of {', '.join(SETTINGS)}; got {size!r}")
    whole = is_accelerator(device) and (size, chosen, of) == ("olmoe", [*PARTS], [*FAMILIES])
    page = PAGE if whole and page is None else page
    where, rows = gpu_parts.Where(device, size, tuple(of)), []
    facts = gpu_page.facts(where)
    end = time.monotonic() + 60 * minutes
    for place, name in enumerate(chosen):
        weights = [PARTS[later].weight for later in chosen[place:]]
        seconds = (end - time.monotonic()) * weights[0] / sum(weights)
        console.note(f"{name}: up to {seconds:.0f} s")
        rows += [{"part": name, **row} for row in run_part(PARTS[name], where, seconds)]
        if page:  # whatever happens in the next part
            gpu_page.write(page, rows, device, facts, chosen[: place + 1])
    title = ", ".join(f"{name} {value}" for name, value in facts.items())
    console.show(gpu_page.table_of(rows, device), title=title)
    failures = gpu_page.failures(rows)
    console.say(*failures)
    if failures:
        raise Exit(1)


def run_part(part: Part, where: gpu_parts.Where, seconds: float) -> list[Row]:
    """The rows of a part; one more where its time ended or a process of it did otherwise than by being done."""
    context, rows = get_context("spawn"), []
    processes: dict[Connection, SpawnProcess] = {}
    end, shares = time.monotonic() + seconds, min(part.processes, os.cpu_count() or 1)
    try:
        for share in range(shares):
            here, there = context.Pipe(duplex=False)
            processes[here] = context.Process(target=serve, args=(part.run, where, share, shares, there), daemon=True)
            processes[here].start()
            there.close()  # or else nobody would tell that the process has ended
        while processes and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(processes), timeout=left):
                try:
                    rows.append(pipe.recv())
                except (EOFError, OSError):  # ended, or in the middle of a row
                    ended = processes.pop(pipe)
                    ended.join(timeout=10)
                    if ended.exitcode:
                        rows.append(WHOLE | {"error": f"one of its processes ended with code {ended.exitcode}"})
        if processes:
            stopped = f"stopped after {seconds:.0f} s, with what it had found by then"
            rows.append(WHOLE | ({"outcome": stopped} if rows else {"error": f"it found nothing in {seconds:.0f} s"}))
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    return rows


def serve(run: Run, where: gpu_parts.Where, share: int, shares: int, pipe: Connection) -> None:
    """In a process of its own: send the rows of its share as they come, at the end that of the crash that ended it."""
    torch.set_num_threads(max(1, torch.get_num_threads() // shares))
    logging.set_verbosity_error()  # transformers says of many families which kernels they lack
    try:
        for row in run(where, share, shares):
            pipe.send(row)
    except CRASHES as crash:
        traceback.print_exc()
        pipe.send(WHOLE | {"error": in_words(crash)})


if __name__ == "__main__":
    console.run(main)
