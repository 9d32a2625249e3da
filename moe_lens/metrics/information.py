"""How much the experts that are selected tell of where a text is from: mutual information of expert and domain."""

import numpy as np
import pandas as pd
from scipy.special import entr

from moe_lens.errors import MoELensError
from moe_lens.metrics.maps import by_example


def domain_information(
    vectors: pd.DataFrame, *, by: str = "domain", permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Mutual information of expert and domain per layer, in bits, and what texts of no domains would give.

    I(E; D) = H(mean over d of p(e | d)) - mean over d of H(p(e | d)), p(e | d) being the share of the selections in a
    domain d that expert e has. Domains count alike, whatever their size: at most log2 of their number, where each has
    experts of its own, 0 where all use experts alike.

    vectors: what `RoutingVectors.table` of all experts gave, with the domain of each example in the column `by`.

    One row per layer: layer, domains, examples, information, chance and chance_high (mean and 95 % quantile where
    domains are dealt anew to whole examples: texts are dealt, not tokens, since the tokens of a text go together),
    excess (information - chance), p_value (of no more than chance, at least 1 / (1 + permutations)).
    Raises MoELensError for fewer than two domains.
    """
    rates, labels = with_domains(vectors, by)
    tokens = vectors.groupby([by, "id"])["tokens"].first().loc[rates.index].to_numpy(np.float64)
    counts, layers = rates.to_numpy() * tokens[:, None], rates.columns.get_level_values("layer").to_numpy()
    rng, n_domains = np.random.default_rng(seed), labels.max() + 1
    orders = [labels, *(rng.permutation(labels) for _ in range(permutations))]
    found = np.stack([_information(counts, layers, np.eye(n_domains)[order]) for order in orders])  # [order, layer]
    observed, shuffled = found[0], found[1:]
    return pd.DataFrame(
        {
            "layer": np.unique(layers),
            "domains": n_domains,
            "examples": len(labels),
            "information": observed,
            "chance": shuffled.mean(0),
            "chance_high": np.quantile(shuffled, 0.95, axis=0),
            "excess": observed - shuffled.mean(0),
            "p_value": (1 + (shuffled >= observed - 1e-12).sum(0)) / (1 + permutations),
        }
    )


def with_domains(vectors: pd.DataFrame, by: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Routing vectors as `by_example` has them, and the number of each example's domain, int64 [example].

    Raises MoELensError for fewer than two domains.
    """
    rates = by_example(vectors, by)
    domains, labels = np.unique(rates.index.get_level_values(by).to_numpy(str), return_inverse=True)
    if len(domains) < 2:
        raise MoELensError(f"expected two data sets or more, to be told apart; got {', '.join(domains)} alone")
    return rates, labels


def _information(counts: np.ndarray, layers: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The information in bits, [layer], of counts [example, expert of a layer] and members [example, domain]."""
    sums = members.T @ counts  # [domain, expert of a layer]
    found = []
    for layer in np.unique(layers):
        own = sums[:, layers == layer]
        shares = own / own.sum(1, keepdims=True)
        found.append((entr(shares.mean(0)).sum() - entr(shares).sum(1).mean()) / np.log(2))
    return np.maximum(found, 0)
