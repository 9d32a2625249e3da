"""`remembered`: functions whose results are kept, as by `functools.lru_cache`, but which can be sent to a server."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """A function that keeps its last `size` results; what is sent of it is the function, without them."""

    def __init__(self, function: Callable[..., T], size: int) -> None:
        self._function, self._size = function, size
        self._kept = lru_cache(maxsize=size)(function)

    def __call__(self, *arguments: Any) -> T:
        return self._kept(*arguments)

    def __reduce__(self) -> tuple[type["Remembered[T]"], tuple[Callable[..., T], int]]:
        return Remembered, (self._function, self._size)


def remembered(size: int) -> Callable[[Callable[..., T]], Remembered[T]]:
    """A decorator: the last `size` results are kept."""
    return lambda function: Remembered(function, size)
