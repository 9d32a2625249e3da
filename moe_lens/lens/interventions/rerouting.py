"""Reroute: chosen experts are taken away before the top-k, by a mode around the router's own code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_lens.errors import MoELensError
from moe_lens.lens.interventions.protocol import OnExperts
from moe_lens.routing import Routing

CHOICES = ("topk", "max", "argmax")
"""The functions by which routers choose."""


@dataclass(frozen=True, eq=False, repr=False)
class Reroute(OnExperts):
    """Removes experts before the top-k, so that the next expert steps in. Equal to physically deleting them.

    What the paper's released code does, where its text describes `Zero`.
    """

    mode: ClassVar[str] = "reroute"

    def __call__(self, layer: int, routing: Routing) -> Routing:
        return routing  # the router chose without the experts already

    def excluded(self, layer: int, n_experts: int) -> Tensor:
        mask = torch.zeros(n_experts, dtype=torch.bool)
        mask[list(self.experts[layer])] = True
        return mask


class WithoutExperts(TorchFunctionMode):
    """A router called inside this block decides as if there were no `excluded` experts, bool [token, expert].

    Both the logits and the operand of each top-k over all experts become -inf there. The logits alone would
    not do: where a selection bias is added to bounded scores, an expert with logit -inf can still be chosen,
    with weight 0. The top-k alone would not do either: softmax over all experts would still count it.
    """

    def __init__(self, excluded: Tensor, *, map_width: int) -> None:
        """map_width: outputs of the router's linear map; those beyond the experts, of shared ones, are kept."""
        super().__init__()
        self._excluded = excluded
        self._map_width = map_width
        self._masked: set[str] = set()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in CHOICES and args[0].numel() == self._excluded.numel():  # also per group: [token, group, expert]
            self._masked.add("choice")
            args = (args[0].masked_fill(self._excluded.view(args[0].shape), -torch.inf), *args[1:])
        output = function(*args, **(kwargs or {}))
        if name == "linear" and output.shape[-1] == self._map_width:
            self._masked.add("logits")
            others = self._map_width - self._excluded.shape[-1]
            excluded = F.pad(self._excluded, (0, others))
            return output.masked_fill(excluded.view(output.shape), -torch.inf)
        return output

    def check(self, router: str, *, chooses: bool) -> None:
        """MoELensError unless logits and choice were both seen, so that nothing was rerouted in name only.

        chooses: whether the router itself chooses, or the block around it by the logits.
        """
        needed = {"logits", "choice"} if chooses else {"logits"}
        if not self._masked >= needed:
            raise MoELensError(
                f"cannot reroute {router!r}: expected it to make logits by a linear map and choose by top-k, "
                f"saw {sorted(self._masked) or 'neither'}; use Zero or Renormalize"
            )
