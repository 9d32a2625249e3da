"""What tells interventions and functions apart: a digest over class or code, and everything that one holds."""

import dis
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet

PACKAGE = __name__.partition(".")[0]
READ = (FunctionType, str, int, float, tuple, list, dict, Tensor, np.generic, np.ndarray, ExpertSet)
"""Members of a class that make a difference to what its objects do; its __init__ makes it by what they hold."""


def digest_of(value: object) -> str:
    """sha256 over an object's class and what it holds, or over a function, the same in every process.

    Of a class or function that no installed package names it takes the code too, with what that code reads of its
    module and of the function around it, so that an edited one is another. MoELensError for what cannot be told apart.
    """
    found = _Digest()
    if isinstance(value, FunctionType):
        found.function(value)
    else:
        found.holder(value)
    return found.sha.hexdigest()


def held(value: object) -> dict[str, Any]:
    """What an object holds, by name: a dataclass's fields, slots, and what attributes it has that no method made."""
    kinds = [vars(kind) for kind in type(value).__mro__]
    names = set(getattr(value, "__dict__", ()))
    names -= {name for name in names for kind in kinds if isinstance(kind.get(name), cached_property)}
    if is_dataclass(value):
        names |= {field.name for field in fields(value)}
    for kind in kinds:
        slots = kind.get("__slots__", ())
        names.update((slots,) if isinstance(slots, str) else slots)
    return {name: getattr(value, name) for name in sorted(names - {"digest"}) if hasattr(value, name)}


class _Digest:
    """A digest that is being filled."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.seen: set[int] = set()  # classes and functions, which can name themselves

    def add(self, text: str) -> None:
        self.sha.update(f"{len(text)} {text}\n".encode())

    def holder(self, value: object) -> None:
        """An object by its class and what it holds."""
        self.kind(type(value))
        self.value(held(value))

    def value(self, value: object) -> None:
        """A value, whatever it is made of, so that different ones differ."""
        match value:
            case np.generic():
                self.value(value.item())
            case np.ndarray() if value.dtype != object:
                self.value(torch.as_tensor(value))
            case Tensor() if value.layout is torch.strided and not value.is_meta:
                self.add(f"tensor {value.dtype} {list(value.shape)}")
                self.sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            case Mapping():
                self.add(f"mapping {len(value)}")
                for name, inner in sorted(value.items(), key=lambda item: repr(item[0])):  # equal in whatever order
                    self.value(name)
                    self.value(inner)
            case tuple() | list():
                self.add(f"sequence {len(value)}")
                for inner in value:
                    self.value(inner)
            case None | str() | bytes() | int() | float() | complex() | bool() | ExpertSet() | torch.dtype():
                self.add(f"{type(value).__name__} {value if isinstance(value, ExpertSet) else repr(value)}")
            case set() | frozenset():
                self.value(("set", sorted(map(repr, value))))
            case ModuleType():
                self.add(f"module {value.__name__}")
            case type():
                self.kind(value)
            case FunctionType():
                self.function(value)
            case _ if isinstance(getattr(type(value), "digest", None), (property, cached_property)):
                self.add(f"digest {value.digest}")  # type: ignore[attr-defined]
            case _ if is_dataclass(value):
                self.holder(value)
            case MethodType():
                self.value((value.__func__, value.__self__))
            case BuiltinFunctionType() if value.__self__ is None or isinstance(value.__self__, (ModuleType, type)):
                self.add(f"{value.__module__}.{value.__qualname__}")
            case _:
                raise MoELensError(
                    "interventions and functions are told from others by what they hold: numbers, texts, arrays, "
                    f"experts, functions, or tuples and mappings of them; got {type(value).__name__}"
                )

    def kind(self, kind: type) -> None:
        """A class by its name; with its members, and those of the classes above it, where it is the user's own."""
        self.add(f"class {kind.__module__}.{kind.__qualname__}")
        if _is_known(kind) or id(kind) in self.seen:
            return
        self.seen.add(id(kind))
        for above in kind.__bases__:
            self.kind(above)
        for name, member in sorted(vars(kind).items()):
            part = _within(member)
            if (name == "__call__" or not name.startswith("__")) and isinstance(part, READ):
                self.add(name)
                self.value(part)

    def function(self, function: FunctionType) -> None:
        """A function by its name; where it is the user's own, by its code and what that reads from outside itself."""
        self.add(f"function {function.__module__}.{function.__qualname__}")
        if _is_known(function) or id(function) in self.seen:
            return
        self.seen.add(id(function))
        self.code(function.__code__, function.__globals__)
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            self.value(cell.cell_contents)

    def code(self, code: CodeType, names: Mapping[str, Any]) -> None:
        """Compiled code, that of functions within it too, and the values of the module's names that it reads."""
        self.value((code.co_code, code.co_names))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.code(constant, names)
            else:
                self.value(None if constant is Ellipsis else constant)
        for name in sorted({one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}):
            if name in names:
                self.add(name)
                self.value(names[name])


def _is_known(thing: type | FunctionType) -> bool:
    """Whether its name tells a class or function: it is Python's own, this package's or an installed one's."""
    file = Path(getattr(sys.modules.get(thing.__module__), "__file__", None) or "")
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    top = thing.__module__.partition(".")[0]
    return "<" not in thing.__qualname__ and (bool(installed) or top == PACKAGE or top in sys.stdlib_module_names)


def _within(member: object) -> object:
    """The function that a member of a class wraps, or the member itself."""
    match member:
        case property():
            return member.fget
        case cached_property():
            return member.func
        case classmethod() | staticmethod():
            return member.__func__
    return member
