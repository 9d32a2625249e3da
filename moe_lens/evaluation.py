"""Answers of a lens to examples, scored one by one, and their summary with uncertainty."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_lens.data import Example
from moe_lens.lens import MoELens
from moe_lens.metrics import bootstrap_interval, exact_match, f1, paired_permutation_p

ANSWER_COLUMNS = ("id", "prediction", "em", "f1", "memory")


def answer_table(
    lens: MoELens,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per example, in the order given: id, prediction (greedy), em, f1, memory.

    memory: exact match with what the model remembers where the context contradicts it, NaN where unknown.
    """
    predictions = lens.generate(examples, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    rows = [
        (
            example.id,
            text,
            exact_match(text, example.answers),
            f1(text, example.answers),
            np.nan if example.original_answer is None else exact_match(text, [example.original_answer]),
        )
        for example, text in zip(examples, map(str.strip, predictions), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))


def summarise(
    answers: pd.DataFrame, unmasked: pd.DataFrame | None = None, *, seed: int = 0
) -> dict[str, float | int | None]:
    """n, em with its 95 % bootstrap interval, f1, memory; against `unmasked`, also em_drop with its own and p_value.

    The answers are paired with the unmasked ones, example by example, for the drop's interval and permutation test.

    `memory` is None where no example has an original answer.
    """
    em = bootstrap_interval(answers["em"].to_numpy(), seed=seed)
    memory = answers["memory"].mean()
    summary = {
        "n": len(answers),
        "em": em.mean,
        "em_low": em.low,
        "em_high": em.high,
        "f1": float(answers["f1"].mean()),
        "memory": None if np.isnan(memory) else float(memory),
    }
    if unmasked is not None:
        drop = bootstrap_interval(unmasked["em"].to_numpy() - answers["em"].to_numpy(), seed=seed)
        summary |= {"em_drop": drop.mean, "em_drop_low": drop.low, "em_drop_high": drop.high}
        summary["p_value"] = paired_permutation_p(unmasked["em"].to_numpy(), answers["em"].to_numpy(), seed=seed)
    return summary
