"""How often experts are active on one kind of text and on another: domain specialisation and risk difference."""

import numpy as np
import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.metrics.resampling import ratio_interval, resampled_rates


def domain_specialisation(
    vectors: pd.DataFrame, *, by: str = "domain", resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The share of a domain's tokens that select an expert, N_iD / N_D (Muennighoff et al. 2024).

    vectors: what `RoutingVectors.table` gave, with the domain of each example in the column `by`.

    One row per domain, layer and expert: `by`, layer, expert, examples, tokens, specialisation with its 95 % bootstrap
    interval over examples in _low and _high, and uniform, the mean over the layer's experts: k / n_experts where the
    vectors are of all.
    """
    if by not in vectors.columns:
        raise MoELensError(f"expected the domain of each example in a column {by!r}; got {list(vectors.columns)}")
    parts = []
    for domain, own in vectors.groupby(by, sort=True):
        counts, tokens, names = _counts(own)
        observed = counts.sum(0) / tokens.sum()
        low, high = ratio_interval(counts, tokens, resamples=resamples, seed=seed)
        part = names.assign(specialisation=observed, specialisation_low=low, specialisation_high=high)
        part.insert(0, by, domain)
        part.insert(3, "examples", len(tokens))
        part.insert(4, "tokens", int(tokens.sum()))
        parts.append(part.assign(uniform=part.groupby("layer")["specialisation"].transform("mean")))
    return pd.concat(parts, ignore_index=True)


def risk_difference(first: pd.DataFrame, second: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How much more often an expert is active on one side than on the other (SteerMoE, Fayyaz et al. 2025).

    first, second: what `RoutingVectors.table` gave on each side, over the target span (its `positions`).

    One row per expert: layer, expert, first and second (activation rates, over all tokens of a side alike),
    risk_difference (first minus second) with its 95 % interval over examples in _low and _high. Where both
    sides have the same examples' ids, the examples are resampled in pairs.
    Raises MoELensError for sides that do not have the same experts.
    """
    (counts_a, tokens_a, names), (counts_b, tokens_b, others) = _counts(first), _counts(second)
    if not names.equals(others):
        raise MoELensError("expected the same layers and experts on both sides; measure both with equal settings")
    paired = sorted(first["id"].unique()) == sorted(second["id"].unique())
    low_a, high_a = resampled_rates(counts_a, tokens_a, resamples=resamples, seed=seed)
    low_b, high_b = resampled_rates(counts_b, tokens_b, resamples=resamples, seed=seed if paired else seed + 1)
    low, high = np.quantile(low_a - high_b, 0.025, axis=0), np.quantile(high_a - low_b, 0.975, axis=0)
    rates = [counts.sum(0) / tokens.sum() for counts, tokens in ((counts_a, tokens_a), (counts_b, tokens_b))]
    return names.assign(
        first=rates[0],
        second=rates[1],
        risk_difference=rates[0] - rates[1],
        risk_difference_low=low,
        risk_difference_high=high,
    )


def _counts(vectors: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Selections [example, expert of a layer], tokens [example], examples sorted by id; and which experts these are."""
    missing = [column for column in ("id", "layer", "expert", "rate", "tokens") if column not in vectors.columns]
    if missing:
        raise MoELensError(
            f"expected what RoutingVectors.table() gives, example by example; this table has no {', '.join(missing)} "
            f"(it has {', '.join(map(str, vectors.columns))}): measure RoutingVectors() instead"
        )
    if vectors.duplicated(["id", "layer", "expert"]).any():
        raise MoELensError("an example's id repeats; give every example an id of its own")
    rates = vectors.pivot(index="id", columns=["layer", "expert"], values="rate").sort_index(axis=1)
    if rates.isna().any(axis=None):
        raise MoELensError("expected every example to have all layers and experts; measure all with equal settings")
    tokens = vectors.groupby("id")["tokens"].first().loc[rates.index].to_numpy(np.float64)
    names = rates.columns.to_frame(index=False)
    return rates.to_numpy() * tokens[:, None], tokens, names
