"""What interventions ask of a router before it scores and selects, and the mode in which its own code does so."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lens.architecture import Inputs, MoELayer
from moe_lens.architecture.router_probe import ObservedRouter
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import on_device

CHOICES = ("topk", "max", "argmax")
"""The functions by which routers choose."""


@dataclass(frozen=True, eq=False)
class RouterChange:
    """What is asked of one layer's router; what is None is not asked.

    bias: added to the logits. selection_bias: the same, but for the selection only, not for the weights. extreme:
    logits that become the token's highest plus this where it is above 0, its lowest plus this where it is below; biases
    are added first. excluded: experts that cannot be selected, bool. forced: experts that are selected in any case,
    bool. selected: the selection to take, int64 [..., k], -1 where the token's own is to stay. top_k: how many experts
    are selected, int64 [..., 1], 0 where as many as ever. keeps_sum: whether the gating weights are rescaled to the sum
    that they have without all this, bool [..., 1].

    Tensors are [..., expert] but for these three; where a change is asked of all tokens alike, [expert] or
    [batch, expert].
    """

    bias: Tensor | None = None
    selection_bias: Tensor | None = None
    extreme: Tensor | None = None
    excluded: Tensor | None = None
    forced: Tensor | None = None
    selected: Tensor | None = None
    top_k: Tensor | None = None
    keeps_sum: Tensor | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, part.name) is not None for part in fields(self))

    @property
    def reselects(self) -> bool:
        """Whether the router's selection is changed otherwise than by its logits and by taking experts away."""
        return any(part is not None for part in (self.selection_bias, self.forced, self.selected))

    @staticmethod
    def on(device: torch.device, changes: Mapping[int, "RouterChange"]) -> dict[int, "RouterChange"]:
        """The changes of several layers on a device, by few copies."""
        parts = {layer: change._parts() for layer, change in changes.items()}
        moved = iter(on_device([part for named in parts.values() for part in named.values()], device))
        return {layer: RouterChange(**{name: next(moved) for name in named}) for layer, named in parts.items()}

    def per_token(self, rows: int, width: int, mask: Tensor | None) -> "RouterChange":
        """Of [expert] or [batch, expert] the same for each token, [token, expert]; nothing where `mask` is False.

        mask: bool [batch, pos]; None for everywhere.
        """
        spread = {}
        for name, part in self._parts().items():
            whole = part if part.ndim == 3 else part[..., None, :].expand(rows, width, -1)
            masked = whole if mask is None else whole.masked_fill(~mask[..., None], NOTHING[name])
            spread[name] = masked.reshape(rows * width, -1)
        return RouterChange(**spread)

    @classmethod
    def together(cls, changes: Iterable["RouterChange"]) -> "RouterChange":
        """All at once: biases add up, excluded and forced experts too; of the rest the last one's counts."""
        found: dict[str, Any] = {}
        for change in changes:
            for name, join in JOINED.items():
                value = getattr(change, name)
                if value is not None:
                    found[name] = join(found[name], value) if name in found else value
        return cls(**found)

    @classmethod
    def by_row(cls, changes: Sequence["RouterChange"]) -> "RouterChange":
        """Of one change for each row, each tensor [expert], the change of the batch, each [batch, expert]."""
        stacked = {}
        for name in JOINED:
            parts = [getattr(change, name) for change in changes]
            some = next((part for part in parts if part is not None), None)
            if some is not None:
                nothing = torch.full_like(some, NOTHING[name])
                stacked[name] = torch.stack([nothing if part is None else part for part in parts])
        return cls(**stacked)

    def _parts(self) -> dict[str, Tensor]:
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


NOTHING = {
    "bias": 0, "selection_bias": 0, "extreme": 0, "excluded": False, "forced": False, "selected": -1, "top_k": 0,
    "keeps_sum": False,
}  # fmt: skip
"""What stands for a token of which nothing is asked."""

JOINED: dict[str, Callable[[Any, Any], Any]] = {
    "bias": torch.add,
    "selection_bias": torch.add,
    "extreme": lambda first, second: torch.where(second != 0, second, first),
    "excluded": torch.logical_or,
    "forced": torch.logical_or,
    "selected": lambda first, second: torch.where(second >= 0, second, first),
    "top_k": lambda first, second: torch.where(second > 0, second, first),
    "keeps_sum": torch.logical_or,
}
"""How what several interventions ask is put together."""


