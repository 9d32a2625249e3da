"""The causal effect of every single expert: what its removal costs the right answer."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lens.data import Example
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import MODES, check_mode
from moe_lens.lens.lens import MoELens
from moe_lens.metrics import UNBOUNDED, benjamini_hochberg, bootstrap_interval, cohens_d, permutation_p_values
from moe_lens.progress import progress_bar


def single_expert_effects(
    lens: MoELens,
    examples: Sequence[Example],
    *,
    mode: str = "zero",
    batch_size: int | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per expert: layer, expert, effect, effect_low, effect_high, cohens_d, p_value, q_value.

    effect: the mean over examples of how far the log-probability (nats) of the first gold answer, end-of-sequence
    included, falls when this one expert is masked in all positions; with its 95 % interval. Negative
    where the answer becomes more likely.
    cohens_d: the effect in standard deviations over examples. p_value: of the paired permutation test of no effect.
    q_value: p_value corrected for the number of experts (Benjamini-Hochberg): of the experts with q <= 0.05, some 5 %
    at most are expected to have no effect.
    Measured by intervention alone, without a score; what pretraining planted shows in it too.
    """
    check_mode(mode)
    whole = lens.answer_log_probabilities(examples, batch_size=batch_size, progress=False)
    shown = lens.progress if progress is None else progress
    experts = [(layer, e) for layer in lens.architecture.moe_layers for e in range(lens.architecture.n_experts)]
    drops = []
    for layer, expert in progress_bar(experts, desc="masking each expert", unit="expert", disable=not shown):
        with lens.intervene(MODES[mode](ExpertSet.of({layer: [expert]}))):
            masked = lens.answer_log_probabilities(examples, batch_size=batch_size, progress=False)
        drops.append(np.asarray(whole) - np.asarray(masked))
    return pd.DataFrame(experts, columns=["layer", "expert"]).join(_effects(np.stack(drops, axis=1), seed))


def _effects(drops: np.ndarray, seed: int) -> pd.DataFrame:
    """The effects' columns of `single_expert_effects` for drops [example, expert]."""
    intervals = [bootstrap_interval(drop, bounds=UNBOUNDED, resamples=2000, seed=seed) for drop in drops.T]
    p_values = permutation_p_values(drops, seed=seed)
    return pd.DataFrame(
        {
            "effect": [interval.mean for interval in intervals],
            "effect_low": [interval.low for interval in intervals],
            "effect_high": [interval.high for interval in intervals],
            "cohens_d": [cohens_d(drop) for drop in drops.T],
            "p_value": p_values,
            "q_value": benjamini_hochberg(p_values),
        }
    )
