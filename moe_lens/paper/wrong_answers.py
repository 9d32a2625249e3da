"""Training answers made wrong, for what noisy labels do: a share of them, and a task's folder that holds them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.paper.question_files import write_examples
from moe_lens.paper.study import Study


def with_wrong_answers(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The examples, a share of them with an answer of another one, which is none of their own."""
    rng = random.Random(seed)
    order = rng.sample(range(len(examples)), len(examples))
    wrong = {}
    for place in order:  # drawn for all, so that a larger share holds a smaller one
        others = [other.answers[0] for other in examples if other.answers[0] not in examples[place].answers]
        if not others:
            raise MoELensError("all training examples have one answer, so none can be made wrong; take other --data")
        wrong[place] = rng.choice(others)
    chosen = set(order[: round(share * len(examples))])
    return [replace(one, answers=(wrong[i],)) if i in chosen else one for i, one in enumerate(examples)]


def write_task(study: Study, task: str, share: float) -> str:
    """The folder of a task whose training answers are wrong by this share, written now; its name as data."""
    folder = study.out / "noisy_labels" / f"{Path(task).name}-{share:g}"
    for split in ("train", "dev", "test"):
        examples = study.examples(task, split)
        if split == "train":
            examples = with_wrong_answers(examples, share, study.schedule.seed)
        write_examples(examples, folder / f"{split}.jsonl")
    return str(folder)
