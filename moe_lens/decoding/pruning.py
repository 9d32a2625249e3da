"""Answering again from the sentences that an answer rests on most, the others left out of the context."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lens.data import Example
from moe_lens.data.sentences import sentences
from moe_lens.decoding.citing import ONE_SENTENCE, WITHOUT_CONTEXT, attributions, each_as, keeping, tell_without_answer
from moe_lens.decoding.plain import Decoding
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens

FIRST_ANSWER = 16
"""The longest answer, in tokens, by which a context is pruned where only the log-probability of another is asked."""


@dataclass(frozen=True)
class Cited(Decoding):
    """ContextCite as a method: answer, keep the k sentences of the context that the answer rests on most, answer again.

    All of it under the interventions in force. The sentences stay in their order; of equal attributions the first are
    kept. A context of no more than k sentences stays whole, and so does one whose first answer is empty, of which a
    warning tells. The paper does not say its k.

    k: at least 1.
    """

    k: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise MoELensError(f"the sentences that are kept must be a whole number, 1 or more; got {self.k!r}")

    def generate(
        self,
        lens: MoELens,
        examples: Sequence[Example | str],
        *,
        max_new_tokens: int = 16,
        stop: Sequence[str] = (),
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> list[str]:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop}
        settings |= {"batch_size": batch_size, "progress": progress}
        answers = lens.generate(examples, **settings)
        shorter = self._pruned(lens, examples, answers, batch_size, progress)
        with each_as(lens, list(shorter)):
            again = lens.generate(list(shorter.values()), **settings)
        found = dict(enumerate(answers)) | dict(zip(shorter, again, strict=True))
        return list(found.values())

    def answer_log_probabilities(
        self,
        lens: MoELens,
        examples: Sequence[Example],
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        with_end: bool = True,
        first_token: bool = False,
    ) -> list[float]:
        answers = lens.generate(examples, max_new_tokens=FIRST_ANSWER, batch_size=batch_size, progress=progress)
        shorter = self._pruned(lens, examples, answers, batch_size, progress)
        return lens.answer_log_probabilities(
            [shorter.get(place, example) for place, example in enumerate(examples)],
            batch_size=batch_size,
            progress=progress,
            with_end=with_end,
            first_token=first_token,
        )

    def untouched(self, examples: Sequence[Example]) -> dict[str, int]:
        counts = [len(sentences(example.context)) if example.context.strip() else 0 for example in examples]
        several = {f"of {n} sentences": counts.count(n) for n in range(2, self.k + 1)}
        return {WITHOUT_CONTEXT: counts.count(0), ONE_SENTENCE: counts.count(1)} | several

    def _pruned(
        self,
        lens: MoELens,
        examples: Sequence[Example | str],
        answers: Sequence[str],
        batch_size: int | None,
        progress: bool | None,
    ) -> dict[int, Example]:
        """The examples that have more than k sentences with those that their answers rest on most, by place."""
        longer = {
            place: example
            for place, example in enumerate(examples)
            if isinstance(example, Example) and len(sentences(example.context)) > self.k
        }
        own = [answers[place] for place in longer]
        tell_without_answer(list(longer.values()), own)
        with each_as(lens, list(longer)):
            weights = attributions(lens, list(longer.values()), own, batch_size=batch_size, progress=progress)
        return {
            place: keeping(example, sentences(example.context), _highest(weight, self.k))
            for (place, example), weight in zip(longer.items(), weights, strict=True)
            if weight is not None
        }

    def __str__(self) -> str:
        return f"cite:{self.k}"


def _highest(values: np.ndarray, k: int) -> np.ndarray:
    """Whether each is among the k highest, bool [value]; of equal ones the first."""
    kept = np.zeros(len(values), dtype=bool)
    kept[np.argsort(-values, kind="stable")[:k]] = True
    return kept
