"""The causal effect of every single expert: what its removal costs the right answer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from tqdm import tqdm

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.interventions import MODES
from moe_lens.lens import MoELens
from moe_lens.metrics import bootstrap_interval


def single_expert_effects(
    lens: MoELens,
    examples: Sequence[Example],
    *,
    mode: str = "zero",
    batch_size: int = 64,
    progress: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per expert: layer, expert, effect, effect_low, effect_high.

    effect: the mean over examples of how far the log-probability (nats) of the first gold answer, end-of-sequence
    included, falls when this one expert is masked in all positions; with its 95 % bootstrap interval. Negative
    where the answer becomes more likely.
    Measured by intervention alone, without a score; what pretraining planted shows in it too.
    """
    if mode not in MODES:
        raise MoELensError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    whole = lens.answer_log_probabilities(examples, batch_size=batch_size, progress=False)
    experts = [(layer, e) for layer in lens.architecture.moe_layers for e in range(lens.architecture.n_experts)]
    rows = []
    for layer, expert in tqdm(experts, desc="masking each expert", unit="expert", disable=not progress):
        with lens.intervene(MODES[mode](ExpertSet.of({layer: [expert]}))):
            masked = lens.answer_log_probabilities(examples, batch_size=batch_size, progress=False)
        interval = bootstrap_interval(np.asarray(whole) - np.asarray(masked), resamples=2000, seed=seed)
        rows.append((layer, expert, interval.mean, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["layer", "expert", "effect", "effect_low", "effect_high"])
