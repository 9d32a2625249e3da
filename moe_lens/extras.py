"""Optional packages, imported when they are first needed, or asked for by the name of their extra."""

from importlib import import_module
from types import ModuleType

from moe_lens.errors import MoELensError


def optional(module: str, *, extra: str) -> ModuleType:
    """The module; MoELensError naming the extra that installs it where it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # something that the package itself needs
        raise MoELensError(
            f"this needs the package {error.name}; install it with: pip install 'moe_lens[{extra}]'"
        ) from None
