"""Gradients of what the logits of a batch say, with respect to what experts are given and give; of no weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lens.architecture import Inputs
from moe_lens.data import Batch
from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.protocol import Intervention
from moe_lens.lens.positions import Positions, any_position_mask, position_mask
from moe_lens.lens.reader import TraceReader
from moe_lens.lens.taken import joint_log_probability

Key = TypeVar("Key", int, str)
Effect = Literal["gate", "logit", "output"]
"""What `Gradients` can hold of each expert."""
Value = Callable[[Tensor, Batch, Sequence[int]], Tensor]
"""A number of each row, [batch]: of the logits [batch, row, vocab] from the last token of the first prompt that ends to
the end of the batch, of the batch, and of the places of its examples in the input."""

SHARE = 4
"""By how much a pass whose gradients are taken has to be smaller, since it keeps what all layers have computed."""


def of_gradients(batch_size: int) -> int:
    """How many examples such a pass takes, where one without gradients takes so many: a quarter, and one at least."""
    return max(1, batch_size // SHARE)


@dataclass(frozen=True, eq=False)
class Gradients:
    """First-order effects of every expert, at every position, on a number of each row of one batch.

    values: the numbers, float64 [batch]. effects: by kind and MoE layer, float32 [batch, pos, expert]:
        "gate", the derivative with respect to a factor of the expert's gating weight (gate times gradient), which is
        0 where the expert is not selected; "logit", that with respect to its router logit, what `Bias` adds to;
        "output", gradient of the sum of the routed experts times the expert's own output for the token, selected
        or not: what it would change per gating weight. Of the last only the positions that were asked for.
    """

    batch: Batch
    places: Sequence[int]
    values: Tensor
    effects: Mapping[str, Mapping[int, Tensor]]

    def position_mask(self, positions: Positions) -> Tensor:
        """Which positions count, bool [batch, pos]; MoELensError, naming it, for an example that has none."""
        mask = _mask(self.batch, positions)
        for name, own in zip(self.batch.ids, mask, strict=True):
            if not own.any():
                raise MoELensError(
                    f"example {name!r} has no position {positions!r} to count; leave such examples out, or take other "
                    "positions, such as 'all' or 'last'"
                )
        return mask


@dataclass(frozen=True, eq=False, repr=False)
class LogitLevers(Intervention):
    """Adds 0 to every router logit, a tensor [batch, pos, expert] by layer, with respect to which gradients are."""

    levers: Mapping[int, Tensor]

    @classmethod
    def of(cls, layers: Collection[int], rows: int, width: int, n_experts: int) -> "LogitLevers":
        return cls({layer: torch.zeros(rows, width, n_experts, requires_grad=True) for layer in layers})

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        return RouterChange(bias=self.levers[layer])

    def __repr__(self) -> str:
        return "a bias of 0"


@dataclass
class Levers:
    """Neutral changes of what one batch does in each MoE layer, put in while it runs.

    wanted: kinds of effects. scale: what all gating weights are multiplied by, 1 where the model is as it is.
    """

    wanted: Collection[Effect]
    scale: float
    gates: dict[int, Tensor] = field(default_factory=dict)  # [batch, pos, k]
    indices: dict[int, Tensor] = field(default_factory=dict)  # [batch, pos, k]
    sums: dict[int, Tensor] = field(default_factory=dict)  # [batch, pos, d_model]
    calls: dict[int, Inputs] = field(default_factory=dict)

    def pull(self, reader: TraceReader) -> None:
        """Inside a trace: put them in, layer by layer."""
        for layer in reader.architecture.moe_layers:
            if "gate" in self.wanted or self.scale != 1:
                self.indices[layer], weights = reader.used_gating(layer)
                self.gates[layer] = torch.zeros_like(weights, requires_grad=True)
                reader.set_gating_weights(layer, weights * (self.scale + self.gates[layer]))
            if "output" in self.wanted:
                self.calls[layer] = reader.experts(layer).inputs
                self.sums[layer] = torch.zeros_like(reader.routed_sum(layer), requires_grad=True)
                reader.add_to_routed(layer, self.sums[layer])


def expect_effects(reader: TraceReader, wanted: Collection[str]) -> None:
    """MoELensError unless these are effects, and the model can tell them."""
    unknown = [str(one) for one in wanted if one not in get_args(Effect)]
    if unknown or not wanted:
        raise MoELensError(f"effects are of {', '.join(get_args(Effect))}; got {', '.join(unknown) or 'none'}")
    for layer in reader.architecture.moe_layers if "output" in wanted else ():
        site = reader.architecture.at(layer)
        lacks = site.no_single_outputs or site.no_output_of_any
        if lacks:
            raise MoELensError(
                f"{lacks} in {site.experts!r}, so what an expert that was not selected would give cannot be told; "
                "take effects of 'gate' or 'logit'"
            )


def expect_values(values: object, rows: int) -> None:
    """MoELensError unless these are a number of each row that has a gradient."""
    if not isinstance(values, Tensor) or values.shape != (rows,) or not values.requires_grad:
        got = f"{list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise MoELensError(
            f"expected one number of each of {rows} examples, a tensor [{rows}] made of the logits; got {got}: leave "
            ".item(), .detach() and no_grad out of the target"
        )


def expect_finite(values: Tensor, logits: Tensor, names: Sequence[str]) -> None:
    """NotFiniteError, naming the first example, for numbers that are not finite though the logits of their row are."""
    own = ~values.isfinite() & logits.isfinite().flatten(1).all(-1).to(values.device)
    if own.any():
        raise NotFiniteError(
            f"the target is not finite of example {names[int(own.nonzero()[0])]!r}, though the model's logits are; "
            "mend the target, or leave such examples out"
        )


def gradients_of(
    values: Tensor, levers: Mapping[str, Mapping[Key, Tensor]], *, in_terms: Collection[str] = ()
) -> dict[str, dict[Key, Tensor]]:
    """The gradient of the sum of `values` with respect to each lever, by kind and layer or name.

    in_terms: kinds of which each process finds a term, that of its part of every expert; the gradient is their sum.
    Raises MoELensError, naming it, where none goes through, and NotFiniteError for one that is not finite.
    """
    flat = [(kind, layer, lever) for kind, own in levers.items() for layer, lever in own.items()]
    found = torch.autograd.grad(values.sum(), [lever for *_, lever in flat], allow_unused=True)
    gradients: dict[str, dict[Key, Tensor]] = {kind: {} for kind in levers}
    for (kind, layer, _), gradient in zip(flat, found, strict=True):
        if gradient is not None and kind in in_terms:
            dist.all_reduce(gradient)
        if gradient is None:
            raise MoELensError(
                f"no gradient goes through the {kind} of {layer}: the model's code detaches it, or uses it nowhere"
            )
        if not bool(gradient.isfinite().all()):
            raise NotFiniteError(
                f"the gradient with respect to the {kind} of {layer} is not finite, though the model's numbers "
                "are; open the model in float32 (--dtype float32)"
            )
        gradients[kind][layer] = gradient.float()
    return gradients


def effects_of(
    module: nn.Module,
    reader: TraceReader,
    batch: Batch,
    levers: Levers,
    gradients: Mapping[str, Mapping[int, Tensor]],
    positions: Collection[Positions],
) -> dict[str, dict[int, Tensor]]:
    """`Gradients.effects` from the gradients by kind and layer."""
    n_experts = reader.architecture.n_experts
    effects: dict[str, dict[int, Tensor]] = {kind: {} for kind in levers.wanted}
    for layer, gradient in gradients.get("gate", {}).items():
        if "gate" in levers.wanted:
            whole = gradient.new_zeros(*gradient.shape[:-1], n_experts)
            effects["gate"][layer] = whole.scatter_add(-1, levers.indices[layer], gradient)
    effects |= {"logit": dict(gradients["logit"])} if "logit" in levers.wanted else {}
    spans = batch.context_spans, batch.question_spans
    counted = any_position_mask(batch.attention_mask, *spans, positions, batch.labels, batch.thoughts)
    for layer, gradient in gradients.get("output", {}).items():
        effects["output"][layer] = _of_outputs(module, reader, layer, levers.calls[layer], gradient, counted)
    return effects


@torch.no_grad()
def _of_outputs(
    module: nn.Module, reader: TraceReader, layer: int, call: Inputs, gradient: Tensor, counted: Tensor
) -> Tensor:
    """Gradient [batch, pos, d_model] times every expert's output, [batch, pos, expert]; 0 where nothing is counted."""
    site = reader.architecture.at(layer)
    experts = module.get_submodule(site.experts)
    tokens = counted.flatten().nonzero()[:, 0].to(gradient.device)
    along = gradient.flatten(0, 1)[tokens]
    found = gradient.new_zeros(counted.numel(), reader.architecture.n_experts)
    for expert in range(reader.architecture.n_experts):
        arguments, named = site.alone(call, tokens, expert)
        output = experts(*arguments, **named)
        output = output[0] if isinstance(output, tuple) else output
        found[tokens, expert] = (output.reshape(along.shape).float() * along).sum(-1)
    return found.view(*counted.shape, -1)


@contextmanager
def learning(module: nn.Module, tensors: Collection[Tensor]) -> Iterator[None]:
    """Inside the block these, and no other parameters of the module, ask for gradients; afterwards as before."""
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)


def answer_log_probability(logits: Tensor, batch: Batch, places: Sequence[int] = ()) -> Tensor:
    """The log-probability (nats) of each row's answer, end-of-sequence included, float32 [batch].

    logits: [batch, row, vocab] from the token before the first label to the end.
    """
    return joint_log_probability(logits, batch.answer_labels)


def _mask(batch: Batch, positions: Positions) -> Tensor:
    spans = batch.context_spans, batch.question_spans
    return position_mask(batch.attention_mask, *spans, positions, batch.labels, batch.thoughts)
