"""The logit lens: what a model would predict from a residual stream, by its own code behind the layers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import input_device
from moe_lens.errors import MoELensError


class LogitLens:
    """Reads residual streams as predictions: the logits that the model makes of them where its last layer's output is.

    Everything behind the layers is the model's own: final norm, head, scaling or capping of logits, joining of several
    residual streams. No layer runs, so interventions play no part. Not for use inside a trace: give it what a trace
    saved. That the last layer's output alone makes the logits is verified at the first use, once per lens.
    """

    def __init__(self, model: nn.Module, architecture: MoEArchitecture) -> None:
        self._model, self._architecture = model, architecture

    def __call__(self, residual: Tensor) -> Tensor:
        """Logits [..., vocab] of a residual stream [..., d_model] as a layer gives it, any axes for batch and pos."""
        given = self._verified_output
        last: Tensor = given[0] if isinstance(given, tuple) else given
        stream = last.shape[2:]  # or [stream, d_model] of several streams
        if residual.shape[-len(stream) :] != stream:
            expected = ", ".join(map(str, stream))
            raise MoELensError(f"expected a residual stream [..., {expected}]; got {list(residual.shape)}")
        flat = residual.to(last.device).reshape(-1, 1, *stream)  # every vector is a sequence of one position
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=input_device(self._model))
        with self._layers_give((flat, *given[1:]) if isinstance(given, tuple) else flat):
            logits = self._model(input_ids=ids, use_cache=False).logits
        return cast(Tensor, logits.reshape(*residual.shape[: -len(stream)], -1))

    @cached_property
    def _verified_output(self) -> Any:
        """The last layer's output for two tokens, a tensor or a tuple that begins with one.

        MoELensError unless it alone gives the model's logits: some models use earlier layers' outputs there, too.
        """
        model, seen = self._model, []
        last = model.get_submodule(self._architecture.layers[-1])
        handle = last.register_forward_hook(lambda *call: seen.append(call[-1]))
        ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        with torch.no_grad(), self._layers_give(seen[0]):
            again = model(input_ids=ids, use_cache=False).logits
        if not torch.allclose(logits, again, rtol=1e-2, atol=1e-2 * logits.abs().max().item()):
            raise MoELensError(
                f"the logits of {type(model).__name__} depend on more than its last layer's output, so a residual "
                "stream has no logits of its own"
            )
        return seen[0]

    @contextmanager
    def _layers_give(self, output: Any) -> Iterator[None]:
        """Inside the block every decoder layer gives `output`, whatever it is called with."""
        path, _, name = self._architecture.layers[0].rpartition(".")[0].rpartition(".")
        parent = self._model.get_submodule(path)
        layers = getattr(parent, name)
        setattr(parent, name, nn.ModuleList([_giving(layer, output) for layer in layers]))
        try:
            yield
        finally:
            setattr(parent, name, layers)


def _giving(layer: nn.Module, output: Any) -> nn.Module:
    """A stand-in with the layer's attributes that gives `output`."""
    stand_in = copy.copy(layer)
    stand_in._forward_hooks, stand_in._forward_pre_hooks = {}, {}
    stand_in.forward = lambda *arguments, **named: output
    return stand_in
