"""What a method trains: the routers, chosen experts, or everything; or what it adds to the model as it is."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

from torch import nn

from moe_lens.architecture import MoEArchitecture
from moe_lens.data import Batch
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, expect_experts
from moe_lens.lens.delta import fingerprint, save_delta, weights_digest
from moe_lens.lens.interventions import Intervention
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import done_by_first
from moe_lens.tuning.slices import fused_fields, grouped_experts, is_fused, trained_slices

Around = Callable[[Batch], AbstractContextManager[object]]
"""What the bare module has to run a batch in."""


class Added(Protocol):
    """What learns beside a model's weights, which stay as they are."""

    def around(self, batch: Batch) -> AbstractContextManager[object]:
        """Inside the block the bare module runs this batch with it."""

    def intervention(self) -> Intervention:
        """The same, as it is now, for `lens.intervene`; also when the method's block was left."""


@dataclass(frozen=True)
class Trainable:
    """What is trainable while a method is attached to a model.

    names: of the module's parameters that the optimizer gets.
    count: trainable scalars. total: the scalars of the model itself.
    changed: the names of the model's own parameters that training changes, which exist also before and after.
    fingerprint: of these before training, as a delta records it. base: the whole model's `weights_digest` then.
    rows: for those of them in which only some experts change, the ids of these.
    template: how the lens asked its examples, text by name.
    added: what of it is no part of the model; None for a method that changes the model itself.
    """

    names: tuple[str, ...]
    count: int
    total: int
    changed: tuple[str, ...]
    fingerprint: str
    base: str
    template: Mapping[str, str]
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    added: Added | None = None

    @property
    def around(self) -> Around:
        """What the bare module runs each batch in."""
        return nullcontext if self.added is None else self.added.around

    def interventions(self) -> tuple[Intervention, ...]:
        """What the lens has to be under, to answer as trained so far."""
        return () if self.added is None else (self.added.intervention(),)

    def __str__(self) -> str:
        return f"{self.count:,} of {self.total:,} parameters are trained"


class Method(Protocol):
    """A choice of what to train, such as `TuneRouters` or `TuneExperts`."""

    @property
    def name(self) -> str:
        """What deltas and figures call it."""

    def facts(self) -> dict[str, object]:
        """The method and its settings as JSON values, for a delta's provenance."""

    def attached(self, lens: MoELens) -> AbstractContextManager[Trainable]:
        """Inside the block the parameters to train are there; leaving puts their values into the model itself."""


@dataclass(frozen=True)
class TuneRouters:
    """Router tuning (Eq. 6-7). layers: whose routers learn; None for all (Appendix E: one, or the first few)."""

    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "router"

    def facts(self) -> dict[str, object]:
        return {"method": self.name, "layers": None if self.layers is None else list(self.layers)}

    @contextmanager
    def attached(self, lens: MoELens) -> Iterator[Trainable]:
        trainable = _trainable(lens, router_parameters(lens, self.layers))
        with grouped_experts(lens.module, lens.architecture):
            yield trainable


@dataclass(frozen=True)
class TuneExperts:
    """Only the chosen experts learn: CEFT (Algorithm 1), ESFT, or any other choice. name: that choice's."""

    experts: ExpertSet
    name: str = "ceft"

    def __post_init__(self) -> None:
        expect_experts(self.experts)
        if not self.experts:
            raise MoELensError("there are no experts to train: the ExpertSet is empty")

    def facts(self) -> dict[str, object]:
        return {"method": self.name, "experts": {str(layer): list(ids) for layer, ids in self.experts.members}}

    @contextmanager
    def attached(self, lens: MoELens) -> Iterator[Trainable]:
        module, rows, apart = lens.module, *_parameters_of(lens, self.experts)
        trainable = _trainable(lens, (*rows, *apart), rows)
        fused = {path.rpartition(".")[0] for path in rows}
        layers = [site.layer for site in lens.architecture.moe if site.experts in fused]
        with trained_slices(module, lens.architecture, self.experts.restrict(layers)) as slices:
            yield replace(trainable, names=(*slices, *apart))


@dataclass(frozen=True)
class TuneAll:
    """Full fine-tuning: every parameter learns."""

    name: ClassVar[str] = "fft"

    def facts(self) -> dict[str, object]:
        return {"method": self.name}

    @contextmanager
    def attached(self, lens: MoELens) -> Iterator[Trainable]:
        trainable = _trainable(lens, tuple(name for name, _ in lens.module.named_parameters()))
        with grouped_experts(lens.module, lens.architecture):
            yield trainable


PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class TuneParts:
    """The matrices of these parts of every layer learn: its attention, its MLP (of an MoE layer all experts), or both.

    Neither routers nor embeddings, norms and biases: what LoRA is mostly put on, with `TuneLowRank`.
    """

    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS) or len(set(self.parts)) < len(self.parts):
            raise MoELensError(f"the parts of a layer are {' and '.join(PARTS)}, each once; got {self.parts!r}")

    @property
    def name(self) -> str:
        return "+".join(self.parts)

    def facts(self) -> dict[str, object]:
        return {"method": self.name}

    @contextmanager
    def attached(self, lens: MoELens) -> Iterator[Trainable]:
        trainable = _trainable(lens, _matrices(lens, self.parts))
        with grouped_experts(lens.module, lens.architecture):
            yield trainable


def router_parameters(lens: MoELens, layers: Iterable[int] | None = None) -> tuple[str, ...]:
    """The names of the routers' parameters, of all MoE layers or those given.

    Raises MoELensError for a layer that has no router, and for a model that cannot learn from its gating
    weights: with one expert per token and weights rescaled to sum to 1, that weight is 1 whatever the router says.
    """
    architecture = lens.architecture
    expect_gradient(architecture)
    paths = [architecture.at(layer).router for layer in (architecture.moe_layers if layers is None else layers)]
    return tuple(name for path in paths for name in _names_below(lens.module, path))


def expect_gradient(architecture: MoEArchitecture) -> None:
    """MoELensError for a model that cannot learn from its gating weights."""
    if architecture.top_k == 1 and architecture.renormalizes:
        raise MoELensError(
            "with top_k = 1 and renormalised weights no gradient reaches the routers; choose another model"
        )


def save_trained(module: nn.Module, trained: Trainable, folder: str | Path, *, facts: Mapping[str, object]) -> None:
    """Save what training changed in `module` as a delta, after the method's block was left.

    facts: JSON values kept beside the tensors, such as the model's name and what it was trained on.
    """
    save_delta(
        module,
        trained.changed,
        folder,
        facts={"template": dict(trained.template), **facts},
        fingerprint=trained.fingerprint,
        rows=trained.rows,
        base_digest=trained.base,
    )


def _parameters_of(lens: MoELens, experts: ExpertSet) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Of the experts: the fused parameters with the ids among them, and the names of those that are modules apart."""
    n_experts = lens.architecture.n_experts
    beyond = [pair for pair in experts if pair[1] >= n_experts]
    if beyond:
        raise MoELensError(f"expert ids must be below n_experts = {n_experts}; got (layer, id) {beyond}")
    rows: dict[str, tuple[int, ...]] = {}
    apart: list[str] = []
    for layer in experts.layers:
        path = lens.architecture.at(layer).experts
        module = lens.module.get_submodule(path)
        if is_fused(module):
            rows |= {f"{path}.{name}": experts[layer] for name in fused_fields(module)}
        else:
            apart += [name for expert in experts[layer] for name in _names_below(lens.module, f"{path}.{expert}")]
    return rows, apart


def _matrices(lens: MoELens, parts: Sequence[str]) -> tuple[str, ...]:
    """The names of the matrices in these parts of all layers; MoELensError where a layer's attention is not known."""
    architecture = lens.architecture
    unknown = [layer for layer, path in enumerate(architecture.attentions) if path is None]
    if unknown:
        raise MoELensError(
            f"what is attention in the layers {unknown} of {type(lens.module).__name__} cannot be told from the rest; "
            "train routers, chosen experts, or everything"
        )
    attention = tuple(f"{path}." for path in architecture.attentions)
    own = [path for site in architecture.moe for path in (site.router, site.shared_gate) if path is not None]
    neither, within = tuple(f"{path}." for path in own), tuple(f"{path}." for path in architecture.layers)
    found = []
    for name, parameter in lens.module.named_parameters():
        if name.startswith(within) and not name.startswith(neither) and is_matrix(name, parameter):
            part = "attention" if name.startswith(attention) else "mlp"
            found += [name] if part in parts else []
    return tuple(found)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or one for each expert; a bias for each expert is none."""
    return parameter.ndim > 1 and not name.endswith("bias")


def _names_below(module: nn.Module, path: str) -> list[str]:
    """The full names of the parameters below `path`; MoELensError if there are none."""
    names = [name for name, _ in module.named_parameters() if name.startswith(f"{path}.")]
    if not names:
        raise MoELensError(f"{type(module).__name__} has no parameters at {path!r}, so nothing there can be trained")
    return names


def _trainable(lens: MoELens, changed: tuple[str, ...], rows: Mapping[str, tuple[int, ...]] | None = None) -> Trainable:
    """What changes if the named parameters, or these experts of them, are trained where they are."""
    module, rows = lens.module, rows or {}
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    lengths = {name: len(module.get_parameter(name)) for name in rows}
    told, base = done_by_first(lambda: (fingerprint(module, changed, rows), weights_digest(module)))
    return Trainable(
        names=changed,
        count=sum(sizes[name] * len(rows[name]) // lengths[name] if name in rows else sizes[name] for name in changed),
        total=sum(sizes.values()),
        changed=changed,
        fingerprint=told,
        base=base,
        template=lens.template.facts(),
        rows=rows,
    )
