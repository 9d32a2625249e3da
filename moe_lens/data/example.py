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
    options: of a multiple-choice question, what can be chosen, in the order shown; every answer is one of them.

    Raises MoELensError for a field that is no text or holds half a surrogate pair, a blank question or original
    answer, no answers, an answer or option that is blank or has space around it, or options (at least two different
    ones) that an answer is not among.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    original_answer: str | None = None
    task: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_texts()
        if not self.question.strip():
            raise MoELensError(f"example {self.id!r} has a blank question; give it one or leave it out")
        if not self.answers or not all(answer and answer == answer.strip() for answer in self.answers):
            raise MoELensError(
                f"example {self.id!r} needs answers, none blank or with space around it; got {self.answers!r}"
            )
        if self.original_answer is not None and not self.original_answer.strip():
            raise MoELensError(f"example {self.id!r} has a blank original_answer; leave it None where it is unknown")
        if not self.options:
            return
        blank = not all(option and option == option.strip() for option in self.options)
        if blank or len(set(self.options)) < 2:
            raise MoELensError(
                f"example {self.id!r} needs at least two different options, none blank or with space around it; "
                f"got {self.options!r}"
            )
        if not set(self.answers) <= set(self.options):
            raise MoELensError(
                f"example {self.id!r} needs answers that are among its options {self.options!r}; got {self.answers!r}"
            )

    def _check_texts(self) -> None:
        known = () if self.original_answer is None else (self.original_answer,)
        lists = isinstance(self.answers, tuple) and isinstance(self.options, tuple)
        if not lists or not all(
            isinstance(text, str)
            for text in (self.id, self.context, self.question, self.task, *self.answers, *known, *self.options)
        ):
            raise MoELensError(f"example {self.id!r} must be made of texts, its answers and options of tuples of them")
        for text in (self.id, self.context, self.question, *self.answers, *known, *self.options):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise MoELensError(
                    f"example {self.id!r} holds half of a surrogate pair, which no tokenizer takes: "
                    f"{text[error.start : error.end]!r}; repair its encoding"
                ) from None
