"""What a router does, seen by calling its own code with random weights on random tokens."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_lens.errors import MODEL_CRASHES, MoELensError
from moe_lens.routing import ScoringRule

PROBE_TOKENS = 64


@dataclass(frozen=True)
class ObservedRouter:
    """What calls of a router show.

    n_experts: as many as there are logits. scoring: the rule from logits to gating weights.
    output_slots: where logits [token, expert], weights [token, k] and indices [token, k] are in its output; None
        where the output is the logits alone, and the block around it chooses.
    returns_probabilities: whether the slot of the logits holds their softmax instead.
    map_width: outputs of its linear map, more than n_experts where shared experts are scored too.
    map_factor: what that map's output is multiplied by to get the logits.
    selection_bias: name, in the router or the block around it, of a tensor [expert] that changes which experts
        are selected but not the logits; None without.
    chooses_by_token: whether the token's id decides which experts are selected.
    """

    n_experts: int
    top_k: int
    scoring: ScoringRule
    output_slots: tuple[int, int, int] | None
    returns_probabilities: bool
    map_width: int
    map_factor: float
    selection_bias: str | None
    chooses_by_token: bool


def bare(module: nn.Module) -> nn.Module:
    """A copy of the module and all in it, with the same tensors, and of what moves, fetches or watches them nothing.

    So it has its class's own forward, and no hooks.
    """
    found = copy.copy(module)
    found.__dict__.pop("forward", None)
    found._parameters, found._buffers = dict(module._parameters), dict(module._buffers)
    found._forward_hooks, found._forward_pre_hooks = OrderedDict(), OrderedDict()
    found._modules = {name: child and bare(child) for name, child in module._modules.items()}
    return found


class RouterProbe:
    """A router with random weights in the place of its own, on the CPU; for a router on any device, also meta.

    path names the router in errors; block is the module around it, which may hold tensors that it is called with.
    """

    def __init__(self, router: nn.Module, path: str, block: nn.Module, *, seed: int = 0) -> None:
        self._router, self._path, self._block = bare(router), path, block
        self._generator = torch.Generator().manual_seed(seed)
        self.state = {name: self._random(tensor) for name, tensor in named_tensors(router) if tensor.ndim}
        matrices = [tensor for tensor in self.state.values() if tensor.ndim == 2 and tensor.is_floating_point()]
        if not matrices:
            raise MoELensError(f"the router at {path!r} has no weight [expert, d_model]; it has {list(self.state)}")
        self._rows = [len(matrix) for matrix in matrices]
        self._hidden = torch.randn(PROBE_TOKENS, matrices[0].shape[-1], generator=self._generator)
        for name, tensor in self.state.items():
            if not tensor.is_floating_point() and tensor.ndim == 2:  # a table of experts by token
                rows, columns = torch.arange(len(tensor))[:, None], torch.arange(tensor.shape[1])
                self.state[name] = (rows + columns) % self._rows[0]
        self.arguments = self._further_arguments()

    @property
    def chooses_by_token(self) -> bool:
        """Whether the router is called with token ids."""
        return "input_ids" in self.arguments

    def __call__(self) -> Any:
        """The router's output for `PROBE_TOKENS` tokens; MoELensError if it cannot be called."""
        try:
            return self._call(self._hidden)
        except MODEL_CRASHES as flat:
            try:
                return self._call(self._hidden[None])  # some want [batch, pos, d_model]
            except MODEL_CRASHES:
                raise MoELensError(
                    f"the router at {self._path!r} cannot be called with hidden states [token, d_model] alone: {flat}"
                ) from flat

    def map_width(self, n_experts: int) -> int:
        """Outputs of the linear map that makes the logits: as many as experts, or more."""
        return min(rows for rows in self._rows if rows >= n_experts)

    def map_factor(self, logits: Tensor, map_width: int) -> float:
        """What the linear map's output is multiplied by to get the `logits` [token, expert] of a call; 1 where unseen.

        A number that is the same for all of a token's experts may be added to them.
        """
        with _LinearMaps() as maps:
            self()
        for output in maps.outputs:
            if output.shape[-1] == map_width and output.numel() == len(logits) * map_width:
                made = output.reshape(len(logits), map_width)[:, : logits.shape[-1]].float()
                made, target = (x - x.mean(-1, keepdim=True) for x in (made, logits.float()))
                factor = ((made * target).sum() / made.square().sum()).item()
                if (target - factor * made).abs().max() <= 1e-4 * target.abs().max():
                    return float(f"{factor:.6g}")
        return 1.0

    def _call(self, hidden: Tensor) -> Any:
        with torch.no_grad():
            return torch.func.functional_call(self._router, self.state, (hidden,), self.arguments)

    def _further_arguments(self) -> dict[str, Tensor]:
        """Arguments besides hidden states: token ids, and those named like a tensor of the block around."""
        known = {name: self._random(tensor) for name, tensor in named_tensors(self._block) if "." not in name}
        if "input_ids" in _parameters(self._router):
            known["input_ids"] = torch.arange(PROBE_TOKENS)
        return {name: known[name] for name in _parameters(self._router)[1:] if name in known}

    def _random(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.randn(tensor.shape, generator=self._generator).div(max(tensor.shape[-1:], default=1) ** 0.5)

    def changed(self, name: str) -> "RouterProbe":
        """The same probe with other random numbers in one tensor, of its own or its arguments."""
        other = RouterProbe.__new__(RouterProbe)
        vars(other).update(vars(self))
        other.state, other.arguments = dict(self.state), dict(self.arguments)
        place = other.state if name in other.state else other.arguments
        place[name] = 4 * self._random(place[name])
        return other

    def candidates_for_bias(self, n_experts: int) -> list[str]:
        """Names of the floating tensors with one number per expert."""
        everything = {**self.state, **self.arguments}
        return [name for name, t in everything.items() if t.numel() == n_experts and t.is_floating_point()]


class _LinearMaps(TorchFunctionMode):
    """Keeps what every linear map inside the block puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") == "linear":
            self.outputs.append(output)
        return output


def output_slots(output: Any, path: str) -> tuple[int, int, int] | None:
    """Where logits, weights and indices are in a router's output; None if it is the logits alone.

    MoELensError for an output that is neither.
    """
    if isinstance(output, Tensor) and output.ndim == 2:
        return None
    parts = output if isinstance(output, tuple) and all(isinstance(part, Tensor) for part in output) else ()
    chosen = [i for i, part in enumerate(parts) if not part.is_floating_point() and part.ndim == 2]
    if len(chosen) == 1:
        shape = parts[chosen[0]].shape
        floats = [i for i, part in enumerate(parts) if part.is_floating_point() and part.ndim == 2]
        logits = [i for i in floats if len(parts[i]) == shape[0] and parts[i].shape[-1] > 1]
        weights = [i for i in floats if parts[i].shape == shape and i not in logits[:1]]
        if logits and weights:
            return logits[0], weights[0], chosen[0]
    raise MoELensError(
        f"the router at {path!r} returns {_shapes(output)}; expected logits [token, expert], "
        "gating weights [token, k] and selected experts [token, k]"
    )


def are_probabilities(logits: Tensor) -> bool:
    """Whether each token's values [token, expert] are a distribution."""
    return bool((logits >= 0).all()) and torch.allclose(logits.sum(-1), torch.ones(len(logits)), atol=1e-4)


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a module by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _parameters(module: nn.Module) -> list[str]:
    """Argument names of the module's class's forward: a tracing library may have replaced the instance's."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _shapes(output: Any) -> str:
    parts = output if isinstance(output, tuple) else (output,)
    return ", ".join(str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
