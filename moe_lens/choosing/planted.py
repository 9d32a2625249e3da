"""The experts that pretraining planted an ability on, where that truth is stored beside a model's weights."""

from pathlib import Path

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.loading import resolve

PLANTED_FILE = "planted.json"


def has_planted(model: str | Path) -> bool:
    """Whether the truth about planted experts is stored beside a model's weights."""
    return (Path(resolve(model)) / PLANTED_FILE).is_file()


def planted_experts(model: str | Path) -> ExpertSet:
    """The experts that pretraining routed context reading to, stored beside the weights of a planted organism.

    Raises MoELensError for a model without that truth.
    """
    if not has_planted(model):
        raise MoELensError(f"nothing is planted in {str(model)!r}: it has no {PLANTED_FILE}; use organism:planted")
    return ExpertSet.from_json((Path(resolve(model)) / PLANTED_FILE).read_text(encoding="utf-8"))
