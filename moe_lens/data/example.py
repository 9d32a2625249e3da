"""Example: one question with its context and gold answers."""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_lens.errors import MoELensError

Asked = Literal["question", "prompt", "verbatim"]


@dataclass(frozen=True)
class Example:
    """A question, the context it is asked about, and every answer that counts as right.

    id: unique within its data set.
    context: the passage, or "" for a closed-book question.
    question: a question that the lens's template asks; or as `asked` says a "prompt", which is the user's whole turn
        without a template, or "verbatim", the whole text that the model reads, without a chat template either.
    answers: at least one; the first is the one trained on.
    original_answer: what memory says where the context contradicts it (None where that is unknown).
    original_aliases: its other names.
    task: the name of the task or data set.
    options: of a multiple-choice question, what can be chosen, in the order shown; every answer is one of them.
    group: what it is one of several of, such as the subject of an exam, "" for none; scores can be averaged over these.

    Raises MoELensError for a field that is no text or holds half a surrogate pair, a blank question or original
    answer, no answers, an answer or option that is blank or has space around it, options (at least two different
    ones) that an answer is not among, or a prompt with a context.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    original_answer: str | None = None
    task: str = ""
    options: tuple[str, ...] = ()
    original_aliases: tuple[str, ...] = ()
    asked: Asked = "question"
    group: str = ""

    def __post_init__(self) -> None:
        self._check_texts()
        if not self.question.strip():
            raise MoELensError(f"example {self.id!r} has a blank {self.asked}; give it one or leave it out")
        if self.asked not in get_args(Asked) or (self.asked != "question" and self.context.strip()):
            raise MoELensError(
                f"example {self.id!r} is asked as one of {', '.join(get_args(Asked))}, and only a question has a "
                f"context beside it; got {self.asked!r}"
            )
        if not self.answers or not all(answer and answer == answer.strip() for answer in self.answers):
            raise MoELensError(
                f"example {self.id!r} needs answers, none blank or with space around it; got {self.answers!r}"
            )
        if not all(name.strip() for name in self.memory):
            raise MoELensError(f"example {self.id!r} has a blank original_answer; leave it None where it is unknown")
        if self.original_aliases and self.original_answer is None:
            raise MoELensError(f"example {self.id!r} has original_aliases of no original_answer; give that too")
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

    @property
    def memory(self) -> tuple[str, ...]:
        """All names of what memory says; none where that is unknown."""
        return (*(() if self.original_answer is None else (self.original_answer,)), *self.original_aliases)

    def _check_texts(self) -> None:
        lists = all(isinstance(texts, tuple) for texts in (self.answers, self.options, self.original_aliases))
        texts = [self.id, self.context, self.question]
        if lists:
            texts += [*self.answers, *self.memory, *self.options]
        if not lists or not all(isinstance(text, str) for text in [*texts, self.task, self.asked, self.group]):
            raise MoELensError(
                f"example {self.id!r} must be made of texts; answers, options and original_aliases of tuples of them"
            )
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise MoELensError(
                    f"example {self.id!r} holds half of a surrogate pair, which no tokenizer takes: "
                    f"{text[error.start : error.end]!r}; repair its encoding"
                ) from None
