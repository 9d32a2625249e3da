"""Numbers that are not finite: noticed in every pass, and where they begin found in a second one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import pretrained
from moe_lens.data import Encoded
from moe_lens.errors import NotFiniteError
from moe_lens.lens.offloaded import stored
from moe_lens.lens.reader import TraceReader

SHOWN = 3
"""Weights, and examples, that are named; the others are counted."""


class FiniteSteps(LogitsProcessor):
    """Changes nothing and notes, at each step of generation, whose logits are finite, bool [batch]."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.isfinite().all(-1))
        return scores


def finite_streams(reader: TraceReader, layers: Sequence[int]) -> list[Tensor]:
    """Inside a trace: whether the residual stream after each of the layers is finite, bool [batch, pos] each."""
    return [reader.layer_output(layer).isfinite().flatten(2).all(-1) for layer in layers]


def all_finite(stream: Tensor, mask: Tensor, logits: Tensor, kept_mask: Tensor) -> bool:
    """Whether the stream is finite [batch, pos] wherever there is a token, and the logits [batch, row, vocab] there.

    One number is fetched from the device.
    """
    of_logits = (logits.isfinite().all(-1) | ~kept_mask.bool().to(logits.device)).all()
    of_stream = (stream | ~mask.bool().to(stream.device)).all()
    return bool((of_logits & of_stream.to(of_logits.device)).item())


def not_finite(
    module: nn.Module,
    architecture: MoEArchitecture,
    prompts: Sequence[Encoded],
    inputs: Mapping[str, Tensor],
    streams: Sequence[Tensor],
    under: str,
) -> NotFiniteError:
    """The error that says where it begins. inputs: input_ids and attention_mask [batch, pos], of the pass in which
    `finite_streams` gave the streams of all layers.

    The first layer of any example is named, with that example and its token, and the weights that hold such numbers.
    """
    mask = inputs["attention_mask"].bool().cpu()
    embedded = pretrained(module).get_input_embeddings()(inputs["input_ids"]).isfinite().flatten(2).all(-1)
    bad = torch.stack([(~stream.cpu()) & mask for stream in (embedded, *streams)])  # [embedding and layers, batch, pos]
    rows = bad.any(2)
    if rows.any():
        first = int(rows.any(1).nonzero()[0])
        row = int(rows[first].nonzero()[0])
        token = int(bad[first, row].nonzero()[0]) - int(mask[row].int().argmax())
        others = int(rows[first].sum()) - 1
        where = "in the embeddings" if first == 0 else f"first after layer {first - 1}"
        where += f", at token {token} of example {prompts[row].id!r}"
        where += f" (and in {others} more of {len(prompts)})" if others else ""
    else:
        ids = ", ".join(repr(prompt.id) for prompt in prompts[:SHOWN])
        where = f"behind the layers, in the final norm {architecture.final_norm!r} or the head {architecture.head!r}, "
        where += f"among the examples {ids}{', …' if len(prompts) > SHOWN else ''}"
    return NotFiniteError(f"the model's numbers are not finite{under}: {where}; {_cause(module)}")


def _cause(module: nn.Module) -> str:
    """Which weights hold such numbers, or else what makes numbers overflow; and what can be done."""
    found = [
        name
        for name, weight in module.named_parameters(remove_duplicate=False)
        if not bool(stored(module, name, weight).isfinite().all())
    ]
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f"NaN or infinity stands in {', '.join(found[:SHOWN])}{more}: take a checkpoint that is not damaged"
    dtype = str(pretrained(module).dtype).removeprefix("torch.")
    remedy = "the weights are too large" if dtype == "float32" else "open the model in float32 (--dtype float32)"
    return f"no weight is, so they overflow in {dtype}: {remedy}"
