"""MODELS.md: which models are supported and how that was found, written from the survey of all families."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import pandas as pd

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.paper_models import PAPER_MODELS, PaperModel
from moe_lens.architecture.sizes import parameter_counts
from moe_lens.checks.each import CHECKS
from moe_lens.checks.suite import PROMPTS

MARKS = {"passed": "✓", "refused": "–", "failed": "✗"}
VERSIONED = ("torch", "transformers", "nnsight")

HEAD = """\
# Models

*Written by `python -m moe_lens.doctor --families --markdown MODELS.md` under {versions}.
A test compares it with what these versions do.*

moe_lens finds routers and experts by structure, on the model that you give it. What it cannot find, or cannot do
exactly, it refuses with an error that says why; it never guesses. To see the same for a model of your own, in seconds
where its size allows:

    python -m moe_lens.doctor --model FOLDER_OR_HUB_ID                  # what is found, and every check below
    python -m moe_lens.doctor --model FOLDER_OR_HUB_ID --config-only    # what is found, without weights

## Families of transformers

One tiny random model of each family with experts in the installed transformers, in float32 on the CPU, on one
left-padded batch of {n_prompts} texts: {mark_passed} passed, {mark_refused} refused (the reasons are below), \
{mark_failed} failed. *Routing* is what was found in
the tiny model; a checkpoint's own configuration may say otherwise, and is found as well.

"""

CHECKS_HEAD = """
| check | what has to be so | largest difference allowed |
|---|---|---|
"""

REST = """
Differences are relative to the largest value. In bfloat16 and float16 the checks that may differ may by 5 %,
and *renormalize* and *reroute* leave out the tenth of the positions that are farthest apart, where rounding lets scores
tie and sends a token to another expert. `python -m moe_lens.doctor --families` prints the numbers behind a mark.

## Refused, and why

{refusals}

## Quantised models

Routers and routed experts have to be plain floating-point numbers. Other parts may be quantised.

