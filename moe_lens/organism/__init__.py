"""The model organism: a small MoE language model whose unfaithfulness to the context, and its cure, are known."""

from pathlib import Path

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.loading import resolve

PLANTED_FILE = "planted.json"


def planted_experts(model: str | Path) -> ExpertSet:
    """The experts that pretraining routed context reading to, stored beside the weights of a planted organism.

    Raises MoELensError for a model without that truth.
    """
    truth = Path(resolve(model)) / PLANTED_FILE
    if not truth.is_file():
        raise MoELensError(f"nothing is planted in {str(model)!r}: it has no {PLANTED_FILE}; use organism:planted")
    return ExpertSet.from_json(truth.read_text(encoding="utf-8"))
