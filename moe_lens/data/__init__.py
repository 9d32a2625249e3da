"""From files and data sets to examples, and from examples to tokens with context and answer spans."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lens.data.encoding import Batch, Encoded, collate, encode
    from moe_lens.data.example import Example
    from moe_lens.data.fitting import Fitted, fit
    from moe_lens.data.ingest import Loaded, load_examples, read_examples
    from moe_lens.data.prompts import FIGURE_10, Prompt, PromptTemplate
    from moe_lens.data.rows import parse_columns

__all__ = [
    "FIGURE_10",
    "Batch",
    "Encoded",
    "Example",
    "Fitted",
    "Loaded",
    "Prompt",
    "PromptTemplate",
    "collate",
    "encode",
    "fit",
    "load_examples",
    "parse_columns",
    "read_examples",
]

_NAMES = {
    "encoding": ("Batch", "Encoded", "collate", "encode"),
    "example": ("Example",),
    "fitting": ("Fitted", "fit"),
    "ingest": ("Loaded", "load_examples", "read_examples"),
    "prompts": ("FIGURE_10", "Prompt", "PromptTemplate"),
    "rows": ("parse_columns",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, imported when first asked for: what data there is can be told without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_lens.data' has no attribute {name!r}")
    return getattr(import_module(f"moe_lens.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
