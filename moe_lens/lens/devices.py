"""Between the CPU and a device with few copies, each of which makes the host wait: one each way, not one per layer."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class OnDevices:
    """A small tensor of the CPU, such as places or a mask, copied once to each device that has use for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.values = tensor
        self._copies = {tensor.device: tensor}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on this device."""
        if device not in self._copies:
            self._copies[device] = self.values.to(device)
        return self._copies[device]

    def of(self, values: Tensor, axis: int = 0) -> Tensor:
        """The values at these places of an axis, on the values' device; the tensor is int64 [place]."""
        return values.index_select(axis, self.on(values.device))


def places_of(mask: Tensor) -> Tensor:
    """Where a mask [batch, pos] is true, int64 [token]: places in the flattened batch, taken without a wait."""
    return mask.flatten().nonzero()[:, 0]


def has_float64(device: torch.device) -> bool:
    """Whether the device has numbers of 64 bits, which Apple's has not."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def on_device(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the CPU on a device, in their order; those of one dtype come together, by one copy."""
    return _moved(tensors, lambda tensor: tensor.device != device, device)


def on_cpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, in their order; those of one dtype on one device come together, by one copy."""
    return _moved(tensors, lambda tensor: tensor.device.type != "cpu", torch.device("cpu"))


def _moved(tensors: Iterable[Tensor], moves: Callable[[Tensor], bool], device: torch.device) -> list[Tensor]:
    """The tensors with those that move on `device`, all of one dtype from one device at once."""
    found = list(tensors)
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(found):
        if moves(tensor):
            together.setdefault((tensor.device, tensor.dtype), []).append(place)
    for places in together.values():
        joined = torch.cat([found[place].flatten() for place in places]).to(device)
        parts = joined.split([found[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(found[place].shape)
    return found
