"""Groups of experts that are selected together, and whether they are there in other texts too."""

import networkx as nx
import numpy as np
import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.statistics.coactivation import CoActivation


def expert_groups(statistic: CoActivation, *, seed: int = 0) -> pd.DataFrame:
    """Communities of a layer's experts by how many tokens select both (Louvain, Blondel et al. 2008).

    One row per expert: layer, expert, group (0 the largest), groups (of the layer), modularity (of the graph whose
    edges are co-activations: how much more of them lies within groups than by the experts' use alone), held_out (the
    same of groups found in one half of the texts on the other half, both ways, the mean). The first is above 0 for
    noise, too, since the best groups are taken; the second is then not. NaN where all texts fall into one half.
    Raises MoELensError if no token counted, and for one expert per token, of which none is selected with another.
    """
    parts = []
    for layer, sums in statistic.layer_sums().items():
        together = sums["together"].numpy() * (
            1 - np.eye(sums["together"].shape[-1])
        )  # [group of texts, expert, expert]
        if not together.any():
            raise MoELensError("a token selects one expert alone here, so that none are selected together")
        groups = _communities(together.sum(0), seed)
        halves = together[::2].sum(0), together[1::2].sum(0)
        found = [_modularity(one, _communities(other, seed)) for one, other in (halves, halves[::-1])]
        place = {expert: number for number, own in enumerate(groups) for expert in own}
        experts = np.arange(together.shape[-1])
        columns = {"layer": layer, "expert": experts, "group": [place[expert] for expert in experts.tolist()]}
        columns |= {"groups": len(groups), "modularity": _modularity(together.sum(0), groups)}
        parts.append(pd.DataFrame(columns | {"held_out": float(np.mean(found))}))
    table = pd.concat(parts, ignore_index=True)
    table.attrs = dict(statistic.settings)
    return table


def _communities(together: np.ndarray, seed: int) -> list[set[int]]:
    """Groups of the experts of a symmetric matrix [expert, expert], the largest first."""
    found = nx.community.louvain_communities(nx.from_numpy_array(together), seed=seed)
    return sorted(found, key=lambda group: (-len(group), min(group)))


def _modularity(together: np.ndarray, groups: list[set[int]]) -> float:
    return float(nx.community.modularity(nx.from_numpy_array(together), groups)) if together.any() else float("nan")
