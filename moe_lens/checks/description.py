"""What was found in a model: its MoE side in plain values, for a table or JSON, and in words."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.quantized import quantization_method
from moe_lens.architecture.sizes import parameter_counts


def describe(module: nn.Module, architecture: MoEArchitecture) -> dict[str, Any]:
    """Everything that discovery says of `module`, which may be on the meta device; values that JSON can hold.

    Paths are those of the first MoE layer. Parameters are counted as `sizes.ParameterCounts` says.
    """
    site, counts = architecture.moe[0], parameter_counts(module, architecture)
    model = pretrained(module)
    attentions = [path for path in architecture.attentions if path]
    return {
        "class": type(module).__name__,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization_method(model.config),
        "layers": architecture.n_layers,
        "moe_layers": list(architecture.moe_layers),
        "d_model": architecture.d_model,
        "experts": architecture.n_experts,
        "top_k": architecture.top_k,
        "shared_experts": architecture.n_shared_experts,
        "scoring": {**asdict(architecture.scoring), "in_words": str(architecture.scoring)},
        "scale_after_experts": site.scale_after,
        "passed_through_after_experts": list(site.passed_through),
        "selection_bias": site.observed.selection_bias,
        "groups": list(architecture.groups) if architecture.groups else None,
        "layers_choosing_by_token": [one.layer for one in architecture.moe if one.observed.chooses_by_token],
        "router_module": site.router,
        "experts_module": site.experts,
        "shared_experts_module": site.shared_experts,
        "attention_layers": [layer for layer, path in enumerate(architecture.attentions) if path],
        "attention_module": attentions[0] if attentions else None,
        "final_norm": architecture.final_norm,
        "head": architecture.head,
        "parameters": counts.total,
        "activated_parameters": counts.activated,
        "embedding_parameters": counts.embedding,
        "head_parameters": counts.head,
    }


def in_words(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What `describe` gave as (what, how it is), to be read by people."""
    groups = found["groups"]
    parameters = f"{_large(found['parameters'])}, of which a token uses {_large(found['activated_parameters'])}"
    within = f"; embedding {_large(found['embedding_parameters'])}, head {_large(found['head_parameters'])}"
    after = ", ".join([f"x {found['scale_after_experts']:g}", *found["passed_through_after_experts"]])
    attention = f"{found['attention_module']}, in layers {numbers(found['attention_layers'])}"
    return [
        ("model", f"{found['class']} ({found['model_type']}), {found['dtype']}"),
        ("quantised", found["quantization"] or "no"),
        ("layers", f"{found['layers']}, of width {found['d_model']}"),
        ("MoE layers", numbers(found["moe_layers"])),
        ("experts", f"{found['experts']} routed, {found['top_k']} per token; {found['shared_experts']} shared"),
        ("gating weights", found["scoring"]["in_words"]),
        ("after the experts", after),
        ("selection bias", found["selection_bias"] or "none"),
        ("groups of experts", f"{groups[0]}, a token may choose from {groups[1]}" if groups else "none"),
        ("chosen by token id", numbers(found["layers_choosing_by_token"])),
        ("router", found["router_module"]),
        ("routed experts", found["experts_module"]),
        ("shared experts", found["shared_experts_module"] or "none"),
        ("attention", attention if found["attention_module"] else "none that is known"),
        ("final norm, head", f"{found['final_norm']}, {found['head']}"),
        ("parameters", parameters + within),
    ]


def numbers(layers: Sequence[int]) -> str:
    """Rising numbers with runs drawn together, such as "0, 2–5"; "none" for no numbers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def _large(count: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return str(count)
