"""Examples in files of their own, which commands take as data: chosen once, the same for every step of a study."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from moe_lens.data import Example
from moe_lens.storage import write_bytes


def write_examples(examples: Sequence[Example], file: Path) -> None:
    """A .jsonl file that `load_examples` reads as these."""
    rows = [{**asdict(one), "answer": one.answers, "original_answer": one.memory} for one in examples]
    write_bytes(file, "\n".join(map(json.dumps, rows)).encode())


def by_itself(examples: Sequence[Example]) -> list[Example]:
    """The questions without their contexts, for what the model knows: memory's answers where the data tell them."""
    own = [replace(one, context="", original_answer=None, original_aliases=()) for one in examples]
    return [replace(new, answers=one.memory or one.answers) for new, one in zip(own, examples, strict=True)]
