"""RouteAs: routers of another model decide in the place of this one's, on what these are given."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from torch import Tensor, nn

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.router_probe import named_tensors
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import TENSORS_FILE, read_facts
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import Placed, Transplant
from moe_lens.lens.offloaded import stored


class Opened(Protocol):
    """What a transplant needs of a lens."""

    module: nn.Module
    architecture: MoEArchitecture


@dataclass(frozen=True, eq=False, repr=False)
class RouteAs(Placed):
    """Lets other routers decide, on this model's own router inputs; selection and weights follow by their logits.

    In all layers it equals a model that has these routers, such as the base with the delta of a router tuning; in some
    layers, at some positions or steps, it tells where the routing of another model makes the difference. What is asked
    of routers (`Bias`, `Reroute`, …) is asked of these.

    routers: another lens, of the same architecture; or the folder of a delta in which nothing but routers is changed.
        Their tensors as they are now are held, by path: later training of the other model changes nothing here.
    layers: of these routers; None for all that there are.
    """

    routers: "Opened | str | Path | Mapping[str, Tensor]"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "routers", _tensors(self.routers, self.layers))

    @property
    def no_remote(self) -> str:
        return "the weights of other routers are not sent"

    @cached_property
    def digest(self) -> str:  # of large tensors, once
        return super().digest

    def __repr__(self) -> str:
        layers = "" if self.layers is None else f", layers={list(self.layers)}"
        return f"RouteAs({len(self.held)} tensors of other routers{layers}{self.where()})"

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The other routers' tensors by path."""
        assert isinstance(self.routers, Mapping)
        return self.routers

    def layers_in(self, architecture: MoEArchitecture) -> Collection[int]:
        if self.layers is not None:
            return self.layers
        return [site.layer for site in architecture.moe if any(path in self.held for path, _ in site.router_tensors)]

    def transplants(self, here: Here) -> list[Transplant]:
        return [Transplant(self.held, self.mask(here))]

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        known = {path: shape for site in architecture.moe for path, shape in site.router_tensors}
        for path, tensor in self.held.items():
            if path not in known:
                raise MoELensError(
                    f"{path} is no part of a router of this model, and RouteAs takes routers alone; open a lens with "
                    "the whole delta and take its routers, RouteAs(MoELens.from_pretrained(…, delta=…))"
                )
            if tuple(tensor.shape) != known[path]:
                raise MoELensError(
                    f"{path} is {list(tensor.shape)} in the other routers and {list(known[path])} here; take routers "
                    "of a model of the same architecture"
                )
        own = {site.layer: site.router_tensors for site in architecture.moe}
        for layer in self.layers or ():
            if not any(path in self.held for path, _ in own[layer]):
                raise MoELensError(f"there is no other router for layer {layer}; leave it out of layers={self.layers}")


def _tensors(given: Any, layers: Collection[int] | None) -> Mapping[str, Tensor]:
    """The tensors of routers by path: of a lens, those in these layers; of a delta's folder, all; or as they are."""
    if isinstance(given, Mapping) and given:
        return given
    if isinstance(given, str | Path):
        read_facts(given)
        return load_file(Path(given) / TENSORS_FILE)
    if not hasattr(given, "architecture"):
        raise MoELensError(f"expected routers of another lens, or the folder of a delta; got {given!r:.80}")
    sites = given.architecture.moe if layers is None else [given.architecture.at(layer) for layer in layers]
    everything = dict(named_tensors(given.module))
    paths = [path for site in sites for path, _ in site.router_tensors]
    return {path: stored(given.module, path, everything[path]).clone() for path in paths}
