"""Prompts as examples whose right answer is what the model itself says: what a mask then changes is a wrong answer."""

import warnings
from collections.abc import Sequence

from moe_lens.data import Example
from moe_lens.data.thoughts import without_thoughts
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens


def own_answers(
    lens: MoELens,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 16,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> list[Example]:
    """The prompts as examples without context, asked by the lens's template; ids are their places.

    The template "bare" asks nothing but the prompt. Exact match then counts the answers that stay as they are; the
    model as it is has 1, but for rounding in batches of other sizes.
    Prompts that are blank or that the model answers with nothing, or with nothing after the template's `answer_after`,
    are left out, with a warning; MoELensError where all are.
    """
    asked = [Example(str(place), "", text, ("?",)) for place, text in enumerate(prompts) if text.strip()]
    said = lens.generate(asked, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size, progress=progress)
    answers = [without_thoughts(text).strip() for text in said]
    found = [
        Example(one.id, "", one.question, (answer,))
        for one, answer in zip(asked, answers, strict=True)
        if lens.template.answered(answer)
    ]
    if not found:
        raise MoELensError(f"the model says nothing to any of {len(prompts)} prompts, so there is nothing to change")
    if len(found) < len(prompts):
        warnings.warn(f"{len(prompts) - len(found)} of {len(prompts)} prompts have no answer: left out", stacklevel=2)
    return found