class Deciding(TorchFunctionMode):
    """A router called inside this block decides as `change` asks.

    Its logits, the output of its linear map, get the bias, and -inf at excluded experts. The operand of each top-k over
    all experts is -inf there as well: the logits alone would not do, since where a selection bias is added to bounded
    scores, an expert with logit -inf can still be chosen, with weight 0. The top-k alone would not do either: softmax
    over all experts would still count it. Selections are replaced in what the top-k gives, and their scores taken from
    its untouched operand, so that weights follow by the router's own rule.
    """

    def __init__(self, change: RouterChange, observed: ObservedRouter, *, n_tokens: int, top_k: int) -> None:
        """observed: what the router was seen to do. top_k: how many experts each of the tokens shall get."""
        TorchFunctionMode.__init__(self)  # nnsight sends no method with a bare super() that a server could run
        self._change, self._observed, self._n_tokens, self._top_k = change, observed, n_tokens, top_k
        self._seen: set[str] = set()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, named = getattr(function, "__name__", ""), dict(kwargs or {})
        if name == "linear":
            output = function(*args, **named)
            return self._logits(output) if output.shape[-1] == self._observed.map_width else output
        # A choice among all experts of all tokens, or per group: [token, group, expert].
        if name not in CHOICES or args[0].numel() != self._n_tokens * self._observed.n_experts:
            return function(*args, **named)
        self._seen.add("choice")
        operand, *rest = args
        if self._change.excluded is not None:
            operand = operand.masked_fill(self._change.excluded.view(operand.shape), -torch.inf)
        k = named.pop("k", None) if "k" in named else rest.pop(0) if name == "topk" else None
        if name != "topk":
            return function(operand, *rest, **named)
        if operand.shape[-1] != self._observed.n_experts or k != self._observed.top_k:
            return function(operand, k, *rest, **named)
        self._seen.add("selection")
        return self._selected(function(operand, self._top_k, *rest, **named), operand)

    def _logits(self, output: Tensor) -> Tensor:
        """The linear map's output with what is added and excluded."""
        self._seen.add("logits")
        change, others = self._change, self._observed.map_width - self._observed.n_experts
        if change.bias is not None:
            bias = F.pad(change.bias / self._observed.map_factor, (0, others))
            output = output + bias.view(output.shape).to(output.dtype)
        if change.extreme is not None:
            output = self._at_the_ends(output, change.extreme)
        if change.excluded is not None:
            output = output.masked_fill(F.pad(change.excluded, (0, others)).view(output.shape), -torch.inf)
        return output

    def _at_the_ends(self, output: Tensor, extreme: Tensor) -> Tensor:
        """The linear map's output with chosen logits above the highest or below the lowest of each token's."""
        others = self._observed.map_width - self._observed.n_experts
        wanted = F.pad(extreme, (0, others)).view(output.shape)
        scored = output[..., : self._observed.n_experts]
        highest, lowest = scored.amax(-1, keepdim=True), scored.amin(-1, keepdim=True)
        moved = torch.where(wanted > 0, highest, lowest) + (wanted / self._observed.map_factor).to(output.dtype)
        return torch.where(wanted == 0, output, moved)

    def _selected(self, found: Any, operand: Tensor) -> Any:
        """What a top-k gives with the forced and the given experts in it."""
        change = self._change
        if change.forced is None and change.selected is None:
            return found
        indices = found.indices
        if change.forced is not None:
            indices = with_forced(indices, operand, change.forced.view(operand.shape))
        if change.selected is not None:
            given = change.selected.view(indices.shape)
            indices = torch.where(given >= 0, given, indices)
        return torch.return_types.topk((operand.gather(-1, indices), indices))

    def check(self, router: str, *, chooses: bool) -> None:
        """MoELensError unless all that is asked was seen to happen, so that nothing was changed in name only.

        chooses: whether the router itself chooses, or the block around it by the logits.
        """
        change = self._change
        by_logits = (change.bias, change.extreme, change.excluded)
        needed = {"logits"} if any(part is not None for part in by_logits) else set()
        needed |= {"choice"} if change.excluded is not None and chooses else set()
        needed |= {"selection"} if change.reselects or self._top_k != self._observed.top_k else set()
        if not self._seen >= needed:
            raise MoELensError(
                f"cannot change what {router!r} selects: expected it to make logits by a linear map and choose by "
                f"top-k, saw {sorted(self._seen) or 'neither'}; use an intervention on gating weights, such as Zero"
            )


def with_forced(indices: Tensor, operand: Tensor, forced: Tensor) -> Tensor:
    """Selected experts [..., k] with all `forced` ones, bool [..., expert], in the place of the lowest others.

    operand: by which they were selected, [..., expert]. Those that stay keep their slots.
    """
    wanted = operand.masked_fill(forced, torch.inf).topk(indices.shape[-1], dim=-1).indices
    same = indices[..., :, None] == wanted[..., None, :]
    stays, is_there = same.any(-1), same.any(-2)
    slots = stays.long().argsort(dim=-1, stable=True)  # the open ones first
    news = is_there.long().argsort(dim=-1, stable=True)  # the missing ones first
    put = torch.where(stays.gather(-1, slots), indices.gather(-1, slots), wanted.gather(-1, news))
    return indices.scatter(-1, slots, put)


def decide(
    site: MoELayer, router: Callable[..., Any], call: Inputs, change: RouterChange, *, n_tokens: int, top_k: int
) -> Any:
    """The output of `router`, called as `call` says, when it decides as `change` asks and selects `top_k` experts.

    Raises MoELensError for a router that cannot be made to.
    """

    def run(change: RouterChange) -> Any:
        mode = Deciding(change, site.observed, n_tokens=n_tokens, top_k=top_k)
        arguments, named = call
        with mode:
            output = router(*arguments, **named)
        mode.check(site.router, chooses=site.observed.output_slots is not None)
        return output

    if change.selection_bias is None:
        return run(change)
    bias = change.selection_bias if change.bias is None else change.bias + change.selection_bias
    _, indices, _ = site.decision(run(replace(change, bias=bias, selection_bias=None)))
    selected = indices if change.selected is None else torch.where(change.selected >= 0, change.selected, indices)
    return run(replace(change, selection_bias=None, forced=None, selected=selected))
