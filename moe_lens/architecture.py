"""MoEArchitecture: finds and describes a model's MoE layers; only it knows Hugging Face module names."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_lens.errors import MoELensError
from moe_lens.routing import ScoringRule, observe_router

GATING_ARGUMENTS = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
ROUTER_NAMES = ("gate", "router")
SHARED_EXPERTS_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
SHARED_COUNT_NAMES = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
ATTENTION_NAMES = ("self_attn", "attn", "self_attention", "attention")
GROUP_COUNT_NAMES = ("num_group", "n_group")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of a module's call."""


@dataclass(frozen=True)
class MoELayer:
    """Where one MoE layer's modules are and how to read their calls.

    layer: absolute decoder index. router, experts, shared_experts: module paths (the last may be None).
    index_argument, weight_argument: (position, name) of the selected experts and of the gating weights
        among the experts' arguments.
    output_slots: where logits, weights and indices are in the router's output.
    """

    layer: int
    router: str
    experts: str
    shared_experts: str | None
    index_argument: tuple[int, str]
    weight_argument: tuple[int, str]
    output_slots: tuple[int, int, int]

    def decision(self, output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """A router's output as logits [token, expert], indices [token, k], weights [token, k]."""
        logits, weights, indices = (output[slot] for slot in self.output_slots)
        return logits, indices, weights

    def gating(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Indices [token, k] and gating weights [token, k] among the experts' `inputs`."""
        return _argument(inputs, self.index_argument), _argument(inputs, self.weight_argument)

    def with_gating(self, inputs: Inputs, indices: Tensor, weights: Tensor) -> Inputs:
        """The experts' `inputs` with other indices [token, k] and gating weights [token, k]."""
        return _replaced(_replaced(inputs, self.index_argument, indices), self.weight_argument, weights)


@dataclass(frozen=True)
class MoEArchitecture:
    """The MoE side of a causal language model. Paths are dotted module paths; layers are absolute indices.

    layers, attentions: every decoder layer and its attention module (None where it has none).
    moe: the MoE layers, in rising order. n_shared_experts: per MoE layer, 0 where there are none.
    groups: (groups of experts, groups a token may choose from), or None without group-limited routing.
    """

    layers: tuple[str, ...]
    attentions: tuple[str | None, ...]
    moe: tuple[MoELayer, ...]
    n_experts: int
    top_k: int
    n_shared_experts: int
    d_model: int
    scoring: ScoringRule
    groups: tuple[int, int] | None
    final_norm: str
    head: str

    @classmethod
    def of(cls, model: nn.Module) -> "MoEArchitecture":
        """Describe `model` from its structure alone; it may be on the meta device and no weight is read.

        Experts are modules called with selected experts and gating weights; the router is their sibling.
        Raises MoELensError for a model without MoE layers or with parts that cannot be told.
        """
        modules = dict(model.named_modules())
        found = {path: names for path, module in modules.items() if (names := _gating_arguments(module))}
        if not found:
            raise MoELensError(
                f"{type(model).__name__} has no MoE layers: expected experts called with selected experts "
                "and gating weights, as OLMoE's, Mixtral's and Qwen-MoE's are in transformers >= 5; "
                "choose such a model"
            )
        stack = _layer_stack(found)
        layers = tuple(f"{stack}.{i}" for i in range(len(modules[stack])))
        sites = [_MoEModules.at(path, modules) for path in found]
        seen = [observe_router(modules[site.router], site.router) for site in sites]
        if len({(o.n_experts, o.top_k, o.d_model, o.scoring) for o in seen}) != 1:
            raise MoELensError(
                f"the MoE layers of {type(model).__name__} differ in size or scoring rule; expected all alike"
            )
        moe = tuple(
            MoELayer(
                layer=int(path[len(stack) + 1 :].split(".")[0]),
                router=site.router,
                experts=path,
                shared_experts=site.shared_experts,
                index_argument=found[path][0],
                weight_argument=found[path][1],
                output_slots=observed.output_slots,
            )
            for path, site, observed in zip(found, sites, seen, strict=True)
        )
        return cls(
            layers=layers,
            attentions=tuple(_child(layer, ATTENTION_NAMES, modules) for layer in layers),
            moe=moe,
            n_experts=seen[0].n_experts,
            top_k=seen[0].top_k,
            n_shared_experts=_shared_count(model, moe[0]),
            d_model=seen[0].d_model,
            scoring=seen[0].scoring,
            groups=_groups(modules[moe[0].router]),
            final_norm=_final_norm(stack, modules),
            head=_head(model, modules),
        )

    @property
    def n_layers(self) -> int:
        """Decoder layers, dense ones included."""
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The absolute indices of the layers that have routed experts."""
        return tuple(site.layer for site in self.moe)

    @property
    def renormalizes(self) -> bool:
        """Whether the selected experts' scores are divided by their sum."""
        return self.scoring.renormalizes

    def at(self, layer: int) -> MoELayer:
        """The MoE layer with this absolute index; MoELensError if that layer is none."""
        for site in self.moe:
            if site.layer == layer:
                return site
        raise MoELensError(f"layer {layer} has no routed experts; the MoE layers are {self.moe_layers}")


@dataclass(frozen=True)
class _MoEModules:
    """The modules beside the experts."""

    router: str
    shared_experts: str | None

    @classmethod
    def at(cls, experts: str, modules: dict[str, nn.Module]) -> "_MoEModules":
        parent = experts.rpartition(".")[0]
        router = _child(parent, ROUTER_NAMES, modules)
        if router is None:
            raise MoELensError(
                f"found experts at {experts!r} but no router beside them, called "
                f"{' or '.join(ROUTER_NAMES)}; {parent!r} has {list(modules[parent]._modules)}"
            )
        return cls(router, _child(parent, SHARED_EXPERTS_NAMES, modules))


def _gating_arguments(module: nn.Module) -> tuple[tuple[int, str], tuple[int, str]] | None:
    """(position, name) of the selected experts and the weights in the module's forward, None without them."""
    # The class's forward: a tracing library may have replaced the instance's by one without these names.
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    for index, weight in GATING_ARGUMENTS:
        if index in names and weight in names:
            return (names.index(index), index), (names.index(weight), weight)
    return None


def _argument(inputs: Inputs, argument: tuple[int, str]) -> Any:
    (args, kwargs), (position, name) = inputs, argument
    return kwargs[name] if name in kwargs else args[position]


def _replaced(inputs: Inputs, argument: tuple[int, str], value: Tensor) -> Inputs:
    (args, kwargs), (position, name) = inputs, argument
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:position], value, *args[position + 1 :]), kwargs


