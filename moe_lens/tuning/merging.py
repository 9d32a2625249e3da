"""A tuned model as a plain checkpoint, which needs nothing of moe_lens to be opened."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig

from moe_lens.architecture.discovery import pretrained
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.storage import replacing


def save_merged(lens: MoELens, folder: str | Path) -> None:
    """Write the whole model, with its tokenizer and the code that it may bring, for `AutoModelForCausalLM`.

    What is in `folder` stays until all of it is written. Raises MoELensError where it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as unfinished:
            with _valid_generation_config(lens.module):
                pretrained(lens.module).save_pretrained(unfinished)
            lens.tokenizer.save_pretrained(unfinished)
    except (OSError, SafetensorError) as error:
        raise MoELensError(f"cannot write the model to {folder}: {error}; make room and try again") from error


@contextmanager
def _valid_generation_config(module: nn.Module) -> Iterator[None]:
    """Inside the block the model's generation config has no settings that contradict each other, which none saves.

    Afterwards it is as it was. A warning says what was left out.
    """
    own = getattr(module, "generation_config", None)
    if own is None:
        yield
        return
    settings = own.to_diff_dict()
    kept: dict[str, Any] = {}
    while more := {name: value for name, value in settings.items() if _valid({**kept, name: value})}:
        name = next(iter(more))  # one by one: some settings are valid beside others only
        kept[name] = settings.pop(name)
    if settings:
        told = ", ".join(f"{name}={value!r:.40}" for name, value in settings.items())
        warnings.warn(f"left out of its generation config, which contradicts itself: {told}", stacklevel=3)
    pretrained(module).generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        pretrained(module).generation_config = own


def _valid(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
    except ValueError:
        return False
    return True
