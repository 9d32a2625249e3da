"""Chosen experts as small parameters of their own, so that training them costs as little as they are.

The experts of a layer are one fused tensor. Training some of them through it would need gradients, and an
optimizer's state, for all. Here the chosen ones are copied out; the tokens routed to them run through the
copies, all other tokens through the fused tensor, which is frozen. The sums are those of the model itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.quantized import is_expert_parallel
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet

IMPLEMENTATION = "moe_lens_slices"
PREFIX = "trained_"
FUSED = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


class FusedExperts(nn.Module):
    """The attributes of transformers' fused experts, of which each family has its own class; a type, never made.

    down_proj: [expert, …]. trained_ids [chosen] and trained_slot [expert] are there while slices are trained.
    """

    num_experts: int
    down_proj: Tensor
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    trained_ids: Tensor
    trained_slot: Tensor


def is_fused(experts: nn.Module) -> TypeGuard[FusedExperts]:
    """Whether an experts module holds fused tensors [expert, …] and lets its computation be chosen."""
    down = getattr(experts, "down_proj", None)
    return isinstance(down, Tensor) and down.ndim == 3 and hasattr(experts, "_is_expert_parallel")


def fused_fields(experts: nn.Module) -> list[str]:
    """The names of the fused tensors [expert, …] of an experts module, also of those that are sums for now (LoRA)."""
    return [field for field in FUSED if _holds(experts, field)]


def _holds(experts: nn.Module, field: str) -> bool:
    # a sum would be made anew to be looked at
    return experts._parameters.get(field) is not None or parametrize.is_parametrized(experts, field)


@contextmanager
def grouped_experts(module: nn.Module, architecture: MoEArchitecture) -> Iterator[None]:
    """Inside the block every fused experts module computes by `_forward`; the model's own way is restored after.

    Also without slices this serves training: its backward gives the same bytes every time on the CPU, with several
    threads too, and is not slow there, as that of other implementations is.
    """
    experts = [module.get_submodule(site.experts) for site in architecture.moe]
    if not any(map(is_fused, experts)):
        yield
        return
    if any(map(is_expert_parallel, experts)):
        raise MoELensError("expert-parallel models cannot be trained here; load the model without expert parallelism")
    model = pretrained(module)
    before = model.config._experts_implementation
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def trained_slices(module: nn.Module, architecture: MoEArchitecture, chosen: ExpertSet) -> Iterator[list[str]]:
    """Inside the block the chosen experts are parameters of their own, whose names it gives.

    Each is [chosen, …], in the order of the ids in `chosen` and the model's dtype. Leaving writes their values into
    the fused tensors and removes them. Inside, `save_pretrained` is refused: it would write the experts as they were.
    Raises MoELensError for layers or experts that the model lacks, or experts that are not fused.
    """
    sites = {layer: architecture.at(layer).experts for layer in chosen.layers}
    modules: dict[int, FusedExperts] = {}
    for layer, path in sites.items():
        found = module.get_submodule(path)
        if not is_fused(found):
            raise MoELensError(f"the experts of layer {layer} are no fused tensors; train their parameters whole")
        modules[layer] = found
    with grouped_experts(module, architecture), no_plain_checkpoint(module):
        names: list[str] = []
        try:
            for layer, experts in modules.items():
                names += [f"{sites[layer]}.{name}" for name in _copy_out(experts, chosen[layer])]
            yield names
        finally:
            for experts in modules.values():
                _put_back(experts)


def _copy_out(experts: FusedExperts, ids: Sequence[int]) -> list[str]:
    """Give `experts` a parameter for the chosen slices of each fused tensor."""
    device, chosen = experts.down_proj.device, len(ids)
    index = torch.tensor(ids, device=device)
    slot = torch.arange(experts.num_experts, device=device) + chosen  # chosen experts first, then all as they are
    slot[index] = torch.arange(chosen, device=device)
    experts.register_buffer("trained_ids", index, persistent=False)
    experts.register_buffer("trained_slot", slot, persistent=False)
    fields = fused_fields(experts)
    for field in fields:
        experts.register_parameter(PREFIX + field, nn.Parameter(getattr(experts, field).detach()[index]))
    return [PREFIX + field for field in fields]


@torch.no_grad()
def _put_back(experts: FusedExperts) -> None:
    """Write the slices into the fused tensors, and leave no trace of them."""
    if getattr(experts, "trained_ids", None) is None:
        return
    for field in fused_fields(experts):
        fused, values = getattr(experts, field), getattr(experts, PREFIX + field)
        fused[experts.trained_ids] = values.to(fused.dtype)
        delattr(experts, PREFIX + field)
    del experts.trained_ids, experts.trained_slot


@contextmanager
def no_plain_checkpoint(module: nn.Module) -> Iterator[None]:
    """Inside the block `save_pretrained` is refused, since it would not write what the model computes."""
    if "save_pretrained" in vars(module):  # refused already, by a block around this one
        yield
        return

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise MoELensError(
            "save_pretrained would write the weights as they were before training; leave the training block "
            "first, or save a delta"
        )

    vars(module)["save_pretrained"] = refuse
    try:
        yield
    finally:
        del vars(module)["save_pretrained"]


def _forward(self: FusedExperts, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
    """The experts' output [token, d_model], of hidden_states [token, d_model], selected and weights [token, k].

    Rows, one per token and selected expert, are sorted by slot: the chosen experts' come first.
    """
    k, device = selected.shape[1], hidden_states.device.type
    # Under autocast all experts multiply in its dtype: in float32 many devices would do so one expert after another.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    ids = getattr(self, "trained_ids", None)
    chosen = 0 if ids is None else len(ids)
    key = selected.reshape(-1) if ids is None else self.trained_slot[selected.reshape(-1)]
    key, order = torch.sort(key, stable=True)
    slots = torch.arange(chosen + self.num_experts, device=key.device)
    counts = torch.searchsorted(key, slots, right=True).diff(prepend=slots[:1])  # bincount makes the host wait
    ours = int(counts[:chosen].sum()) if chosen else 0
    parts = [] if ids is None else [(slice(0, ours), counts[:chosen], 0, PREFIX)]
    parts.append((slice(ours, None), counts[chosen:], chosen, ""))
    outputs = []
    for rows, sizes, first, prefix in parts:
        held = {field: getattr(self, prefix + field) for field in fused_fields(self)}
        if prefix or dtype:
            held = {field: tensor.to(dtype or getattr(self, field).dtype) for field, tensor in held.items()}
        tensors = {field: _OnlyUsed.apply(tensor, sizes) for field, tensor in held.items()}
        # index_select: its backward is deterministic and fast. One per part, so that frozen rows are not kept.
        inputs = hidden_states.to(dtype or hidden_states.dtype).index_select(0, order[rows] // k)
        outputs.append(_expert_rows(self, inputs, sizes.cumsum(0, dtype=torch.int32), key[rows] - first, tensors))
    summed: Tensor = _WeightedSum.apply(weights, order, *outputs)
    return summed[:, 0].to(hidden_states.dtype)


class _OnlyUsed(torch.autograd.Function):
    """A tensor [expert, …] as it is, to which experts without rows give no gradient; sizes: int64 [expert].

    Backward, kernels of grouped products on some accelerators leave what was in the memory where there are no rows.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: Tensor) -> Tensor:
        ctx.save_for_backward(sizes)
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (sizes,) = ctx.saved_tensors
        unused = (sizes == 0).view(-1, *[1] * (grad.ndim - 1))
        return grad.masked_fill_(unused, 0), None  # in place: the one product that took the tensor made it for this


