"""The routers that decide in a layer: the model's own, and others that are in its place at some positions."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.architecture import Inputs, MoELayer
from moe_lens.architecture.router_probe import bare, named_tensors
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions.deciding import RouterChange, decide
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import Intervention

Router = Callable[..., Any]


@dataclass(frozen=True)
class ActingRouters:
    """The routers of one pass through a layer, each of which decides where its mask, bool [batch, pos], is True.

    parts: the first, whose mask is None, decides wherever no later one does.
    """

    site: MoELayer
    here: Here
    parts: Sequence[tuple[Router, Tensor | None]]

    @classmethod
    def of(cls, site: MoELayer, here: Here, own: Any, acting: Sequence[Intervention]) -> "ActingRouters":
        """own: the traced router of the model. acting: what interventions act, the outermost first."""
        parts: list[tuple[Router, Tensor | None]] = [(own, None)]
        for one in (other for each in acting for other in each.transplants(here)):

            def make(tensors: Mapping[str, Tensor] = one.tensors) -> Router:
                return _router_of(own._module, site, tensors, here.device)

            router = here.once((id(one.tensors), here.layer), make)
            if one.where is None:
                parts = [(router, None)]
            else:
                parts.append((router, one.where.expand(here.rows, here.width)))
        return cls(site, here, parts)

    def decide(self, call: Inputs, change: RouterChange, *, top_k: int) -> Any:
        """What they put out together when they decide as `change` asks and select `top_k` experts."""
        tokens, whole = self.here.rows * self.here.width, None
        for router, mask in self.parts:
            output = decide(self.site, router, call, change, n_tokens=tokens, top_k=top_k)
            whole = output if mask is None else self.site.mixed(whole, output, mask)
        return whole


def _router_of(own: nn.Module, site: MoELayer, tensors: Mapping[str, Tensor], device: torch.device) -> Router:
    """The router `own` of a layer with other tensors, by path, on a device; what is not among them it keeps.

    Raises MoELensError for tensors of another dtype, and for kept ones that are not in memory.
    """
    router = bare(own)
    mine, given = dict(named_tensors(router)), {}
    for path, _ in site.router_tensors:
        name, other = path.removeprefix(f"{site.router}."), tensors.get(path)
        if name not in mine:  # the block hands it over at each call
            given[path.rpartition(".")[2]] = None if other is None else other.to(device)
        elif other is not None:
            _expect_dtype(path, other, mine[name])
            part, _, leaf = name.rpartition(".")
            module = router.get_submodule(part)
            there: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            there[leaf] = other.to(device)
        elif mine[name].is_meta:
            raise MoELensError(f"{path} was moved out of memory by device_map; give one that keeps routers on a device")
    names = list(inspect.signature(type(own).forward).parameters)[1:]
    replaced = {name: tensor for name, tensor in given.items() if tensor is not None}

    def called(*arguments: Any, **named: Any) -> Any:
        taken = [replaced.get(name, argument) for name, argument in zip(names, arguments, strict=False)]
        return router(*taken, **{name: replaced.get(name, argument) for name, argument in named.items()})

    return called


def _expect_dtype(path: str, other: Tensor, own: Tensor) -> None:
    """MoELensError where another router's tensor would have to be rounded."""
    if other.dtype != own.dtype:
        raise MoELensError(
            f"{path} is {other.dtype} in the other routers and {own.dtype} here; open both models in one dtype"
        )
