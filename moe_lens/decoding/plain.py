"""Decoding: how a lens comes by its answers and their log-probabilities; as it is, greedily."""

from collections.abc import Sequence
from typing import Any

from moe_lens.data import Example
from moe_lens.lens.lens import MoELens
from moe_lens.lens.twins import LogitContrast


class Decoding:
    """The model's own greedy answers; a subclass comes by them otherwise.

    Its text tells it from others, also in provenance and in `--decoding`.
    """

    @property
    def contrast(self) -> LogitContrast | None:
        """What the logits with and without the context are made into; None where the context is not left out."""
        return None

    def untouched(self, examples: Sequence[Example]) -> dict[str, int]:
        """How many of the examples are answered plainly all the same, by why."""
        return {}

    def facts(self, examples: Sequence[Example]) -> dict[str, Any]:
        """For the provenance of answers to the examples; nothing of the model's own."""
        return {"decoding": str(self), "answered_plainly": self.untouched(examples)} if self != PLAIN else {}

    def generate(
        self,
        lens: MoELens,
        examples: Sequence[Example],
        *,
        max_new_tokens: int = 16,
        stop: Sequence[str] = (),
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> list[str]:
        """The answer to each example, as `MoELens.generate` gives it."""
        return lens.generate(
            examples,
            max_new_tokens=max_new_tokens,
            stop=stop,
            batch_size=batch_size,
            progress=progress,
            contrast=self.contrast,
        )

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
        """The log-probability (nats) of each first gold answer, as `MoELens.answer_log_probabilities` gives it."""
        return lens.answer_log_probabilities(
            examples,
            batch_size=batch_size,
            progress=progress,
            with_end=with_end,
            first_token=first_token,
            contrast=self.contrast,
        )

    def __str__(self) -> str:
        return "plain"


PLAIN = Decoding()
"""The model's own."""