| method | what happens | verdict |
|---|---|---|
| mxfp4 and fp8 checkpoints | transformers can load them in full precision, and here does, with a warning: the model \
is then 2 to 4 times as large | right: the loaded numbers equal those decoded by hand, and all checks pass |
| mxfp4 and fp8 experts kept packed (a model that you loaded yourself) | their kernels may choose and call experts \
without the modules that masking acts on | refused at loading |
| bitsandbytes, 4 and 8 bits, fused experts | only linear layers are packed: attention, shared experts, dense layers; \
routers and routed experts stay as they are, so little memory is saved | right: all checks pass. With 8 bits a batch's \
rows, pads among them, are rounded together, so that texts of other lengths change what the model computes |
| bitsandbytes, experts in a list (code of the model's own) | experts and router are packed | refused at loading |
| torchao, by default | only linear layers are packed, as above | right: all checks pass |
| torchao, aimed at the experts by name | they are packed; transformers cannot run them in all its experts \
implementations | refused at loading |

Tested in `tests/architecture/test_quantized.py`; the parts that need bitsandbytes (0.50.2) or torchao (0.18.0) are run
where these are installed.

## Models with code of their own

Asked for by name (`trust_remote_code=True`, `--trust-remote-code`). Experts in a list, with a linear gate or one that
chooses by itself, get the protocol of transformers 5 once the block's output on random input has been reproduced and
gradients reach gate and experts; any other is refused. Attention rows are refused where such code does not take its
attention function from transformers. The model is saved in its original layout.

## The paper's models at their real size

On the meta device, from their published configurations, against Table 7 of the paper.

{paper}

The table leaves out the embedding, of which a token uses one row, where that is said here. The model with code of its
own is counted on another with the same parts; a test finds it among listed experts with the same counts.

## Add a model

1. `python -m moe_lens.doctor --model YOUR_MODEL`: most new ones pass as they are. A refusal names the module and what
   was expected of it.
2. Experts are found as modules called with selected experts and gating weights, the router as their sibling, by name
   (`moe_lens/architecture/sites.py`). Another call or name goes there; a new form of layer is a subclass of `MoELayer`
   (`moe_layer.py`), which says where the gating is read and edited.
3. What a router does is seen by calling its code on random tokens. A new rule from logits to gating weights goes to
   `moe_lens/routing.py`.
4. Give the family a tiny configuration in `moe_lens/architecture/tiny_sizes.py`. The tests, and this page once it is
   written again, then have it too.
"""


def models_page(rows: Sequence[str], refusals: Sequence[str]) -> str:
    """The whole page from what `family_row` and `family_refusals` say of each family."""
    marks = {f"mark_{outcome}": mark for outcome, mark in MARKS.items()}
    return "".join(
        [
            HEAD.format(versions=versions(), n_prompts=len(PROMPTS), **marks),
            _table_head(["family", "routing", *(name.replace("_", " ") for name in CHECKS)]),
            "\n".join(rows) + "\n",
            CHECKS_HEAD,
            *(f"| {name.replace('_', ' ')} | {_meaning(name)} | {_allowed(name)} |\n" for name in CHECKS),
            REST.format(refusals="\n".join(refusals), paper=_paper_table()),
        ]
    )


def versions() -> str:
    """The installed versions of what decides what is supported."""
    return ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in VERSIONED)


def family_row(family: str, table: pd.DataFrame, found: Mapping[str, Any] | None) -> str:
    """A family's row of the support table. table: of `run_checks`; found: of `describe`, None if it is not opened."""
    outcomes = dict(zip(table["check"], table["outcome"], strict=True))
    marks = [MARKS[outcomes[name]] for name in CHECKS]
    return f"| `{family}` | {routing_in_words(found) if found else 'not opened'} | {' | '.join(marks)} |"


def family_refusals(family: str, table: pd.DataFrame) -> list[str]:
    """A list item for every reason for which something is refused in a family."""
    refused = table[table["outcome"] == "refused"]
    items = []
    for reason, rows in refused.groupby("detail", sort=False):
        names = [name.replace("_", " ") for name in rows["check"]]
        which = "everything" if len(names) == len(CHECKS) else ", ".join(names)
        items.append(f"- `{family}`, {which}: {reason}")
    return items


def routing_in_words(found: Mapping[str, Any]) -> str:
    """The rule, and what else decides which experts a token gets."""
    groups, by_token, scale = found["groups"], found["layers_choosing_by_token"], found["scale_after_experts"]
    parts = [found["scoring"]["in_words"]]
    parts += [f"x {scale:g} after the experts"] * (scale != 1)
    parts += ["more modules after the experts"] * bool(found["passed_through_after_experts"])
    parts += ["selection bias"] * bool(found["selection_bias"])
    parts += ["groups"] * bool(groups)
    parts += ["first layers by token id"] * bool(by_token)
    parts += ["shared experts"] * bool(found["shared_experts"])
    return "; ".join(parts)


def _meaning(name: str) -> str:
    return (CHECKS[name].__doc__ or "").strip().rstrip(".")


def _allowed(name: str) -> str:
    return "none" if name in ("capture", "zero", "scale", "replay", "route_as", "patch", "generate") else "1e-4"


def _paper_table() -> str:
    columns = ["model", "parameters", "Table 7", "a token uses", "Table 7", "experts", "MoE layers"]
    return (_table_head(columns) + "\n".join(map(_paper_row, PAPER_MODELS))).rstrip()


def _paper_row(model: PaperModel) -> str:
    skeleton = model.skeleton()
    architecture = MoEArchitecture.of(skeleton)
    counts = parameter_counts(skeleton, architecture)
    cells = [model.name + (" (code of its own)" if model.own_code else "")]
    for name, count, told in (
        ("total", counts.total, model.total), ("activated", counts.activated, model.activated),
    ):  # fmt: skip
        bare = f", {(count - counts.embedding) / 1e9:.2f} B without embedding" * (name in model.without_embedding)
        cells += [f"{count / 1e9:.2f} B{bare}", f"{told:g} B"]
    cells.append(f"{architecture.top_k} of {architecture.n_experts}")
    cells.append(f"{len(architecture.moe)} of {architecture.n_layers}")
    return f"| {' | '.join(cells)} |"


def _table_head(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|\n"
