"""Router saturation: how far two models send the same tokens to the same experts."""

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.metrics.resampling import ratio_interval


def router_saturation(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    n_experts: int,
    k: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of a token's k experts that are the same in both models (Muennighoff et al. 2024).

    first, second: what `SelectedExperts.table` gave for each model on the same examples, such as an early and the last
        checkpoint, or a base and a tuned model. k: of each token only its k experts of highest weight count; by default
        all of them.

    One row per layer: layer, k, examples, tokens, saturation (the mean over tokens) with its 95 % interval
    over examples in _low and _high, and expected, what random choices would share: k / n_experts.
    Raises MoELensError for tables of other tokens.
    """
    most = int(first["rank"].max()) + 1
    k = most if k is None else k
    if not 1 <= k <= most:
        raise MoELensError(f"k lies between 1 and {most}, the experts of a token; got {k}")
    token = ["layer", "id", "position"]
    chosen = [table.loc[table["rank"] < k, [*token, "expert"]] for table in (first, second)]
    tokens = [part[token].drop_duplicates() for part in chosen]
    if not len(tokens[0]) == len(tokens[1]) == len(tokens[0].merge(tokens[1])):
        raise MoELensError("expected the same tokens in both tables; measure both models on the same examples")
    shared = chosen[0].merge(chosen[1]).groupby(["layer", "id"]).size()
    counted = tokens[0].groupby(["layer", "id"]).size()
    shared = shared.reindex(counted.index, fill_value=0)
    rows = []
    for layer, own in counted.groupby(level="layer"):
        hits, all_ = shared.loc[own.index].to_numpy(), own.to_numpy()
        low, high = ratio_interval(hits / k, all_, resamples=resamples, seed=seed)
        row = {"layer": layer, "k": k, "examples": len(all_), "tokens": all_.sum()}
        row |= {"saturation": hits.sum() / all_.sum() / k, "saturation_low": float(low), "saturation_high": float(high)}
        rows.append(row | {"expected": k / n_experts})
    return pd.DataFrame(rows)
