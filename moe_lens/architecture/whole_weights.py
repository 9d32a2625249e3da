"""Loading a checkpoint's weights, all of them: those that are missing or of another shape are refused by name."""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from moe_lens.errors import MoELensError

SHOWN = 5
"""Names of weights that are told; the others are counted."""
UNCONVERTED = re.compile(r"^(\S+)\s*\|.*\bCONVERSION\b", re.MULTILINE)


def load_whole(folder: str | Path, **chosen: Any) -> nn.Module:
    """What `AutoModelForCausalLM.from_pretrained` gives, whose weights all come from the checkpoint.

    Transformers fills up what is missing with random numbers. Weights that the model ties to others may be missing.
    Raises MoELensError for a weight that is missing, of another shape, or cannot be brought into the model's layout; of
    those that the model has no place for, a warning tells.
    """
    with _conversion_explained(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **chosen
        )
    model: nn.Module = loaded[0]
    told: dict[str, Any] = loaded[1]
    if missing := told["missing_keys"]:
        raise MoELensError(
            f"the checkpoint at {str(folder)!r} lacks weights of {type(model).__name__}: {_names(missing)}; random "
            "ones would be measured in their place: complete it, or open it as the model that it was saved from"
        )
    if misfits := told["mismatched_keys"]:
        said = [f"{name} is {list(found)} there and {list(wanted)} here" for name, found, wanted in sorted(misfits)]
        raise MoELensError(
            f"the checkpoint at {str(folder)!r} has weights of another shape than {type(model).__name__} by its "
            f"config.json: {_names(said)}; correct the config, or open it as the model that it was saved from"
        )
    if unexpected := told["unexpected_keys"]:
        warnings.warn(
            f"the checkpoint at {str(folder)!r} has weights that {type(model).__name__} has no place for, and that are "
            f"left out: {_names(unexpected)}",
            stacklevel=2,
        )
    return model


@contextmanager
def _conversion_explained(folder: str | Path) -> Iterator[None]:
    """Inside the block, transformers' error of weights that it cannot convert becomes a MoELensError.

    It writes their names to its log alone, so the log is read here at a level at which it does; where that is not the
    user's level, nothing more is shown for it.
    """
    report = _Kept()
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level, logger.propagate
    if not logger.isEnabledFor(logging.WARNING):
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    logger.addHandler(report)
    try:
        yield
    except RuntimeError as error:
        names = UNCONVERTED.findall(report.text)
        if not names:
            raise
        raise MoELensError(
            f"the checkpoint at {str(folder)!r} lacks parts of weights, or has some of another shape, so that these "
            f"cannot be put together: {_names(names)}; complete the checkpoint"
        ) from error
    finally:
        logger.removeHandler(report)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _Kept(logging.Handler):
    """Keeps the text that is logged."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def _names(names: Iterable[str]) -> str:
    """The first few in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
