"""How a model is held while it trains, and that everything but the trained values is as before afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from moe_lens.architecture.discovery import pretrained
from moe_lens.errors import MoELensError
from moe_lens.lens.holding import plain_outputs
from moe_lens.lens.offloaded import expect_in_memory


@contextmanager
def training(
    module: nn.Module,
    trained: Mapping[str, nn.Parameter],
    *,
    gradient_checkpointing: bool = False,
    split_on: torch.device | None = None,
) -> Iterator[AbstractContextManager[object]]:
    """Gradients for `trained` alone, in float32 since small updates vanish in half precision; all undone after.

    trained: parameters of `module`, by name. gradient_checkpointing: its layers keep their inputs only and run again
        backward.
    split_on: this process's device, where the model will be split over several in the block; before that it may lie
        elsewhere, or have shapes only.

    Gives the context in which to run the model: autocast for a half-precision model. torch's random numbers stay the
    caller's. Sums are made in a fixed order where torch can: on the CPU the same seed gives the same bytes, also with
    several threads; elsewhere some kernels add in any order, and runs of one seed differ by rounding.
    Afterwards the module is in evaluation mode, nothing in it requires a gradient, and `trained` has its old dtypes.
    Raises MoELensError for a model in float16, one that cannot checkpoint its layers, and parameters on a disk.
    """
    _check(module, gradient_checkpointing=gradient_checkpointing)
    if split_on is None:
        expect_in_memory(module, trained, "it is to be trained")
    dtypes = {name: parameter.dtype for name, parameter in trained.items()}
    half = torch.bfloat16 in {parameter.dtype for parameter in module.parameters()}
    device = (split_on or next(iter(trained.values())).device).type
    devices = {parameter.device for parameter in module.parameters()} | ({split_on} if split_on is not None else set())
    cuda = sorted({device.index for device in devices if device.type == "cuda"})
    try:
        module.train()
        module.requires_grad_(False)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if gradient_checkpointing:
            pretrained(module).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with plain_outputs(module), _sums_in_fixed_order(), torch.random.fork_rng(devices=cuda):
            yield torch.autocast(device, dtype=torch.bfloat16) if half else nullcontext()
    finally:
        if gradient_checkpointing:
            pretrained(module).gradient_checkpointing_disable()
        module.eval()
        module.requires_grad_(False)
        _as_stored(module, dtypes)


@contextmanager
def _sums_in_fixed_order() -> Iterator[None]:
    """Inside the block torch takes deterministic kernels where it has them, and warns where it has none."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module with properties, of which its type knows nothing
    filled = settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False  # or torch writes every new tensor twice
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


@contextmanager
def evaluating(
    module: nn.Module, dtypes: Mapping[str, torch.dtype], autocast: AbstractContextManager[object]
) -> Iterator[None]:
    """Inside a block of `training`: the model is as it will be left, in evaluation mode and without gradients.

    dtypes: the old ones of the trained parameters, by name, which these have inside; after the block they have their
        float32 values again, not rounded. A model that is split over processes keeps float32 and runs under `autocast`,
        which `training` gave.
    """
    parameters = dict(module.named_parameters())
    precise = {name: parameters[name].data for name in dtypes}
    split = any(isinstance(tensor, DTensor) for tensor in precise.values())
    module.eval()
    _as_stored(module, dtypes)
    try:
        # A weight that is a sum of others (LoRA) is summed once, not at every token.
        with torch.no_grad(), parametrize.cached(), autocast if split else nullcontext():
            yield
    finally:
        for name, tensor in precise.items():
            parameters[name].data = tensor
        module.train()


def _as_stored(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """The named parameters in these dtypes, without gradients; what is split over processes keeps its dtype."""
    parameters = dict(module.named_parameters())
    for name, dtype in dtypes.items():
        if not isinstance(parameters[name], DTensor):
            parameters[name].data = parameters[name].data.to(dtype)
        parameters[name].grad = None


def _check(module: nn.Module, *, gradient_checkpointing: bool) -> None:
    if torch.float16 in {parameter.dtype for parameter in module.parameters()}:
        raise MoELensError(
            "small gradients are 0 in float16, so the model would not learn; load it with dtype=torch.bfloat16"
        )
    if gradient_checkpointing and not getattr(module, "supports_gradient_checkpointing", False):
        raise MoELensError(f"{type(module).__name__} has no gradient checkpointing; train without it")
