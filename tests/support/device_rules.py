"""torch's device rules, as for CUDA: which tensors may meet in an operator, and which operators make the host wait."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from device_counts import calling_line
from torch import Tensor

aten = torch.ops.aten
Operator = torch._ops.OpOverload

COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
READS_INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor}
WRITES_INDEXED = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
#: Operators beside the pointwise ones in which a number in a CPU tensor without axes may join.
TAKES_NUMBERS = {
    aten.where.self,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.fill.Tensor,
    aten.fill_.Tensor,
}
#: Operators whose result's shape or value the host has to know before it goes on.
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
}
REPEATS = {aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor}
#: Operators that launch nothing, besides the views.
LAUNCHES_NOTHING = {
    aten.detach.default,
    aten._unsafe_view.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten._local_scalar_dense.default,
}


class DeviceMismatchError(RuntimeError):
    """Tensors of several devices met; torch raises a RuntimeError there, too."""


def device_of_result(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """The device on which an operator computes; DeviceMismatchError where torch would refuse its tensors."""
    if operator in COPIES:
        return args[0].device
    if operator in READS_INDEXED or operator in WRITES_INDEXED:
        return _device_of_indexed(operator, args)
    if operator._schema.name.startswith(("aten::_foreach", "aten::_fused_")):
        return _device_of_lists(operator, args)
    tensors = tensors_in((args, kwargs))
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1:
        return devices.pop()
    numbers = [tensor for tensor in tensors if tensor.device.type == "cpu" and not tensor.ndim]
    own = {tensor.device for tensor in tensors if not any(tensor is number for number in numbers)}
    taken = torch.Tag.pointwise in operator.tags or operator in TAKES_NUMBERS
    written = any(number is to for to in _written(operator, args, kwargs) for number in numbers)
    if len(own) != 1 or not taken or written:
        raise _mismatch(operator, tensors)
    return own.pop()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among an operator's arguments, which stand alone or in lists."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return [tensor for one in inner for tensor in tensors_in(one)]


def kinds_of_waiting(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Each reason for which the host waits in an operator, none if it does not."""
    if operator in WAITS:
        return [WAITS[operator]]
    if operator in REPEATS and kwargs.get("output_size") is None:
        return ["repeat_interleave"]
    if operator in COPIES:
        return _waits_of_copy(operator, args, kwargs)
    if operator not in READS_INDEXED and operator not in WRITES_INDEXED:
        return []
    indices = [index for index in args[1] if index is not None]
    moved = ["host to device"] * sum(index.device != args[0].device for index in indices)
    number = operator in WRITES_INDEXED and args[2].device.type == "cpu"  # written by a mask, without its places
    return moved + ["mask as index"] * sum(index.dtype in (torch.bool, torch.uint8) and not number for index in indices)


def launches(operator: Operator, device: torch.device, target: torch.device) -> bool:
    """Whether an operator on `device`, whose result lies on `target`, launches a kernel."""
    return not operator.is_view and operator not in LAUNCHES_NOTHING and target.type == device.type


def _waits_of_copy(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A copy from or to the host waits unless it is asked not to."""
    if operator is aten._to_copy.default:
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        without = kwargs.get("non_blocking")
    else:
        target, source = args[0].device, args[1].device
        without = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    if source.type == target.type or (without and target.type != "cpu"):
        return []
    return ["device to host" if target.type == "cpu" else "host to device"]


def _device_of_indexed(operator: Operator, args: Sequence[Any]) -> torch.device:
    """Indices may be the CPU's, values of any axes may not."""
    own = args[0].device
    indices = [index for index in args[1] if index is not None]
    wrong = [index for index in indices if index.device not in (own, torch.device("cpu"))]
    wrong += [value for value in tensors_in(args[2:]) if value.device != own and value.ndim]
    if wrong:
        raise _mismatch(operator, [args[0], *indices, *tensors_in(args[2:])])
    return own


def _device_of_lists(operator: Operator, args: Sequence[Any]) -> torch.device:
    """In an operator on lists of tensors, those at one place meet."""
    lists = [given for given in args if isinstance(given, list | tuple) and given and isinstance(given[0], Tensor)]
    for together in zip(*(given for given in lists if len(given) == len(lists[0])), strict=True):
        if len({tensor.device for tensor in together if tensor.ndim}) > 1:
            raise _mismatch(operator, together)
    return lists[0][0].device


def _written(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments into which an operator writes."""
    named = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    return [
        named[argument.name]
        for argument in operator._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named
    ]


def _mismatch(operator: Operator, tensors: Sequence[Tensor]) -> DeviceMismatchError:
    met = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
    return DeviceMismatchError(f"{operator}: expected all tensors on one device; got {met}, at {calling_line()}")
