"""moe_lens: which experts of a Mixture-of-Experts language model do a thing, and whether they cause it."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AnswerProbability": "statistics",
    "AttentionMass": "statistics",
    "MODES": "lens.interventions",
    "Example": "data",
    "ExpertSet": "experts",
    "ExpertUsage": "statistics",
    "Intervention": "lens.interventions",
    "MoEArchitecture": "architecture",
    "MoELens": "lens.lens",
    "MoELensError": "errors",
    "PromptTemplate": "data",
    "Record": "lens.record",
    "Renormalize": "lens.interventions",
    "Reroute": "lens.interventions",
    "Routing": "routing",
    "Rows": "lens.interventions",
    "RouterLoad": "statistics",
    "RoutingVectors": "statistics",
    "ScoringRule": "routing",
    "Statistic": "statistics",
    "Zero": "lens.interventions",
    "answer_probability_gain": "metrics",
    "apply_delta": "lens.delta",
    "attention_gain": "metrics",
    "attention_rows": "lens.attention",
    "load_examples": "data",
    "save_delta": "lens.delta",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """A public name, imported when first asked for: tables and figures need neither torch nor nnsight."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_lens' has no attribute {name!r}")
    return getattr(import_module(f"moe_lens.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
