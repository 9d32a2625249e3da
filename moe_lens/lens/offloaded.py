"""Weights that a device_map keeps out of the devices' memory: read from where they are, or refused before the work."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_lens.architecture.discovery import pretrained
from moe_lens.errors import MoELensError


def stored(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The values of a parameter of `module`, also where accelerate's hooks keep them in memory or on a disk.

    Of one that is split over processes the whole, for which all of them have to ask. Raises MoELensError for one that
    has none, of a model on the meta device.
    """
    if isinstance(parameter.data, DTensor):
        return parameter.data.full_tensor()
    if not parameter.is_meta:
        return parameter.detach()
    for weights, key in _maps(module, name):
        try:
            found: Tensor = weights[key]
        except KeyError:
            continue
        return found
    raise MoELensError(f"{name} is on the meta device and has no values; load the model with its weights")


def expect_in_memory(module: nn.Module, names: Collection[str], what: str) -> None:
    """MoELensError for the first of these parameters that is not in a device's memory; what: why it has to be there."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    away = next((name for name in names if name in parameters and parameters[name].is_meta), None)
    if away is not None:
        raise MoELensError(
            f"{away} was moved out of memory by device_map, and {what}; give a device_map that keeps it on a device"
        )


def expect_input_in_memory(module: nn.Module) -> None:
    """MoELensError where a device_map keeps the part that takes the tokens out of memory: they could be put nowhere."""
    if getattr(module, "hf_device_map", None) and pretrained(module).device.type == "meta":
        raise MoELensError(
            "the model's first part, which takes the tokens, was moved out of memory by device_map; give a device_map "
            "that keeps it on a device"
        )


def _maps(module: nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """What the hooks of the modules around a parameter hold, the innermost first, with its name in each."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        hook = getattr(module.get_submodule(path), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (weights := getattr(one, "weights_map", None)) is not None:
                yield weights, name[len(path) :].lstrip(".")
