"""A tuned model as a plain checkpoint, which needs nothing of moe_lens to be opened."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from moe_lens.architecture.discovery import pretrained
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens


def save_merged(lens: MoELens, folder: str | Path) -> None:
    """Write the whole model, with its tokenizer and the code that it may bring, for `AutoModelForCausalLM`.

    What is in `folder` stays until all of it is written. Raises MoELensError where it cannot be written.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        pretrained(lens.module).save_pretrained(unfinished)
        lens.tokenizer.save_pretrained(unfinished)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise MoELensError(f"cannot write the model to {folder}: {error}; make room and try again") from error
