"""LoRA: a method's weights stay frozen, and a product of two thin matrices is trained and added to each of them.

`torch.nn.utils.parametrize` puts the sum in the weight's place, so routers and slices of chosen experts run as ever,
and merging leaves in the model exactly the values that training ran with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.tuning.methods import Method, Trainable, is_matrix
from moe_lens.tuning.slices import no_plain_checkpoint


@dataclass(frozen=True)
class TuneLowRank:
    """LoRA on the weights that `method` would train: each gets W + alpha / rank · B A, and A and B alone learn.

    rank: of B A. alpha: scales it; None for 2 · rank. seed: of A's random start; B starts at 0, and with it the change.
    Of fused experts each chosen one has an A and B of its own, shared by gate and up, which are one tensor. Biases and
    other vectors stay frozen. Leaving merges: what is saved are the sums.
    """

    method: Method
    rank: int = 8
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha)

    @property
    def name(self) -> str:
        return f"{self.method.name}-lora"

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def facts(self) -> dict[str, object]:
        told = {"method": self.name, "rank": self.rank, "alpha": self.scale * self.rank, "lora_seed": self.seed}
        return self.method.facts() | told

    @contextmanager
    def attached(self, lens: MoELens) -> Iterator[Trainable]:
        module = lens.module
        with self.method.attached(lens) as whole:
            matrices = [name for name in whole.names if is_matrix(name, module.get_parameter(name))]
            with _adapted(module, matrices, self.rank, self.scale, self.seed) as names:
                count = sum(module.get_parameter(name).numel() for name in names)
                yield replace(whole, names=tuple(names), count=count)


def check_low_rank(rank: int, alpha: float | None) -> None:
    """MoELensError unless both, where they are given, are finite and above 0."""
    if rank < 1 or (alpha is not None and not 0 < alpha < inf):
        raise MoELensError(f"rank and alpha must be above 0; got rank = {rank}, alpha = {alpha}")


class _Sum(nn.Module):
    """W [..., out, in] -> W + scale · B A, with A [..., rank, in] and B [..., out, rank] in float32."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *several, out, inner = weight.shape
        bound = inner**-0.5
        a = torch.empty(*several, rank, inner).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(a.to(weight.device))
        self.B = nn.Parameter(torch.zeros(*several, out, rank, device=weight.device))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
            return (weight + self.scale * (self.B @ self.A)).to(weight.dtype)


@contextmanager
def _adapted(module: nn.Module, names: Sequence[str], rank: int, scale: float, seed: int) -> Iterator[list[str]]:
    """Inside the block the named weights are sums, and it gives the names of their A and B; leaving merges these."""
    generator = torch.Generator().manual_seed(seed)
    places = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
    orders = {owner: list(owner._parameters) for owner, _ in places.values()}
    trained: list[str] = []
    with no_plain_checkpoint(module):
        try:
            for name, (owner, field) in places.items():
                added = _Sum(getattr(owner, field), rank, scale, generator)
                parametrize.register_parametrization(owner, field, added)
                trained += [f"{name.removesuffix(field)}parametrizations.{field}.0.{part}" for part in "AB"]
            yield trained
        finally:
            for owner, field in places.values():
                if parametrize.is_parametrized(owner, field):
                    parametrize.remove_parametrizations(owner, field)
            for owner, order in orders.items():  # it puts what it gives back last
                for field in order:
                    owner._parameters[field] = owner._parameters.pop(field)
