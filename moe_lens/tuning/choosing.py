"""Which experts to train: by a score of the base or of the router-tuned model (Algorithm 1), given, or at random."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open

from moe_lens.data import Example
from moe_lens.delta import TENSORS_FILE, apply_delta
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import MoELens
from moe_lens.masking import check_specification, choose
from moe_lens.scores import SCORES, Score, measure_usage, score_table


def choose_experts(
    specification: str,
    *,
    table: pd.DataFrame | None,
    planted: Callable[[], ExpertSet],
    layers: Sequence[int],
    n_experts: int,
    seed: int,
) -> ExpertSet:
    """The experts that a specification names, of these layers.

    specification: `SCORE:N` for the N highest of each layer by a score of `moe_lens.scores.SCORES`; `SCORE:p=0.2` for
        the highest until their scores sum to 0.2 (ESFT); `random:N` for N of each layer drawn with `seed`; `planted`;
        a `.json` file of {layer: [experts]}; or literally `3:5,7;4:0`.
    table: layer, expert, score of the score it names, if it names one; `expert_scores` gives it.

    Raises MoELensError for anything else, and if nothing is left in these layers.
    """
    check_experts(specification, n_experts=n_experts)
    name, _, size = specification.partition(":")
    if name == "random":
        filled = ExpertSet.of({layer: range(int(size)) for layer in layers})
        return ExpertSet.random_like(filled, seed, n_experts=n_experts)
    if name in SCORES and size.startswith("p="):
        experts = ExpertSet.cumulative(table, float(size.removeprefix("p=")))
    else:
        found = choose(specification, tables={} if table is None else {name: table}, planted=planted)
        experts = found[0].experts
    experts = experts.restrict(layers)
    if not experts:
        raise MoELensError(f"no expert of {specification!r} is in the layers {list(layers)}")
    return experts


def check_experts(specification: str, *, n_experts: int) -> None:
    """MoELensError unless `choose_experts` can read it; before scores are counted, for which routers may be tuned."""
    name, _, size = specification.partition(":")
    if name == "random":
        if not size.isdigit() or not 0 < int(size) <= n_experts:
            raise MoELensError(f"random:N takes N of the {n_experts} experts of each layer; got {specification!r}")
    elif name in SCORES and size.startswith("p="):
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", size.removeprefix("p=")):
            raise MoELensError(f"expected a share of the summed score, such as {name}:p=0.2; got {specification!r}")
    elif name in SCORES and "," in size:
        raise MoELensError(f"experts are trained as one set; {specification!r} names {size.count(',') + 1}")
    else:
        check_specification(specification)


def score_of(specification: str) -> Score | None:
    """The score that a specification ranks experts by, None for one that needs none."""
    return SCORES.get(specification.partition(":")[0])


def expert_scores(
    score: Score,
    lens: MoELens,
    examples: Sequence[Example],
    tuned: Callable[[], AbstractContextManager[None]],
) -> pd.DataFrame:
    """The score of every expert: columns layer, expert, score.

    lens: the base model. tuned: gives a block within which the lens is router-tuned; entered only where needed.
    """
    base = measure_usage(lens, examples, [score]) if score.needs_base else {}
    if not score.needs_tuned:
        return score_table(score, base=base, tuned={})
    with tuned():
        return score_table(score, base=base, tuned=measure_usage(lens, examples, [score]))


@contextmanager
def with_delta(lens: MoELens, folder: str | Path) -> Iterator[None]:
    """Inside the block the lens has this delta; afterwards it is as before."""
    try:
        with safe_open(Path(folder) / TENSORS_FILE, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise MoELensError(f"expected a delta checkpoint at {str(folder)!r}: {error}") from None
    with restored(lens, names):
        apply_delta(lens.module, folder)
        yield


@contextmanager
def restored(lens: MoELens, names: Sequence[str]) -> Iterator[None]:
    """After the block these parameters have the values from before it."""
    own: Mapping[str, torch.nn.Parameter] = dict(lens.module.named_parameters())
    before = {name: own[name].detach().clone() for name in names if name in own}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)
