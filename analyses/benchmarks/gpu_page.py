"""What `make gpu-check` found, as one table and as the page docs/gpu.md."""

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from gpu_parts import Where
from turns import Row, compared, is_accelerator

from moe_lens.results import PACKAGES
from moe_lens.storage import write_bytes

PAGE = """\
# On a GPU

*Written by `make gpu-check`, of the parts {parts}.*

{facts}

The model is a random OLMoE-1B-7B in bfloat16. Each way takes `n` turns with the plain model, the first of its kind:
`ms` is the median on the clock, `x plain` that of its time by the plain model's in the same turn, in brackets the
quartiles. `peak gib` is the most memory that the devices held, `added gib` what of it they did not hold before. A
training step keeps what it trains in float32; `stock` is a step as transformers runs it. Families are tiny models under
each check of the doctor.

{table}

## Failed

{failed}

## Not to be checked: the bare model itself does not run here

{not_run}
"""
SHOWN = ("what", "way", "outcome", "n", "ms", "x_plain", "peak_gib", "added_gib")


def table_of(rows: Sequence[Row], device: str) -> pd.DataFrame:
    """A row for each way, as `compared` has it, and for each check of families, with how many had which outcome."""
    clock = "seconds" if is_accelerator(device) else "cpu_seconds"
    found = []
    for part, what in dict.fromkeys((row["part"], row["what"]) for row in rows):
        of = [row for row in rows if (row["part"], row["what"]) == (part, what)]
        found.append(counted(of) if "family" in of[0] else compared(of, ["part", "what"], clock))
    return pd.concat(found, ignore_index=True).reindex(columns=[*SHOWN])


def counted(rows: Sequence[Row]) -> pd.DataFrame:
    """Of each check of families how many had which outcome."""
    checks = pd.DataFrame(rows).groupby(["part", "what", "way"], sort=False)["outcome"]
    told = checks.agg(lambda its: ", ".join(f"{count} {outcome}" for outcome, count in its.value_counts().items()))
    return told.reset_index()


def failures(rows: Sequence[Row]) -> list[str]:
    """What failed, and with what error; nothing else makes the exit code 1."""
    told = {f"{_named(row)}: {row['error']}": None for row in rows if "error" in row}
    return list(told | {f"{_named(row)}: {row['detail']}": None for row in rows if row.get("outcome") == "failed"})


def not_run(rows: Sequence[Row]) -> list[str]:
    """Which families' bare models do not run, and why not."""
    without = [row for row in rows if row.get("outcome") == "no model"]
    return list(dict.fromkeys(f"{row['family']}, {row['what']}: {row['detail']}" for row in without))


def _named(row: Row) -> str:
    return ", ".join(row[name] for name in ("part", "what", "family", "way") if name in row)


def facts(where: Where) -> dict[str, str]:
    """The cards and the versions, by name."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards]
    found = {"device": "; ".join(names) if is_accelerator(where.device) else f"CPU, {platform.machine()}"}
    if where.size != "olmoe":
        found["model"] = where.size
    if is_accelerator(where.device):
        found |= {"CUDA": str(torch.version.cuda), "driver": driver()}
    versions = {name: metadata.version(name) for name in PACKAGES}
    return found | {"Python": platform.python_version()} | versions | {"torch": torch.__version__}


def driver() -> str:
    """The version of NVIDIA's driver, as its own tool has it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: there is no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return ", ".join(dict.fromkeys(done.stdout.split())) or f"unknown: nvidia-smi says {done.stderr.strip()!r}"


def write(path: Path, rows: Sequence[Row], device: str, known: Mapping[str, str], parts: Sequence[str]) -> None:
    """The page of what these parts have found so far, whole or not at all. known: `facts`."""
    told = {
        "parts": ", ".join(parts),
        "facts": "\n".join(f"- {name}: {value}" for name, value in known.items()),
        "table": markdown(table_of(rows, device)),
        "failed": listed(failures(rows)),
        "not_run": listed(not_run(rows)),
    }
    write_bytes(path, PAGE.format(**told).encode())


def listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "Nothing."


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, what is missing blank; fractions with two decimals, counts whole."""
    rows = [[_cell(name, value) for name, value in zip(table, row, strict=True)] for row in table.to_numpy()]
    head, *lines = [f"| {' | '.join(row)} |" for row in ([name.replace("_", " ") for name in table], *rows)]
    return "\n".join([head, "|---" * len(table.columns) + "|", *lines])


def _cell(name: str, value: object) -> str:
    if not isinstance(value, str):
        return "" if pd.isna(value) else f"{value:.0f}" if name == "n" else f"{value:.2f}"
    return value.replace("|", "\\|")
