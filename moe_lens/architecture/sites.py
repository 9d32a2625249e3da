"""Where experts and routers are: candidates for MoE layers, told by how their modules are called."""

import inspect
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture.blocks import BlockProbe
from moe_lens.architecture.moe_layer import MoELayer, ScoredInputs, SeveralSlots, SkippingExperts, SortedSlots
from moe_lens.architecture.router_probe import (
    ObservedRouter,
    RouterProbe,
    are_probabilities,
    named_tensors,
    output_slots,
)
from moe_lens.errors import MoELensError
from moe_lens.routing import ScoringRule, recognize_rule

GATING_ARGUMENTS = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
ROUTER_NAMES = ("gate", "router")
SHARED_EXPERTS_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
OTHER_MODALITIES = re.compile(r"(^|[._])(visual|vision|audio|image)([._]|$)")
NO_ARGUMENT = (-1, "")
MOST_CALLS = 16


@dataclass(frozen=True)
class Site:
    """Paths of one MoE layer's modules, and what kind of layer it is."""

    kind: type[MoELayer]
    block: str
    router: str
    experts: str
    index_argument: tuple[int, str] = NO_ARGUMENT
    weight_argument: tuple[int, str] = NO_ARGUMENT

    @property
    def stack(self) -> str:
        """Path of the list of layers that this one is in."""
        return self.decoder_layer.rpartition(".")[0] or self.router

    @property
    def decoder_layer(self) -> str:
        """Path of the layer that this one is in; empty if it is in no list."""
        match = re.match(r"(.*?\.\d+)\.", self.router)
        return match[1] if match else ""

    def described(self, layer: int, modules: dict[str, nn.Module], d_model: int) -> MoELayer:
        """The whole description, from calls of the router and the block; MoELensError for what it cannot tell."""
        shared, observed = child(self.block, SHARED_EXPERTS_NAMES, modules), _observe(self, modules)
        described = self.kind(
            layer=layer,
            router=self.router,
            experts=self.experts,
            shared_experts=shared,
            index_argument=self.index_argument,
            weight_argument=self.weight_argument,
            observed=observed,
            router_tensors=_router_tensors(self, observed, modules),
        )
        if self.block in (self.experts, self.decoder_layer):  # nothing happens after the experts, or it is not theirs
            return described
        probe = self._block_probe(modules, d_model)
        scale, passed = probe.after_experts()
        described = replace(
            described, scale_after=scale, passed_through=tuple(f"{self.block}.{name}" for name in passed)
        )
        found = None if shared is None else probe.shared(_name(shared))
        if found is None:
            return described
        gate = None if found.gate is None else f"{self.block}.{found.gate}"
        return replace(described, shared_scale=found.scale, shared_gate=gate, shared_moment=found.moment)

    def _block_probe(self, modules: dict[str, nn.Module], d_model: int) -> BlockProbe:
        block = modules[self.block]
        routed = RouterProbe(modules[self.router], self.router, block)()
        names = {"router": _name(self.router), "experts": _name(self.experts)}
        return BlockProbe(block, self.block, **names, routed=routed, d_model=d_model)


