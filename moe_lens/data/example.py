"""Example: one question with its context and gold answers."""

from dataclasses import dataclass

from moe_lens.errors import MoELensError


@dataclass(frozen=True)
class Example:
    """A question, the context it is asked about, and every answer that counts as right.

    id: unique within its data set.
    context: the passage, or "" for a closed-book question.
    answers: at least one; the first is the one trained on.
    original_answer: what memory says where the context contradicts it (None where that is unknown).
    task: the name of the task or data set.

    Raises MoELensError for a blank question, no answers, or an answer that is blank or has space around it.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    original_answer: str | None = None
    task: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise MoELensError(f"example {self.id!r} has a blank question; give it one or leave it out")
        if not self.answers or not all(answer and answer == answer.strip() for answer in self.answers):
            raise MoELensError(
                f"example {self.id!r} needs answers, none blank or with space around it; got {self.answers!r}"
            )
