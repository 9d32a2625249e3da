"""From tables to figures and pages, and one prompt as an interactive view; drawing needs no torch."""

from importlib import import_module
from typing import Any

_HOMES = {
    "attention_of_tokens": "views",
    "attention_view": "views",
    "build_report": "page",
    "experts_of_tokens": "views",
    "routing_view": "views",
    "show": "views",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """A public name, imported when first asked for: the files that the page gathers load this one before it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_lens.report' has no attribute {name!r}")
    return getattr(import_module(f"moe_lens.report.{_HOMES[name]}"), name)