def find_sites(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    """All MoE layers, in the order of the modules; MoELensError if there are none, or experts without a router.

    Experts are modules called with selected experts and gating weights; the router is their sibling. Two more forms
    are known: experts that all see every token, and a block that sorts tokens by expert.
    """
    modules = {path: module for path, module in modules.items() if not OTHER_MODALITIES.search(path)}
    found = {path: names for path, module in modules.items() if (names := _gating_arguments(module))}
    sites = [_standard(path, names, modules) for path, names in found.items()]
    sites = sites or [site for path in modules if (site := _unusual(path, modules))]
    _refuse_product_keys(modules)
    if not sites:
        raise MoELensError(
            f"{type(model).__name__} has no MoE layers: expected experts called with selected experts "
            "and gating weights, as OLMoE's, Mixtral's and Qwen-MoE's are in transformers >= 5; "
            "choose such a model"
        )
    return sites


def child(parent: str, names: tuple[str, ...], modules: dict[str, nn.Module]) -> str | None:
    """The path of the child of `parent` that has one of these names, None without."""
    return next((f"{parent}.{name}" for name in names if f"{parent}.{name}" in modules), None)


def _name(path: str) -> str:
    """A module's own name in its parent."""
    return path.rpartition(".")[2]


def _standard(experts: str, names: Any, modules: dict[str, nn.Module]) -> Site:
    block = experts.rpartition(".")[0]
    if hasattr(modules[block], "base_layer"):
        raise MoELensError(
            f"the experts at {block!r} are wrapped in a {type(modules[block]).__name__} of an adapter (LoRA), which "
            "changes their weights at each call; merge the adapter first: model = model.merge_and_unload()"
        )
    router = child(block, ROUTER_NAMES, modules)
    if router is None:
        raise MoELensError(
            f"found experts at {experts!r} but no router beside them, called "
            f"{' or '.join(ROUTER_NAMES)}; {block!r} has {list(modules[block]._modules)}"
        )
    skips = getattr(modules[router], "num_router_classes", None) == getattr(modules[experts], "num_experts", 0) + 1
    several = hasattr(modules[experts], "identity_expert")  # its code squeezes an axis of one slot away
    kind = SkippingExperts if skips else SeveralSlots if several else MoELayer
    return Site(kind, block, router, experts, *names)


def _unusual(path: str, modules: dict[str, nn.Module]) -> Site | None:
    """The site of a router (at `path`) of llama4's form or of jetmoe's, whose experts get no indices."""
    block, _, name = path.rpartition(".")
    kinds = {"Llama4Router": ScoredInputs, "JetMoeTopKGating": SortedSlots}
    kind = kinds.get(type(modules[path]).__name__)
    if name not in ROUTER_NAMES or kind is None or ".self_attention." in path:
        return None
    return Site(kind, block, path, child(block, ("experts",), modules) or block)


def _refuse_product_keys(modules: dict[str, nn.Module]) -> None:
    """MoELensError for doge's blocks, which split the scores of the whole batch between two sets of keys."""
    for path, module in modules.items():
        if type(module).__name__ == "DogeCDMoE":
            raise MoELensError(
                f"{path!r} finds its experts by product keys, from scores that it mixes over the tokens of the batch, "
                "so that a token has no routing of its own to read or to change; choose a model with a router"
            )


def _gating_arguments(module: nn.Module) -> tuple[tuple[int, str], tuple[int, str]] | None:
    """(position, name) of the selected experts and the weights in the module's forward, None without them."""
    # The class's forward: a tracing library may have replaced the instance's by one without these names.
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    for index, weight in GATING_ARGUMENTS:
        if index in names and weight in names:
            return (names.index(index), index), (names.index(weight), weight)
    return None


def _observe(site: Site, modules: dict[str, nn.Module]) -> ObservedRouter:
    """What calls of the site's router show; MoELensError for a rule that is not known."""
    router, block = modules[site.router], modules[site.block]
    output = RouterProbe(router, site.router, block)()
    slots = output_slots(output, site.router) if site.index_argument != NO_ARGUMENT else (0, 1, 2)
    draft = _draft(site, output, slots, router, block)
    (probe, decided), (_, other) = _two_calls(draft, router, block)
    logits, indices, _ = decided
    map_width = probe.map_width(logits.shape[-1])
    shared = map_width > logits.shape[-1]
    rule, again = (_rule(*seen, router, site.router, scores_shared=shared) for seen in (decided, other))
    if rule != again:
        raise MoELensError(f"the router at {site.router!r} follows {rule} or {again}; expected one rule")
    return ObservedRouter(
        n_experts=logits.shape[-1],
        top_k=indices.shape[-1],
        scoring=rule,
        output_slots=slots,
        returns_probabilities=draft.observed.returns_probabilities,
        map_width=map_width,
        map_factor=probe.map_factor(logits, map_width),
        selection_bias=_selection_bias(draft, probe, block, logits, indices),
        chooses_by_token=probe.chooses_by_token,
    )


def _two_calls(
    draft: MoELayer, router: nn.Module, block: nn.Module
) -> list[tuple[RouterProbe, tuple[Tensor, Tensor, Tensor]]]:
    """Two calls of the router with different random weights, in which a good part of the tokens get experts.

    Each with the logits, indices and weights that it gave. A router that can skip the experts may, by its random
    weights, do so for every token.
    """
    found = []
    for seed in range(MOST_CALLS):
        probe = RouterProbe(router, draft.router, block, seed=seed)
        decided = _decided(draft, probe(), block)
        if _used(decided[2]).float().mean() > 0.25:
            found.append((probe, decided))
        if len(found) == 2:
            return found
    raise MoELensError(f"the router at {draft.router!r} gave hardly a token any expert in {MOST_CALLS} random calls")


def _used(weights: Tensor) -> Tensor:
    """The tokens that get experts, bool [token]: the weights [token, k] of a skipped token are no scores."""
    return (weights != 0).all(-1)


def _draft(
    site: Site, output: Any, slots: tuple[int, int, int] | None, router: nn.Module, block: nn.Module
) -> MoELayer:
    """The layer with what reading the router's output needs, its rule not yet known."""
    logits = output if slots is None else output[slots[0]]
    if site.kind is ScoredInputs:
        logits = output[1]
    elif site.kind is SortedSlots:
        logits = output[4]
    stated = (getattr(module, "top_k", None) for module in (router, block))
    n_experts, top_k = logits.shape[-1], next((int(k) for k in stated if k is not None), 0)
    observed = ObservedRouter(
        n_experts, top_k, ScoringRule("softmax", False), slots, are_probabilities(logits), n_experts, 1.0, None, False
    )
    return site.kind(0, site.router, site.experts, None, site.index_argument, site.weight_argument, observed)


def _decided(draft: MoELayer, output: Any, block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, indices and weights; where the output is logits alone, chosen by the block's own code."""
    if draft.observed.output_slots is not None:
        return draft.decision(output)
    choose = getattr(block, "route_tokens_to_experts", None)
    if choose is None:
        raise MoELensError(
            f"the router at {draft.router!r} returns logits alone and {type(block).__name__} does not say how it "
            "chooses by them; expected a method route_tokens_to_experts"
        )
    weights, indices = choose(output)
    return output, indices, weights


def _rule(
    logits: Tensor, indices: Tensor, weights: Tensor, router: nn.Module, path: str, *, scores_shared: bool
) -> ScoringRule:
    if not weights.shape[-1]:
        raise MoELensError(
            f"the router at {path!r} selects no experts; correct the experts per token in the model's config"
        )
    used = _used(weights)
    margin = 2 * (getattr(router, "router_jitter_noise", None) or 0.0)
    rule = recognize_rule(logits[used], indices[used], weights[used], margin=margin, scores_shared=scores_shared)
    if rule is None:
        raise MoELensError(
            f"the router at {path!r} turns logits into gating weights by a rule that is not known; known are softmax, "
            "sigmoid and the root of softplus, renormalised or not, times a constant"
        )
    return rule


def _router_tensors(
    site: Site, observed: ObservedRouter, modules: dict[str, nn.Module]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Path and shape of what makes the router decide as it does, see `MoELayer`."""
    own, bias = dict(named_tensors(modules[site.router])), observed.selection_bias
    found = {f"{site.router}.{name}": tensor for name, tensor in own.items()}
    if bias is not None and bias not in own:
        found[f"{site.block}.{bias}"] = dict(named_tensors(modules[site.block]))[bias]
    return tuple((path, tuple(tensor.shape)) for path, tensor in found.items())


def _selection_bias(
    draft: MoELayer, probe: RouterProbe, block: nn.Module, logits: Tensor, indices: Tensor
) -> str | None:
    """The tensor whose numbers change which experts are selected, but not the logits."""
    for name in probe.candidates_for_bias(logits.shape[-1]):
        changed, chosen, _ = _decided(draft, probe.changed(name)(), block)
        if torch.equal(changed, logits) and not torch.equal(chosen.sort(-1).values, indices.sort(-1).values):
            return name
    return None
