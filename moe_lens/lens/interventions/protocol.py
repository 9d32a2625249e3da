"""What every intervention is: a change of a running model, told from others by what it holds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.data import Batch
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, expect_experts
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.digests import digest_of, held
from moe_lens.lens.interventions.layer_values import Site
from moe_lens.lens.interventions.place import Here, Steps, check_place
from moe_lens.lens.interventions.stored import write_folder
from moe_lens.lens.positions import SPANNED, Positions
from moe_lens.lens.remembered import remembered
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False)
class Transplant:
    """Other routers' tensors, by path, that decide in the place of the model's own.

    where: at which positions of the pass, bool [batch, pos] or [batch, 1]; None for all.
    """

    tensors: Mapping[str, Tensor]
    where: Tensor | None


class Intervention:
    """A change of what experts do: the router is asked to decide otherwise, then the call edits what it decided.

    A subclass is a dataclass, `@dataclass(frozen=True, eq=False, repr=False)`, of settings, tensors and other
    interventions: `digest`, equality and a short repr follow from these, and from the subclass's own code. It says
    where it acts by attributes of these names:

    layers: absolute indices, in rising order; None for every MoE layer.
    positions, steps: as in `Here.mask`; elsewhere the model is left as it is.
    """

    layers: Collection[int] | None = None
    positions: Positions = "all"
    steps: Steps = "all"
    by_row: ClassVar[bool] = False
    """Whether what it does differs by row."""

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        """What is asked of the router of `layer` where it acts, each tensor [expert] or [batch, expert]."""
        return RouterChange()

    def selection(self, here: Here, k: int) -> Tensor | None:
        """The experts that the router shall select, int64 [batch, pos, k], -1 where it decides; None for no wish."""
        return None

    def transplants(self, here: Here) -> list[Transplant]:
        """The other routers that decide in the place of the model's own; where several do, the last one."""
        return []

    def __call__(self, here: Here, routing: Routing) -> Routing:
        """The routing that the experts get instead of `routing`, at every position of the pass."""
        return routing

    @property
    def sites(self) -> tuple[Site, ...]:
        """The values of a layer that `changed` changes, besides the routing."""
        return ()

    def changed(self, site: Site, here: Here, values: Tensor) -> Tensor:
        """What takes the place of the `values` of one of its sites, [batch, pos, d_model], at every position."""
        return values

    @property
    def selects(self) -> bool:
        """Whether it has a selection for the router."""
        return type(self).selection is not Intervention.selection

    @property
    def replaces_routers(self) -> bool:
        """Whether other routers decide in the place of the model's own."""
        return type(self).transplants is not Intervention.transplants

    @property
    def edits(self) -> bool:
        """Whether it changes what the router decided, and not only how it decides."""
        return type(self).__call__ is not Intervention.__call__

    @property
    def routes(self) -> bool:
        """Whether it changes the routing."""
        asks = type(self).asks is not Intervention.asks
        return asks or self.selects or self.replaces_routers or self.edits

    @property
    def lets_rows_leave(self) -> bool:
        """Whether it does the same to a row when others have left the batch; of classes of one's own nobody knows."""
        return type(self).__module__.startswith(__package__)

    @property
    def no_remote(self) -> str:
        """Why it cannot act in a model on a server; empty where it can."""
        return ""

    def layers_in(self, architecture: MoEArchitecture) -> Collection[int]:
        """The layers of a model that it acts in."""
        if self.layers is not None:
            return self.layers
        anywhere = self.sites and not self.routes and not any(site.of_experts for site in self.sites)
        return range(architecture.n_layers) if anywhere else architecture.moe_layers

    def mask(self, here: Here) -> Tensor | None:
        """Where in this pass it acts, bool [batch, pos]; None for everywhere."""
        return here.mask(self.positions, self.steps)

    def expect(self, batch: Batch) -> None:
        """MoELensError, naming the example, for one that lacks the span where it acts."""
        if self.positions in SPANNED:
            spans = batch.context_spans if self.positions == "context" else batch.question_spans
            lacking = [name for name, span in zip(batch.ids, spans, strict=True) if span is None]
            if lacking:
                what = "context" if self.positions == "context" else "question"
                raise MoELensError(
                    f"example {lacking[0]!r} has no {what}, where {self!r} is to act; leave such examples out or take "
                    "other positions"
                )

    def prepare(self, batch: Batch, rows: Sequence[int]) -> dict[int, Any]:
        """What it has to know of a batch, in these rows of which it acts, before it runs: `Here.prepared`, by id()."""
        return {}

    def take(self, rows: Sequence[int]) -> "Intervention":
        """The intervention for a batch made of these rows; the same for all rows unless it is `Rows`."""
        return self

    def check(self, architecture: MoEArchitecture) -> None:
        """MoELensError unless the model has the layers acted on, and all else that it needs."""
        for layer in self.layers or ():
            if self.routes or any(site.of_experts for site in self.sites):
                architecture.at(layer)
            elif layer >= architecture.n_layers:
                raise MoELensError(f"the model has layers 0 to {architecture.n_layers - 1}; got {layer}")
        for site in self.sites:
            site.check(architecture, self.layers)
        check_place(self.positions, self.steps)

    def scaled(self, factor: float) -> "Intervention":
        """The same, `factor` times as strong: 0 changes nothing; MoELensError for a kind of which that says nothing."""
        raise MoELensError(
            f"{type(self).__name__} has no strength that could be multiplied; kinds that have one are AddVector, Bias "
            "and LogitBias"
        )

    def save(self, folder: str | Path, *, made_by: Mapping[str, Any] | None = None) -> None:
        """Write it to a folder, for `load_intervention`: settings as JSON, tensors as safetensors, and its digest.

        made_by: where it comes from, such as what `provenance` of moe_lens.results gives.
        Raises MoELensError for one of the user's own class, or with a `Run`, which is open only while a program runs.
        """
        write_folder(self, self.digest, folder, made_by)

    @property
    def digest(self) -> str:
        """What tells an intervention from others, also in kept results: see `digest_of`, which also says its errors."""
        return digest_of(self)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Intervention) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in held(self).items())})"


