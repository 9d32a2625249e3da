"""Pretend devices: tensors that say `pretend:0` or `pretend:1`, compute on the CPU and meet no tensor elsewhere.

    with pretend_devices():
        model.to("pretend:0")

torch lets a device be made in Python (`PrivateUse1`). Here a tensor of it holds one of the CPU's; each operator is held
against the rules of `device_rules`, counted by `device_counts`, and then computed on what the tensors hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from device_counts import calling_line, count_kernel, count_wait
from device_rules import COPIES, DeviceMismatchError, device_of_result, kinds_of_waiting, launches
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from moe_lens.architecture import quantized

aten = torch.ops.aten
NAME, COUNT = "pretend", 2


class PretendTensor(Tensor):
    """A tensor on a pretend device, which holds the CPU tensor that it stands for."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "PretendTensor":
        if _state.refuses_float64 and held.dtype == torch.float64:
            raise TypeError(f"there is no float64 on {device}; it was asked for at {calling_line()}")
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=device,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"PretendTensor({self.held!r}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch would do in C++, where it knows nothing of the tensor that is held."""
        if func is Tensor.tolist:
            count_wait("tolist")
            return args[0].held.tolist()
        if func is Tensor.data_ptr:
            return args[0].held.data_ptr()
        if func is Tensor.numpy:
            raise TypeError(f"can't convert a tensor on {args[0].device} to numpy, at {calling_line()}")
        if func == Tensor.data.__set__:  # made anew at each look
            return _set_data(*args)
        if func is Tensor.__setitem__ and isinstance(args[2], bool | int | float):
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))  # which CUDA leaves on the CPU
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def placed_at(device: torch.device | str) -> torch.device:
    """The device with its number, 0 where none is said; of the CPU without."""
    device = torch.device(device)
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device


def _set_data(target: Tensor, value: Tensor) -> None:
    if not (isinstance(target, PretendTensor) and isinstance(value, PretendTensor)):
        raise DeviceMismatchError(
            f".data of {target.device} was set to a tensor on {value.device}, at {calling_line()}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        target.data = value
    target.held = value.held


def _run(operator: Any, args: Any, kwargs: Any) -> Any:
    """An operator on pretend tensors: checked, counted, and computed on the CPU."""
    device = device_of_result(operator, args, kwargs)
    target = placed_at(kwargs.get("device") or device)
    if _state.refuses_float64 and operator in COPIES and target.type == "cpu" and _makes_float64(args, kwargs):
        raise TypeError(f"there is no float64 on {device}, which converts before it copies, at {calling_line()}")
    for kind in kinds_of_waiting(operator, args, kwargs):
        count_wait(kind)
    if launches(operator, device, target):
        count_kernel()
    if operator in LAZY:  # what is held below this level would lose its mark of being conjugate or negative
        return _on(target, LAZY[operator](args[0].held))
    result = _on(target, _computed(operator, *_held((args, kwargs))))
    if not operator._schema.is_mutable and not operator.is_view:
        return result
    if operator is aten.copy_.default and target.type == "cpu":
        return args[0]
    return return_and_correct_aliasing(operator, args, kwargs, result)


LAZY = {aten._conj.default: torch.conj_physical, aten._neg_view.default: torch.neg}
"""Operators that elsewhere only mark a tensor."""


def _makes_float64(args: Any, kwargs: Any) -> bool:
    """Whether a copy to the CPU changes to float64 on the way."""
    return torch.float64 in (kwargs.get("dtype"), args[0].dtype)


def _computed(operator: Any, args: Any, kwargs: Any) -> Any:
    """The operator on what pretend tensors hold."""
    own = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if own.get("device") is not None:
        own["device"] = torch.device("cpu")
    if operator is aten.histc.default and not args[0].is_floating_point():  # which the CPU cannot, and a GPU can
        return operator(args[0].float(), *args[1:], **own).to(args[0].dtype)
    return operator(*args, **own)


def _held(value: Any) -> Any:
    """An operator's arguments with the CPU's tensors in place of those that hold them."""
    if isinstance(value, PretendTensor):
        return value.held
    if type(value) in (list, tuple):
        return type(value)([_held(one) for one in value])
    return {name: _held(one) for name, one in value.items()} if type(value) is dict else value


def _on(device: torch.device, value: Any) -> Any:
    """An operator's result with its tensors on the device."""
    if type(value) in (list, tuple):
        return type(value)([_on(device, one) for one in value])
    return PretendTensor(value, device) if isinstance(value, Tensor) and device.type != "cpu" else value


class _State:
    """Whether the devices are there for whoever asks torch, and whether they have float64."""

    there = False
    refuses_float64 = False
    library: torch.library.Library | None = None


_state = _State()


class _Module:
    """`torch.pretend`: what torch and transformers ask of a device's module."""

    def is_available(self) -> bool:
        return _state.there

    def device_count(self) -> int:
        return COUNT if _state.there else 0

    def is_initialized(self) -> bool:
        return True

    def _lazy_init(self) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        count_wait("synchronize")

    def empty_cache(self) -> None: ...


@contextmanager
def pretend_devices(*, float64: bool = True) -> Iterator[None]:
    """Inside the block there are `pretend:0` and `pretend:1`, and the package takes their tensors for plain ones.

    float64: whether the devices have it; Apple's have not.
    """
    _install()
    before = _state.there, _state.refuses_float64, quantized.PLAIN_CLASSES
    _state.there, _state.refuses_float64 = True, not float64
    quantized.PLAIN_CLASSES = (*before[2], PretendTensor)  # a real device's tensors are torch's own
    try:
        with torch.autograd.set_multithreading_enabled(False):  # torch has threads for real devices only
            yield
    finally:
        _state.there, _state.refuses_float64, quantized.PLAIN_CLASSES = before


def _install() -> None:
    """Tell torch of the device, once per process; what makes tensors in C++ then makes pretend ones."""
    if _state.library is not None:
        return
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
    _state.library = torch.library.Library("aten", "IMPL", "PrivateUse1")

    def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        memory_format = memory_format or torch.contiguous_format
        return PretendTensor(torch.empty(size, dtype=dtype, memory_format=memory_format), placed_at(device))

    def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype), placed_at(device))

    def arange(start, end, step=1, *, dtype=None, layout=None, device=None, pin_memory=None):
        count_kernel()
        return PretendTensor(
            torch.arange(start, end, step, dtype=dtype), placed_at(device)
        )  # torch's own resizes an empty one

    def copy_from(source, target, non_blocking=False):
        return _run(aten.copy_.default, (target, source, non_blocking), {})

    def item(tensor):
        count_wait("item")
        return tensor.held.item()

    for name, made in {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        "arange.start_step": arange,
        "arange.start": arange,
        "arange": lambda end, **named: arange(0, end, **named),
        "_copy_from": copy_from,
        "_local_scalar_dense": item,
    }.items():
        _state.library.impl(name, made)
