"""The page docs/performance.md, of the tables that performance.py kept."""

import platform
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from turns import compared, quartiles

from moe_lens.paper.markdown import markdown
from moe_lens.results import read_provenance, read_table

PAGE = """\
# What it costs beside other tools

*Written by `python analyses/benchmarks/performance.py`, of one thread of a CPU ({cpu}).*

{versions}

Each way takes turns with the plain one. Times are of CPU work over the plain way's in the same turn: the median over
turns, in brackets the quartiles; two equal runs differ by up to 0.1, by 0.2 on a machine that does other work besides.
`added MiB` is by how much a way raises the peak of a process that does nothing else, once it has done the same on one
text before. It is measured once, and the plain way, which keeps nothing, has some too: by as much as that others may
differ by chance. What a GPU makes of it: [cost.md](cost.md#on-a-gpu). A dash is what was not measured in this run. More
ways of this package, one by one: [cost.md](cost.md).

## Capturing

A random OLMoE of 218 million parameters in 8 layers of 64 experts, float32, 4 texts of 128 tokens; plain is
transformers' forward pass. All ways of capturing one thing were seen to capture the same numbers. transformers attends
by eager attention where it gives maps, TransformerLens always. Where a way is not in the table, the tool has none:
single experts' outputs are captured by moe_lens alone, since the experts of a layer run as one kernel, whose sum is all
that a hook sees. `routing` is router logits; moe_lens gives selected experts and gating weights with it, hooks and
TransformerLens can. `nothing` is a tool's own forward pass. nnterp runs with nnsight 0.6: it does not import with 0.8.

{captures}

{cheaper}

## Generating under interventions

16 tokens after each of 8 prompts of 48, the same model; plain is `model.generate`. An intervention acts in all layers,
on two experts of each.

{generation}

## Every expert's own effect

The organism's 64 experts, each zeroed on 32 examples; plain is one forward pass for each.

{sweep}

## Answering and scoring

150 questions of the organism of three tasks, in an order that mixes short and long answers; plain is a loop of
`model.generate` over batches of 32 in that order. Evaluation sorts by length, and rows that have ended leave the batch.

{answers}

## Training steps

A random OLMoE of 166 million parameters, batches of 4 × 256 tokens; plain is full fine-tuning as transformers runs it
(`stock`). `ceft` trains eight experts of each layer as slices of their own. PEFT's LoRA (rank 8) cannot name some
experts of a fused tensor, so it adapts all; `ceft-lora` adapts eight. `peak GB` is of a process of its own, weights
included. More of it, by number of experts and by size: [cost.md](cost.md).

{training}
"""
WHAT = ("plain", "nothing", "routing", "residual", "attention maps", "attention of the last token", "expert outputs")
TOOLS = ("transformers", "moe_lens", "nnterp", "transformer_lens")
LACKING = "*Not measured in this run; [cost.md](cost.md) has what other scripts measured.*"


def text(tables: Mapping[str, Path]) -> str:
    """The page of those tables that are there."""
    there = {part: path for part, path in tables.items() if path.exists()}
    found = {part: read_table(path) for part, path in there.items()}
    told = {
        part: beside_plain(found[part]) if part in found else LACKING for part in ("generation", "sweep", "answers")
    }
    told["captures"] = captured(found["captures"], found.get("memory")) if "captures" in found else LACKING
    told["cheaper"] = cheaper(found["captures"], found.get("memory")) if "captures" in found else ""
    told["training"] = trained(found["training"]) if "training" in found else LACKING
    asked = [read_provenance(path) for path in there.values()]
    tools = {name: facts[name] for name in TOOLS for facts in asked if name in facts}
    told["versions"] = "\n".join(f"- {name} {told_of(value)}" for name, value in tools.items())
    return PAGE.format(**told, cpu=platform.machine())


def told_of(versions: str) -> str:
    """The versions that performance.py keeps of a tool and its environment."""
    own, torch, transformers = versions.split()
    return f"{own}, with torch {torch} and transformers {transformers}"


def times(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each way the time over the plain one's, and its milliseconds."""
    return compared(rows.assign(what="").to_dict("records"), ["what"], clock="cpu_seconds")


def beside_plain(rows: pd.DataFrame) -> str:
    """A line for each way."""
    table = times(rows)
    return markdown([["way", "time / plain"], *table[["way", "x_plain"]].to_numpy()])


def captured(rows: pd.DataFrame, memory: pd.DataFrame | None) -> str:
    """A line for each way, those that capture one thing beside each other, with memory where it was measured."""
    table = times(rows).set_index("way")["x_plain"].to_frame()
    added = None if memory is None else memory.set_index("way")["added"] / 2**20
    table["added"] = "–" if added is None else added.reindex(table.index).map("{:.0f}".format)
    lines = [["captured", "by", "time / plain", "added MiB"]]
    for what in dict.fromkeys([*WHAT, *(of(way)[0] for way in table.index)]):
        lines += [[*of(row.Index), row.x_plain, row.added] for row in table.itertuples() if of(row.Index)[0] == what]
    return markdown(lines)


def of(way: str) -> tuple[str, str]:
    """What a way captures, and by which tool."""
    what, _, tool = way.partition(", ")
    return what, tool.replace("transformer_lens", "TransformerLens") or "transformers"


def cheaper(rows: pd.DataFrame, memory: pd.DataFrame | None) -> str:
    """Where another tool captures a thing in less time, by the medians, or less memory than this one, in sentences."""
    plain = rows[rows["way"] == rows["plain"]].set_index("turn")["cpu_seconds"]
    times = rows.assign(x=rows["cpu_seconds"] / rows["turn"].map(plain)).groupby("way")["x"].median()
    lines = least(times, ".2f", "less time")
    lines += [] if memory is None else least(memory.set_index("way")["added"] / 2**20, ".0f", "less memory (MiB)")
    return "\n".join(["Where another way takes less:", "", *lines] if lines else ["No other way takes less."])


def least(values: pd.Series, form: str, what: str) -> list[str]:
    """A sentence for each thing that another tool captures at a lower value than this one; values: by way."""
    lines = []
    for captured in dict.fromkeys(of(way)[0] for way in values.index):
        its = {of(way)[1]: value for way, value in values.items() if of(way)[0] == captured}
        best = min(its, key=its.get)
        if "moe_lens" in its and best != "moe_lens":
            lines.append(f"- {captured}: {best} takes {what}, {its[best]:{form}} beside {its['moe_lens']:{form}}.")
    return lines


def trained(rows: pd.DataFrame) -> str:
    """A line for each method: parameters that learn, time over stock, and memory."""
    lines = [["method", "trained millions", "time / stock", "peak GB"]]
    for way, part in rows.groupby("way", sort=False):
        share = quartiles(part["seconds"] / part["stock seconds"])
        lines.append([way, f"{part['trained'].iloc[0] / 1e6:.3g}", share, f"{part['peak'].iloc[0] / 1e9:.2f}"])
    return markdown(lines)
