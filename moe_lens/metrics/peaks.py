"""Thinking twice as a number: by how many layers one gain peaks before another, with its interval over examples."""

import numpy as np
import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.metrics.gains import pair

Tables = tuple[pd.DataFrame, pd.DataFrame]
"""The base model's table and the tuned one's: columns layer, id and the value."""


def peak_lead(
    first: Tables, second: Tables, *, values: tuple[str, str], resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Where the gain of `first` peaks, where that of `second` does, and by how many layers the former comes earlier.

    first, second: such as attention to the context (`AttentionMass.table`, of one target and step) and the probability
        of the answer (`AnswerProbability.table`, of one way to count tokens), of the same layers. values: the column of
        each. Examples that only one of them has are left out.

    first_peak, second_peak: the layer with the highest ratio of means, mean(tuned) / mean(base) - 1; the lowest such
    layer of several. lead: their difference, second minus first, above 0 where `first` peaks earlier, with the 95 %
    interval lead_low, lead_high: of the same difference over examples drawn anew, with replacement, the same in all
    tables. earlier: the share of draws where `first` peaks earlier. n: examples.
    Layers are few and whole, so the interval is as coarse as they are; one of no width says only that no draw moved
    either peak.
    A departure: the paper, which reads this off its Figures 6 and 8, draws means of ratios, which single examples rule.
    Raises MoELensError for other layers, no shared examples, or a layer in which the base model has no mean above 0.
    """
    curves = [pair(*tables, value=value, by=["layer"]) for tables, value in zip((first, second), values, strict=True)]
    shared = sorted(set(curves[0]["id"]) & set(curves[1]["id"]))
    layers = sorted(set(curves[0]["layer"]))
    if not shared or layers != sorted(set(curves[1]["layer"])):
        raise MoELensError(
            f"expected both gains of the same examples and layers; {len(shared)} examples are shared, and the layers "
            f"are {layers} and {sorted(set(curves[1]['layer']))}"
        )
    whole = np.full((1, len(shared)), 1.0)
    drawn = np.random.default_rng(seed).multinomial(len(shared), [1 / len(shared)] * len(shared), size=resamples)
    peaks, again = [], []
    for curve, value in zip(curves, values, strict=True):
        wide = {model: _wide(curve, f"{value}_{model}", shared) for model in ("base", "tuned")}
        peaks.append(layers[_peaks(whole, **wide)[0]])
        again.append(np.take(layers, _peaks(drawn, **wide)))
    leads = again[1] - again[0]
    low, high = np.quantile(leads, [0.025, 0.975])
    ends = {"lead_low": float(low), "lead_high": float(high), "earlier": float((leads > 0).mean())}
    found = {"first_peak": peaks[0], "second_peak": peaks[1], "lead": peaks[1] - peaks[0]}
    return {"n": len(shared), **found, **ends}


def _wide(curve: pd.DataFrame, column: str, ids: list[str]) -> np.ndarray:
    """A column by example and layer, [id, layer], layers in rising order."""
    wide: np.ndarray = curve.pivot(index="id", columns="layer", values=column).loc[ids].to_numpy(np.float64)
    return wide


def _peaks(weights: np.ndarray, base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """The place of the layer with the highest ratio of means under each weighting [draw, id] of examples, [draw].

    base, tuned: [id, layer].
    """
    below = weights @ base
    if not (below > 0).all():
        raise MoELensError("a gain needs a base model whose mean is above 0 in every layer; measure more examples")
    return np.asarray((weights @ tuned / below).argmax(1))
