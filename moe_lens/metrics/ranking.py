"""How well a score ranks experts: against a known set of experts, and against measured effects."""

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.metrics.resampling import Interval


def auc(table: pd.DataFrame, truth: ExpertSet) -> float:
    """The chance that an expert of `truth` scores above one of the same layer that is not; ties count half.

    table: columns layer, expert, score. The mean over the layers of `truth`, since scores of different layers are
    not compared when experts are chosen per layer.
    """
    layers = [_layer(table, layer) for layer in truth.layers]
    return float(
        np.mean(
            [
                roc_auc_score(part["expert"].isin(truth[layer]), part["score"])
                for layer, part in zip(truth.layers, layers, strict=True)
            ]
        )
    )


def precision_at(table: pd.DataFrame, truth: ExpertSet, size: int) -> float:
    """The share of the `size` highest-scored experts per layer, in the layers of `truth`, that belong to it."""
    chosen = ExpertSet.top(table, size).restrict(truth.layers)
    return len(chosen & truth) / len(chosen)


def rank_correlation(table: pd.DataFrame, effects: pd.DataFrame) -> float:
    """Spearman's rank correlation of a score with an effect over the experts of a layer, averaged over layers.

    table: columns layer, expert, score. effects: columns layer, expert, effect, of the same experts. A layer in which
    either is constant has no rank correlation and is left out; NaN if all are.
    Raises MoELensError if the tables are not about the same experts.
    """
    return rank_correlation_interval(table, effects).mean


def rank_correlation_interval(table: pd.DataFrame, effects: pd.DataFrame) -> Interval:
    """`rank_correlation` with its 95 % interval over experts, as if a layer's were drawn from many.

    By Fisher's z of the mean over layers with Fieller's variance, 1.06 / (n - 3) for n experts of a layer (Fieller
    et al. 1957); NaN ends for layers of three experts or fewer.
    """
    both = table.merge(effects, on=["layer", "expert"], validate="one_to_one")
    if not len(both) == len(table) == len(effects):
        raise MoELensError(
            f"expected the same experts in both tables; got {len(table)} and {len(effects)}, {len(both)} shared"
        )
    ranked = [
        (len(part), float(spearmanr(part["score"], part["effect"]).statistic))
        for _, part in both.groupby("layer")
        if part["score"].nunique() > 1 and part["effect"].nunique() > 1
    ]
    if not ranked:
        return Interval(float("nan"), float("nan"), float("nan"))
    sizes, correlations = map(np.array, zip(*ranked, strict=True))
    if sizes.min() <= 3:
        return Interval(float(correlations.mean()), float("nan"), float("nan"))
    center = np.arctanh(correlations.mean().clip(-1 + 1e-9, 1 - 1e-9))
    reach = 1.96 * np.sqrt((1.06 / (sizes - 3)).sum()) / len(sizes)
    low, high = np.tanh([center - reach, center + reach])
    return Interval(float(correlations.mean()), float(low), float(high))


def _layer(table: pd.DataFrame, layer: int) -> pd.DataFrame:
    part = table[table["layer"] == layer]
    if part.empty:
        raise MoELensError(f"the table has no scores of layer {layer}")
    return part