@dataclass(frozen=True, eq=False, repr=False)
class Placed(Intervention):
    """An intervention whose place is given with it: `layers=`, `positions=`, `steps=`."""

    layers: Collection[int] | None = field(default=None, kw_only=True)
    positions: Positions = field(default="all", kw_only=True)
    steps: Steps = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        check_place(self.positions, self.steps)
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))

    def where(self) -> str:
        """The place in words, for reprs; empty where it is everywhere."""
        found = [f"{name}={getattr(self, name)!r}" for name in ("positions", "steps") if getattr(self, name) != "all"]
        return "".join(f", {part}" for part in found)

    @property
    def digest(self) -> str:
        """As every intervention's; remembered where this package's code and settings that stay make it."""
        settings = tuple(vars(self).items())
        stays = all(isinstance(value, ExpertSet | str | float | int | tuple | None) for _, value in settings)
        return _of_settings(type(self), settings) if stays and self.is_ours() else digest_of(self)

    @classmethod
    def is_ours(cls) -> bool:
        """Whether it is of this package, whose classes do not change while they are in use."""
        return cls.__module__.startswith(__package__)


@dataclass(frozen=True, eq=False, repr=False)
class OnExperts(Placed):
    """An intervention on one set of experts, the same for every row."""

    experts: ExpertSet
    mode: ClassVar[str]

    def __post_init__(self) -> None:
        expect_experts(self.experts)
        super().__post_init__()
        if self.layers is not None:
            both = tuple(layer for layer in self.experts.layers if layer in self.layers)
            if not both:
                raise MoELensError(
                    f"{self.experts.brief()} and layers={tuple(self.layers)} never meet, so nothing would be changed"
                )
            object.__setattr__(self, "experts", self.experts.restrict(both))
        object.__setattr__(self, "layers", self.experts.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.experts.brief()}{self.where()})"

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        expect_known(self.experts, architecture)


@dataclass(frozen=True, eq=False, repr=False)
class OnGating(OnExperts):
    """An intervention on the gating weights of one set of experts, after the router has decided."""

    def __call__(self, here: Here, routing: Routing) -> Routing:
        return self.edited(routing, self.table(here, routing.n_experts)[routing.indices])

    def edited(self, routing: Routing, hits: Tensor) -> Routing:
        """`routing` with the selected experts of the set, `hits`, bool [batch, pos, k], changed; exact without any."""
        raise NotImplementedError

    def table(self, here: Here, n_experts: int) -> Tensor:
        """Which experts of the layer are in the set, bool [expert]."""
        return _on_device(self.experts[here.layer], n_experts, here.device)


def expect_known(experts: ExpertSet, architecture: MoEArchitecture) -> None:
    """MoELensError for experts that the model lacks."""
    for layer in experts.layers:
        unknown = [expert for expert in experts[layer] if expert >= architecture.n_experts]
        if unknown:
            raise MoELensError(
                f"layer {layer} has experts 0 to {architecture.n_experts - 1}; got {unknown} in '{experts}'"
            )


def chosen(experts: Sequence[int], n_experts: int) -> Tensor:
    """Which of all experts these are, bool [expert]."""
    table = torch.zeros(n_experts, dtype=torch.bool)
    table[list(experts)] = True
    return table


@remembered(4_096)
def _on_device(experts: tuple[int, ...], n_experts: int, device: torch.device) -> Tensor:
    """`chosen`, made once and not at every layer and step."""
    return chosen(experts, n_experts).to(device)


@remembered(65_536)
def _of_settings(kind: type[Placed], settings: tuple[tuple[str, Any], ...]) -> str:
    return digest_of(kind(**dict(settings)))


def _layers(layers: Collection[int]) -> tuple[int, ...]:
    """Layers in rising order; MoELensError for what are none."""
    if not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise MoELensError(f"layers must be one or more absolute indices, such as [3, 4]; got {layers!r}")
    return tuple(sorted(set(layers)))


def acts_in(intervention: Intervention, layer: int) -> bool:
    """Whether it acts in a layer; one that names none acts in all that have what it changes."""
    return intervention.layers is None or layer in intervention.layers


def _brief(value: object) -> str:
    """A value in a few words: a tensor's dtype and shape, the beginning of what is long."""
    text = f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
