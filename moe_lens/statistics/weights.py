"""How alike the weights of a layer's experts are, and its router's rows; read from the model, without data."""

import pandas as pd
import torch
from torch import Tensor, nn

from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.lens.devices import on_cpu
from moe_lens.lens.lens import MoELens
from moe_lens.lens.offloaded import expect_in_memory, stored
from moe_lens.statistics.pairs import pairs_table


def weight_similarity(lens: MoELens) -> pd.DataFrame:
    """One row per ordered pair of different experts of a layer: layer, expert, other, similarity.

    similarity: the cosine of all the experts' weights, as one vector each. Experts that do the same with their inner
    units in another order come out as unlike: a high value shows kinship (experts copied from one MLP), a low one does
    not show difference; `OutputSimilarity` does.
    """
    architecture = lens.architecture
    parts = []
    for layer in architecture.moe_layers:
        path = architecture.at(layer).experts
        experts = lens.module.get_submodule(path)
        names = [f"{path}.{name}" for name, _ in experts.named_parameters()]
        expect_in_memory(lens.module, names, "it is compared with the other experts'")
        products = torch.zeros(architecture.n_experts, architecture.n_experts, dtype=torch.float64)
        for product in on_cpu(weight @ weight.T for weight in _by_expert(experts, architecture.n_experts)):
            products += product.double()
        if not products.isfinite().all():
            raise NotFiniteError(f"weights of the experts in layer {layer} are not finite, so none is like another")
        norms = products.diagonal().sqrt()
        parts.append(pairs_table(layer, {"similarity": (products / norms[:, None] / norms).numpy()}))
    return pd.concat(parts, ignore_index=True)


def router_similarity(lens: MoELens) -> pd.DataFrame:
    """One row per ordered pair of different experts of a layer: layer, expert, other, similarity.

    similarity: the cosine of the two experts' rows of the router's weight: experts that are asked for by like tokens.
    Raises MoELensError as `router_rows`.
    """
    parts = []
    for layer, rows in router_rows(lens).items():
        unit = torch.nn.functional.normalize(rows, dim=-1)
        parts.append(pairs_table(layer, {"similarity": (unit @ unit.T).numpy()}))
    return pd.concat(parts, ignore_index=True)


def router_rows(lens: MoELens) -> dict[int, Tensor]:
    """By layer the router's weight, float64 [expert, d_model] on the CPU.

    Raises MoELensError for a router without one row per expert, and for one that is not in memory.
    """
    architecture, found = lens.architecture, {}
    for layer in architecture.moe_layers:
        path = architecture.at(layer).router
        own = dict(lens.module.get_submodule(path).named_parameters())
        rows = [name for name, one in own.items() if one.ndim == 2 and len(one) == architecture.n_experts]
        if len(rows) != 1:
            shapes = {name: list(one.shape) for name, one in own.items()}
            raise MoELensError(f"expected one weight in the router {path!r} with a row per expert; it has {shapes}")
        expect_in_memory(lens.module, [f"{path}.{rows[0]}"], "its rows are compared")
        found[layer] = own[rows[0]].detach().float().cpu().double()
    return found


def _by_expert(experts: nn.Module, n_experts: int) -> list[Tensor]:
    """The experts' parameters as float32 [expert, weight]: of fused tensors [expert, ...], or of a list of modules."""
    if isinstance(experts, nn.ModuleList):
        return [
            torch.stack([weight.detach().float().flatten() for weight in together])
            for together in zip(*(expert.parameters() for expert in experts), strict=True)
        ]
    own = {name: weight for name, weight in experts.named_parameters() if len(weight) == n_experts}
    fused = [stored(experts, name, weight).float().flatten(1) for name, weight in own.items()]
    if not fused:
        shapes = [list(weight.shape) for weight in experts.parameters()]
        raise MoELensError(f"expected experts' weights with an axis of {n_experts} experts first; got {shapes}")
    return fused
