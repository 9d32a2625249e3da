"""How differently two models route the same examples: divergence of use and overlap of chosen experts."""

import numpy as np
import pandas as pd
from scipy.special import rel_entr
from scipy.stats import hypergeom

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.metrics.gains import pair
from moe_lens.metrics.resampling import bootstrap_interval


def routing_divergence(base: pd.DataFrame, tuned: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Jensen-Shannon divergence (bits, in [0, 1]) of two models' use of experts per layer.

    base, tuned: what `RoutingVectors.table` of all experts gave for each model on the same examples;
        MoELensError for an example that uses none of the experts.

    Columns: layer, n (examples), divergence (the mean over examples of that between an example's two distributions of
    selections over experts) with its 95 % interval divergence_low and _high, and pooled, that between the
    mean distributions. Few tokens per example make the first larger than the second.
    """
    paired = pair(base, tuned, value="rate", by=["layer", "expert"])
    rows = []
    for layer, part in paired.groupby("layer"):
        first, second = (
            part.pivot(index="id", columns="expert", values=f"rate_{model}").to_numpy() for model in ("base", "tuned")
        )  # [sample, expert]
        each = jensen_shannon(first, second)
        interval = bootstrap_interval(each, bounds=(0, 1), resamples=2000, seed=seed)
        rows.append(
            {
                "layer": layer,
                "n": len(each),
                "divergence": interval.mean,
                "divergence_low": interval.low,
                "divergence_high": interval.high,
                "pooled": float(jensen_shannon(_shares(first).mean(0), _shares(second).mean(0))),
            }
        )
    return pd.DataFrame(rows)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits over the last axis: [..., expert] and [..., expert] -> [...].

    Rows need not sum to 1; they are divided by their sum. Raises MoELensError for a row of zeros.
    """
    p, q = _shares(first), _shares(second)
    middle = (p + q) / 2
    divergence: np.ndarray = (rel_entr(p, middle) + rel_entr(q, middle)).sum(-1) / 2 / np.log(2)
    return divergence.clip(min=0)  # rounding can end just below


def expert_overlap(first: ExpertSet, second: ExpertSet, *, n_experts: int) -> pd.DataFrame:
    """How far two choices of experts agree in each layer, such as original and context-faithful experts (OE, CE).

    Columns: layer, first, second (members), shared, overlap (shared over the smaller's members), jaccard (shared over
    the members of either), expected (the overlap of random choices of these sizes), p_value (the chance that random
    choices share so many or more; hypergeometric). Raises MoELensError unless both name the same layers.
    """
    if first.layers != second.layers or not first.layers:
        raise MoELensError(f"expected two choices in the same layers; got {first.layers} and {second.layers}")
    rows = []
    for layer in first.layers:
        a, b = set(first[layer]), set(second[layer])
        if max(*a, *b) >= n_experts:
            raise MoELensError(f"layer {layer} names experts beyond the {n_experts} that there are")
        shared, smaller = len(a & b), min(len(a), len(b))
        rows.append(
            {
                "layer": layer,
                "first": len(a),
                "second": len(b),
                "shared": shared,
                "overlap": shared / smaller,
                "jaccard": shared / len(a | b),
                "expected": len(a) * len(b) / n_experts / smaller,
                "p_value": float(hypergeom.sf(shared - 1, n_experts, len(a), len(b))),
            }
        )
    return pd.DataFrame(rows)


def _shares(rates: np.ndarray) -> np.ndarray:
    """Rows divided by their sum, [..., expert]."""
    sums = rates.sum(-1, keepdims=True)
    if not sums.all():
        raise MoELensError(
            f"{np.count_nonzero(sums == 0)} of {sums.size} rows of rates are all 0, which is no distribution over "
            "experts; take the rates of all experts, RoutingVectors()"
        )
    shares: np.ndarray = rates / sums
    return shares
