"""Several ways to do a thing, timed in turns, so that what else the machine does falls on all of them alike."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from moe_lens import MoELensError
from moe_lens.checks.suite import CRASHES

Row = dict[str, Any]


def in_turns(ways: Mapping[str, Callable[[], object]], turns: int, device: str) -> Iterator[Row]:
    """Of each turn and way what `timed` gives, as it comes; every other turn runs backwards.

    ways: the first of them is the plain one. They run once untimed before. A way that a crash ends is told with its
    `error`, and takes no more turns.
    """
    left, plain = dict(ways), next(iter(ways))
    for turn in range(-1, turns):
        for name in list(left)[:: -1 if turn > 0 and turn % 2 else 1]:
            try:
                found = timed(left[name], device)
            except CRASHES as crash:
                del left[name]
                found = {"error": in_words(crash)}
            if turn >= 0 or "error" in found:
                yield {"way": name, "plain": plain, "turn": turn, **found}


def in_words(crash: BaseException) -> str:
    """The type of a crash, and the first of what it says."""
    return f"{type(crash).__name__}: {crash}".strip().splitlines()[0][:300]


def timed(run: Callable[[], object], device: str) -> Row:
    """The seconds of a run, and bytes of memory.

    seconds: on the clock. cpu_seconds: of the CPU's work, which other processes do not blur. peak: of `peak_bytes`.
    added: what of the peak was not held before the run; of a process on the CPU, what its peak has grown by.
    """
    synchronize(device)
    for place in held(device):
        torch.cuda.reset_peak_memory_stats(place)
    before, started, worked = peak_bytes(device), time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    seconds, cpu_seconds, peak = time.perf_counter() - started, time.process_time() - worked, peak_bytes(device)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak, "added": peak - before}


def is_accelerator(device: str) -> bool:
    """Whether a device is a CUDA GPU; MoELensError for one that is neither that nor the CPU, or is not there."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise MoELensError(f"expected the device cpu or cuda; got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MoELensError(
            f"there is no CUDA device: torch {torch.__version__} sees none; install a build of it for CUDA, or say "
            "--device cpu"
        )
    return kind == "cuda"


def held(device: str) -> list[int]:
    """The GPUs on which this process holds memory, no others: to ask one for something takes memory there."""
    if not is_accelerator(device):
        return []
    return [place for place in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(place)]


def synchronize(device: str) -> None:
    """Wait until the GPUs are done; on the CPU there is nothing to wait for."""
    for place in held(device):
        torch.cuda.synchronize(place)


def peak_bytes(device: str) -> int:
    """The most memory that the process held: on GPUs by torch since its last reset, else in all since its start."""
    if is_accelerator(device):
        return sum(map(torch.cuda.max_memory_allocated, held(device)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compared(rows: Iterable[Row], keys: Sequence[str], clock: str = "seconds") -> pd.DataFrame:
    """One row per way, in the order in which they came: its time beside that of the plain way with the same keys.

    n: turns. outcome: "failed" with the error of a way that crashed, or what a row that was not timed says.
    ms, x_plain: on the clock, and by the plain way's time in the same turn, as `clock` has it: medians, in brackets the
    quartiles. peak_gib, added_gib: the highest.
    """
    table = pd.DataFrame(rows).reindex(columns=[*keys, *COLUMNS])
    ways = table.groupby([*keys, "way"], sort=False)
    plain = {names: way.dropna(subset="turn").set_index("turn")[clock] for names, way in ways}
    found = []
    for names, way in ways:
        of = plain.get((*names[:-1], way["plain"].iloc[0]), pd.Series(dtype=float))
        found.append(dict(zip((*keys, "way"), names, strict=True)) | _compared(way, of, clock))
    return pd.DataFrame(found, columns=[*keys, "way", "outcome", "n", "ms", "x_plain", "peak_gib", "added_gib"])


COLUMNS = ("way", "plain", "turn", "seconds", "cpu_seconds", "peak", "added", "outcome", "error")


def _compared(way: pd.DataFrame, plain: pd.Series, clock: str) -> Row:
    """The row of `compared` for one way, of its rows and the plain way's times by turn."""
    done = way.dropna(subset="seconds").set_index("turn")
    errors, outcomes = way["error"].dropna(), way["outcome"].dropna()
    row: Row = {"outcome": f"failed: {errors.iloc[0]}" if len(errors) else "; ".join(outcomes)}
    if len(done):
        row |= {"n": len(done), "ms": quartiles(done["seconds"] * 1000)}
        row |= {"x_plain": quartiles((done[clock] / plain).dropna())}
        row |= {f"{name}_gib": done[name].max() / 2**30 for name in ("peak", "added")}
    return row


def quartiles(values: pd.Series) -> str:
    """The median, and in brackets the lower and the upper quartile; "" of no values."""
    if not len(values):
        return ""
    low, median, high = values.quantile([0.25, 0.5, 0.75])
    form = ".2f" if high < 100 else ".0f"
    return f"{median:{form}} ({low:{form}} to {high:{form}})"
