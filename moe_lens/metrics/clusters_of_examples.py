"""Whether routing vectors fall into the groups that their texts come from, found without being told of these."""

import numpy as np
import pandas as pd
from scipy.special import entr
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from moe_lens.metrics.information import with_domains


def routing_clusters(
    vectors: pd.DataFrame, *, by: str = "domain", permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How far clusters of examples by their use of experts agree with domains: of each layer, and of all together.

    As many clusters are made as there are domains, by k-means of the routing vectors, without the domains.

    vectors: what `RoutingVectors.table` gave, with the domain of each example in the column `by`.

    One row per layer and one before them: layers ("all" or the number), clusters, examples, nmi (normalised mutual
    information of cluster and domain, 1 where they are the same), chance (its mean where domains are dealt anew to the
    examples), ari (adjusted Rand index, 0 by chance), p_value (of no more nmi than chance).
    Raises MoELensError for fewer than two domains.
    """
    rates, labels = with_domains(vectors, by)
    parts = {"all": rates.to_numpy()}
    parts |= {str(layer): rates[layer].to_numpy() for layer in rates.columns.unique("layer")}
    rng, count = np.random.default_rng(seed), int(labels.max()) + 1
    orders = np.stack([labels, *(rng.permutation(labels) for _ in range(permutations))])  # [order, example]
    rows = []
    for name, own in parts.items():
        different = min(count, len(np.unique(own, axis=0)))
        clusters = KMeans(different, n_init=10, random_state=seed).fit_predict(own)
        nmi, *shuffled = _information(orders, clusters)
        row = {"layers": name, "clusters": different, "examples": len(labels), "nmi": nmi, "chance": np.mean(shuffled)}
        at_least = np.count_nonzero(np.array(shuffled) >= nmi - 1e-12)
        row |= {"ari": adjusted_rand_score(labels, clusters), "p_value": (1 + at_least) / (1 + permutations)}
        rows.append(row)
    return pd.DataFrame(rows)


def _information(orders: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Normalised mutual information of each order of the labels [order, example] and the clusters [example], [order].

    2 I / (H(label) + H(cluster)); 0 where all examples are in one cluster.
    """
    of_label, of_cluster = (np.eye(part.max() + 1)[part] for part in (orders, clusters))
    joint = np.einsum("oel,ec->olc", of_label, of_cluster, optimize=True) / len(clusters)  # [order, label, cluster]
    label, cluster, both = (entr(part).sum(-1) for part in (joint.sum(2), joint.sum(1), joint.reshape(len(orders), -1)))
    found: np.ndarray = 2 * (label + cluster - both) / (label + cluster)
    return found.clip(min=0)
