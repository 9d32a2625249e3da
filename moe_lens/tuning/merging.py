"""A tuned model as a plain checkpoint, which needs nothing of moe_lens to be opened."""

from pathlib import Path

from safetensors import SafetensorError

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
            pretrained(lens.module).save_pretrained(unfinished)
            lens.tokenizer.save_pretrained(unfinished)
    except (OSError, SafetensorError) as error:
        raise MoELensError(f"cannot write the model to {folder}: {error}; make room and try again") from error