class _WeightedSum(torch.autograd.Function):
    """What each token gets [token, 1, d_model]: its rows' outputs times its weights, summed in a fixed order.

    weights: [token, k]. order: which of all places (token * k + place) each row serves. outputs: the rows
    [row, d_model], in one part or several. Autograd's own backward would pass over all rows more often.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, order: Tensor, *outputs: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in outputs]
        rows = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        placed = rows.index_select(0, order.argsort()).view(*weights.shape, -1)
        ctx.save_for_backward(weights, order, placed if ctx.needs_input_grad[0] else None)
        return _batched_product(weights[:, None], placed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, order, placed = ctx.saved_tensors
        of_weights = None if placed is None else _batched_product(placed, grad.mT)[..., 0]
        of_outputs = [
            grad[:, 0].index_select(0, places // weights.shape[1]).mul_(weights.reshape(-1, 1)[places])
            if needed
            else None
            for places, needed in zip(order.split(ctx.sizes), ctx.needs_input_grad[2:], strict=True)
        ]
        return of_weights, None, *of_outputs


def _batched_product(left: Tensor, right: Tensor) -> Tensor:
    """[batch, n, m] of [batch, n, p] and [batch, p, m], in the more precise of their dtypes, also under autocast."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    with torch.autocast(left.device.type, enabled=False):
        return torch.bmm(left.to(dtype), right.to(dtype))


def _expert_rows(
    self: FusedExperts, inputs: Tensor, ends: Tensor, expert: Tensor, tensors: Mapping[str, Tensor]
) -> Tensor:
    """The outputs [row, d_model] of the inputs [row, d_model], which are sorted by expert.

    ends: where each expert's rows end. expert: each row's place among `tensors`, which are [expert, …].
    """

    def linear(rows: Tensor, field: str) -> Tensor:
        weight, bias = tensors[field], tensors[f"{field}_bias"][expert] if self.has_bias else None
        if len(rows):
            return _grouped_linear(rows, weight, ends, bias=bias, is_transposed=self.is_transposed)
        # Not every kernel of grouped products takes no rows at all; the gradients are zeros, as any would give.
        nothing = rows.to(weight.dtype) @ (weight[0] if self.is_transposed else weight[0].mT)
        return nothing if bias is None else nothing + bias

    inner = linear(inputs, "gate_up_proj" if self.has_gate else "up_proj")
    outputs = linear(self._apply_gate(inner) if self.has_gate else self.act_fn(inner), "down_proj")
    return self.post_expert_norm(outputs) if self.has_post_expert_norm else outputs


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
