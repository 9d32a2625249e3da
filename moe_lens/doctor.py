"""What was found in a model, and whether it is read and masked right: `python -m moe_lens.doctor --help`."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import pandas as pd
from torch import nn
from typer import Exit, Option

from moe_lens import console
from moe_lens.architecture import MoEArchitecture
from moe_lens.checks import CHECKS, PASSES, PROMPTS, run_checks
from moe_lens.checks.found import describe, in_words
from moe_lens.checks.reference import bare_logits, padded
from moe_lens.errors import MoELensError
from moe_lens.lens import MoELens
from moe_lens.listed_experts import normalize
from moe_lens.loading import load_skeleton
from moe_lens.results import provenance


def main(
    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")],
    checks: Annotated[str | None, Option(help=f"With commas, of {', '.join(CHECKS)}; default all.")] = None,
    prompt: Annotated[
        list[str] | None, Option(help="A text to check on (several times, of different lengths); default some.")
    ] = None,
    config_only: Annotated[
        bool, Option("--config-only", help="Only say what is found, from the configuration, without weights.")
    ] = False,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; default the checkpoint's own.")] = None,
    device: Annotated[str | None, Option(help="As transformers' device_map: cpu, cuda, auto, …")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the Python code that some models bring beside their weights.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is found in a model, and check that what is recorded and masked is right.

    Each check compares with the bare model under plain torch hooks or changed weights. For example:

    \b
        python -m moe_lens.doctor --model organism
        python -m moe_lens.doctor --model FOLDER_OR_HUB_ID --config-only

    The exit code is 1 if a check fails, 2 if the model cannot be read. A refusal is no failure: it says why something
    cannot be done exactly with this model.
    """
    names = None if checks is None else checks.split(",")
    unknown = sorted(set(names or ()) - set(CHECKS))
    if unknown:
        raise MoELensError(f"--checks must be among {', '.join(CHECKS)}; got {', '.join(unknown)}")
    prompts = tuple(prompt or PROMPTS)
    chosen = console.dtype_named(dtype)
    skeleton = load_skeleton(model, dtype=chosen, trust_remote_code=trust_remote_code)
    normalize(skeleton)
    found = describe(skeleton, MoEArchitecture.of(skeleton))
    if not as_json:
        console.show(pd.DataFrame(in_words(found), columns=["what", "found"]), title=f"Found in {model}")
    _say(f"weights: {_gigabytes(skeleton):.1f} GB in {found['dtype']}")
    if config_only:
        table = pd.DataFrame({"outcome": []})
    else:
        lens = MoELens.from_pretrained(
            model, dtype=chosen, device_map=device, trust_remote_code=trust_remote_code
        )
        _say(_forecast(lens, prompts, names))
        table = run_checks(lens, prompts, names=names, progress=True)
    if as_json:
        made_by = provenance(model=model, facts={"prompts": prompts, "dtype": found["dtype"], "device": device})
        print(json.dumps({"found": found, "checks": plain_rows(table), "made_by": made_by}, indent=2))
    elif not config_only:
        console.show(readable(table), title=f"Checks of {model}")
    if (table["outcome"] == "failed").any():
        raise Exit(1)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `run_checks` for people: errors as powers of ten, seconds, the detail last."""
    shown = table[["check", "outcome", "error", "allowed", "seconds", "detail"]].copy()
    for column in ("error", "allowed"):
        shown[column] = [None if pd.isna(value) else f"{value:.1e}" if value else "0" for value in table[column]]
    shown["seconds"] = [f"{value:.1f}" for value in table["seconds"]]
    return shown


def plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `run_checks` as JSON can hold them: no number where a check was refused, "inf" for no bound."""
    rows = table.to_dict("records")
    return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if value != value else "inf" if value == float("inf") else value


def _forecast(lens: MoELens, prompts: Sequence[str], names: Sequence[str] | None) -> str:
    """What the checks will take, from one forward pass of the model as it is."""
    bare_logits(lens, prompts)  # the first pass of a process does more than a pass
    started = time.perf_counter()
    bare_logits(lens, prompts)
    one = time.perf_counter() - started
    passes = sum(count for name, count in PASSES.items() if names is None or name in names)
    tokens = padded(lens, prompts)["input_ids"].numel()
    return (
        f"one forward pass of {len(prompts)} texts ({tokens} tokens with pads) takes {one:.2g} s; "
        f"the checks take up to {passes} of them: about {passes * one:.0f} s"
    )


def _gigabytes(module: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e9


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    console.run(main)
