"""The scores by which experts to train are chosen, of the base or of the router-tuned model (Algorithm 1)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open

from moe_lens.choosing.scores import Score, measure_usage, score_table
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import TENSORS_FILE, apply_delta
from moe_lens.lens.lens import MoELens


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