def _layer_stack(experts: dict[str, Any]) -> str:
    """The path of the list of decoder layers that holds all these experts."""
    stacks = {match[1] if (match := re.match(r"(.*?)\.\d+\.", path)) else path for path in experts}
    if len(stacks) != 1:
        raise MoELensError(
            f"expected all experts in one list of decoder layers; found them in {sorted(stacks)}"
        )
    return stacks.pop()


def _child(parent: str, names: tuple[str, ...], modules: dict[str, nn.Module]) -> str | None:
    return next((f"{parent}.{name}" for name in names if f"{parent}.{name}" in modules), None)


def _shared_count(model: nn.Module, site: MoELayer) -> int:
    """Shared experts per layer: several may be fused into one module, and then the config counts them."""
    if site.shared_experts is None:
        return 0
    counts = [getattr(model.config, name, None) for name in SHARED_COUNT_NAMES]
    return next((count for count in counts if count), 1)


def _groups(router: nn.Module) -> tuple[int, int] | None:
    count = next((getattr(router, name) for name in GROUP_COUNT_NAMES if getattr(router, name, None)), 1)
    if count == 1 or getattr(router, "topk_method", None) == "greedy":
        return None
    return count, router.topk_group


def _final_norm(stack: str, modules: dict[str, nn.Module]) -> str:
    parent = stack.rpartition(".")[0]
    norms = [name for name, child in modules[parent].named_children() if "Norm" in type(child).__name__]
    if len(norms) != 1:
        raise MoELensError(f"expected one final norm beside the layers in {parent!r}; found {norms}")
    return f"{parent}.{norms[0]}"


def _head(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise MoELensError(
            f"{type(model).__name__} has no language-model head; load it as a causal language model"
        )
    return next(path for path, module in modules.items() if module is head)
