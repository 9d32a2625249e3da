"""Tiny models on pretend devices: the whole of one on the first, or its layers split over two by accelerate."""

import copy
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from accelerate import dispatch_model
from torch import nn

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.listed import normalize

Place = Literal["cpu", "one", "two"]
FIRST, SECOND = "pretend:0", "pretend:1"


def placed(model: nn.Module, place: Place) -> nn.Module:
    """The model as it is, on one device, or split over two as `device_map` would load it; in place."""
    if place == "one":
        return put(model, {"": FIRST})
    return dispatch(model, halves(model)) if place == "two" else model


def put(model: nn.Module, device_map: Mapping[str, str]) -> nn.Module:
    """Move each tensor to the device of the longest path above it; what modules shared they share afterwards."""
    moved: dict[int, torch.Tensor] = {}
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in moved:
                    moved[id(tensor)] = _moved(tensor, _device_at(f"{path}.{name}".lstrip("."), device_map))
                if tensor is not None:
                    held[name] = moved[id(tensor)]
    return model


def dispatch(model: nn.Module, device_map: dict[str, str]) -> nn.Module:
    """Split a model as transformers does where a `device_map` names several devices."""
    skipped = getattr(model, "_skip_keys_device_placement", None)
    put(model, device_map)
    return dispatch_model(model, device_map, main_device=next(iter(device_map.values())), skip_keys=skipped)


def halves(model: nn.Module, first: str = FIRST, second: str = SECOND) -> dict[str, str]:
    """A device map: the first half of the layers and what stands before them, then the rest.

    A head that shares its weights with the embedding stands where that is.
    """
    described = copy.deepcopy(model)
    normalize(described)
    layers = MoEArchitecture.of(described).layers
    stack = layers[0].rpartition(".")[0]
    half = (len(layers) + 1) // 2
    found: dict[str, str] = {}

    def walk(module: nn.Module, path: str) -> None:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found.update({f"{path}.{name}".lstrip("."): first for name, _ in own})
        for name, child in module.named_children():
            at = f"{path}.{name}".lstrip(".")
            if at == stack:
                found.update({layer: first if place < half else second for place, layer in enumerate(layers)})
            elif stack.startswith(f"{at}."):
                walk(child, at)
            else:
                found[at] = second if layers[-1] in found else first

    walk(model, "")
    shared = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in shared:
            found[_path_above(name, found)] = first
    return found


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    there = tensor.detach().to(device)
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def _device_at(name: str, device_map: Mapping[str, str]) -> str:
    return device_map[_path_above(name, device_map)]


def _path_above(name: str, paths: Iterable[str]) -> str:
    """The longest of the paths that is `name` or leads to it."""
    return max((path for path in paths if not path or f"{name}.".startswith(f"{path}.")), key=len)
