"""MoEArchitecture: finds and describes a model's MoE layers."""

from dataclasses import dataclass
from inspect import unwrap
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from moe_lens.architecture.moe_layer import MoELayer
from moe_lens.architecture.sites import Site, find_sites
from moe_lens.errors import MoELensError
from moe_lens.routing import ScoringRule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHARED_COUNT_NAMES = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
GROUP_COUNT_NAMES = ("num_group", "n_group")
ATTENTION_TABLE = "ALL_ATTENTION_FUNCTIONS"


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
        sites = find_sites(model, modules)
        stack = _layer_stack(sites)
        layers = tuple(f"{stack}.{i}" for i in range(len(modules[stack])))
        d_model = text_config(model).hidden_size
        numbers = [int(site.experts[len(stack) + 1 :].split(".")[0]) for site in sites]
        moe = tuple(site.described(n, modules, d_model) for n, site in zip(numbers, sites, strict=True))
        seen = [one.observed for one in moe]
        if len({(o.n_experts, o.top_k, o.scoring) for o in seen}) != 1:
            raise MoELensError(
                f"the MoE layers of {type(model).__name__} differ in size or scoring rule; expected all alike"
            )
        return cls(
            layers=layers,
            attentions=tuple(_attention(layer, modules) for layer in layers),
            moe=moe,
            n_experts=seen[0].n_experts,
            top_k=seen[0].top_k,
            n_shared_experts=_shared_count(model, moe[0]),
            d_model=d_model,
            scoring=seen[0].scoring,
            groups=_groups(modules[moe[0].router]),
            final_norm=_final_norm(stack, d_model, modules),
            head=_head(model, modules),
        )

    def in_short(self) -> str:
        """How many layers and experts there are, in words."""
        moe = "" if len(self.moe) == self.n_layers else f" ({len(self.moe)} with experts)"
        shared = f" and {self.n_shared_experts} shared" if self.n_shared_experts else ""
        return f"{self.n_layers} layers{moe}, {self.n_experts} experts{shared}, {self.top_k} per token"

    def __repr__(self) -> str:
        return f"MoEArchitecture({self.in_short()}; {self.scoring})"

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


def pretrained(model: nn.Module) -> "PreTrainedModel":
    """The model under the type that has transformers' attributes, of which torch's type of a module knows none."""
    return cast("PreTrainedModel", model)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens; its parts may be spread over several devices, or lie on a disk."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(model, "_hf_hook", None)  # accelerate's, which fetches weights to where it computes with them
    return device if hook is None else torch.device(hook.execution_device)


def text_config(model: nn.Module) -> "PreTrainedConfig":
    """The configuration of the model's language part."""
    return pretrained(model).config.get_text_config(decoder=True)


def _layer_stack(sites: list[Site]) -> str:
    """The path of the list of decoder layers that holds all these experts."""
    stacks = {site.stack for site in sites}
    if len(stacks) != 1:
        raise MoELensError(f"expected all experts in one list of decoder layers; found them in {sorted(stacks)}")
    return stacks.pop()


def _attention(layer: str, modules: dict[str, nn.Module]) -> str | None:
    """The first module below `layer` that takes its attention function from transformers' table, None without."""
    return next((path for path in modules if path.startswith(f"{layer}.") and is_attention(modules[path])), None)


def is_attention(module: nn.Module) -> bool:
    """Whether a module takes its attention function from transformers' table."""
    code = getattr(unwrap(type(module).forward), "__code__", None)
    return code is not None and ATTENTION_TABLE in code.co_names


def _shared_count(model: nn.Module, site: MoELayer) -> int:
    """Shared experts per layer: several may be fused into one module, and then the config counts them."""
    if site.shared_experts is None:
        return 0
    counts = [getattr(text_config(model), name, None) for name in SHARED_COUNT_NAMES]
    return next((count for count in counts if count), 1)


def _groups(router: nn.Module) -> tuple[int, int] | None:
    settings = vars(router)
    count = next((settings[name] for name in GROUP_COUNT_NAMES if settings.get(name)), 1)
    if count == 1 or settings.get("topk_method") == "greedy":
        return None
    return count, settings["topk_group"]


def _final_norm(stack: str, d_model: int, modules: dict[str, nn.Module]) -> str:
    """The one norm beside the layers, or in a module beside them that joins several residual streams."""
    parent = stack.rpartition(".")[0]
    beside = {f"{parent}.{name}": child for name, child in modules[parent].named_children()}
    norms = [path for path, child in beside.items() if _is_norm(child)]
    if not norms:
        inner = {
            f"{at}.{name}": child
            for at, holder in beside.items()
            if at != stack
            for name, child in holder.named_children()
        }
        norms = [path for path, child in inner.items() if _is_norm(child)]
    if len(norms) > 1:  # of which one norms something else than the residual stream
        norms = [path for path in norms if d_model in {weight.numel() for weight in modules[path].parameters()}]
    if len(norms) != 1:
        raise MoELensError(f"expected one final norm beside the layers in {parent!r}; found {norms}")
    return norms[0]


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not isinstance(module, nn.Embedding)


def _head(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    head = pretrained(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise MoELensError(f"{type(model).__name__} has no language-model head; load it as a causal language model")
    return next(path for path, module in modules.items() if module is head)
