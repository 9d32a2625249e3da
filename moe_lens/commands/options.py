"""The options that every command line takes for the data it reads, and what it then says of what it read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, get_args

from transformers import PreTrainedTokenizerBase
from typer import Option

from moe_lens.commands import console
from moe_lens.data import Example, Fitted, fit, parse_columns, read_examples
from moe_lens.data.files import ENDINGS
from moe_lens.data.fitting import TooLong
from moe_lens.data.lookup import ORGANISM_TASKS, SOURCES
from moe_lens.errors import MoELensError

Data = Annotated[
    str,
    Option(
        help=f"A task of the organism ({', '.join(ORGANISM_TASKS)}); a data set ({', '.join(SOURCES)}), or "
        f"NAME:PATH for one in its original format, a file or the folder of its splits; a {', '.join(ENDINGS)} file "
        "with the columns context, question, answer; or whatever `datasets` loads: ID, ID@REVISION, FOLDER."
    ),
]
Columns = Annotated[
    str | None,
    Option(
        help="The names that columns have in the data, such as question=q,answer=gold.text; also of id, context, "
        "original_answer and options."
    ),
]
SkipBad = Annotated[
    bool, Option("--skip-bad", help="Leave out rows that make no example, and say which, instead of stopping.")
]
MaxLength = Annotated[
    int | None, Option(help="The longest prompt, in tokens; --too-long says what is done with longer ones.")
]
HowTooLong = Annotated[
    str,
    Option(
        "--too-long",
        help="drop: leave longer examples out. truncate: cut their context around the answer, and leave out only "
        "what is too long even so.",
    ),
]
SHOWN = 20
"""Bad rows that are printed; the others are counted."""


@dataclass(frozen=True)
class Reading:
    """How a command line reads its data: the values of the options above.

    Raises MoELensError for values that make no sense, before anything is read.
    """

    columns: str | None = None
    skip_bad: bool = False
    max_length: int | None = None
    too_long: str = "drop"

    def __post_init__(self) -> None:
        if self.too_long not in get_args(TooLong):
            raise MoELensError(f"--too-long must be one of {', '.join(get_args(TooLong))}; got {self.too_long!r}")
        if self.max_length is not None and self.max_length < 1:
            raise MoELensError(f"--max-length is a number of tokens, at least 1; got {self.max_length}")

    def load(self, data: str, *, split: str, limit: int | None = None) -> list[Example]:
        """The first `limit` examples; bad rows, where they are skipped, are printed with their places."""
        columns = None if self.columns is None else parse_columns(self.columns)
        loaded = read_examples(data, split=split, limit=limit, columns=columns, skip_bad=self.skip_bad)
        if loaded.bad:
            _say_left_out(f"{data}: left out {len(loaded.bad)} bad rows of {loaded.rows}", loaded.bad)
        return loaded.examples

    def fit(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, of: str, with_answer: bool = False
    ) -> Fitted:
        """Those that fit --max-length; how many of them did not is printed, `of` naming the data.

        with_answer: the answer that training appends counts too.
        """
        fitted = fit(
            examples,
            tokenizer,
            max_length=self.max_length,
            too_long=self.too_long,
            with_answer=with_answer,
            skip_bad=self.skip_bad,
        )
        if fitted.bad:
            _say_left_out(f"{of}: left out {len(fitted.bad)} examples", fitted.bad)
        console.say(f"{of}: {fitted}")
        return fitted

    def facts(self, *fitted: Fitted) -> dict:
        """For the provenance: the options, and the counts of what was read under them."""
        counts = [one.facts() for one in fitted]
        summed = {name: sum(count[name] for count in counts) for name in ("dropped", "truncated")}
        return {"max_length": self.max_length, "too_long": self.too_long, **summed}


def _say_left_out(counted: str, reasons: Sequence[str]) -> None:
    """Prints the count and the first reasons."""
    more = len(reasons) - SHOWN
    console.say(counted, *(f"  {reason}" for reason in reasons[:SHOWN]), *([f"  and {more} more"] if more > 0 else []))
