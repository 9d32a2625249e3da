"""The options that commands share: how a model is opened, how data are read, and what is then said of what was read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from moe_lens.commands import console
from moe_lens.data.files import ENDINGS
from moe_lens.data.lookup import ORGANISM_TASKS, SOURCES
from moe_lens.errors import MoELensError
from moe_lens.progress import is_drawn, is_quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_lens.data import Example, Fitted
    from moe_lens.lens.lens import MoELens

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
    Literal["drop", "truncate"],
    Option(
        help="drop: leave longer examples out. truncate: cut their context around the answer, and leave out only "
        "what is too long even so.",
    ),
]
SHOWN = 20
"""Bad rows that are printed; the others are counted."""


@dataclass(frozen=True)
class Opening:
    """How a command opens its model; `dataclasses.replace` makes another of it, such as the base without the delta.

    Raises MoELensError for values that make no sense, before anything is loaded.
    """

    model: Annotated[str, Option(help="'organism', 'organism:planted', a folder, or a hub id.")]
    delta: Annotated[
        Path | None, Option(help="Folder of a delta that moe_lens.tune wrote, which is put on the model.")
    ] = None
    dtype: Annotated[str | None, Option(help=f"{', '.join(console.DTYPES)}; default the checkpoint's own.")] = None
    device: Annotated[
        str | None,
        Option(help="As transformers' device_map: cpu, cuda, or auto to spread a model over several GPUs."),
    ] = None
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the Python code that some models bring beside their weights.")
    ] = False
    template: Annotated[
        str | None,
        Option(
            help="How examples are asked: a template's name, or a .json or .toml file with PromptTemplate's fields."
        ),
    ] = None

    def __post_init__(self) -> None:
        console.check_dtype(self.dtype)

    def load(self) -> "MoELens":
        """The model, opened. In a log, or where all is quiet, transformers then draws no bars of its own any more."""
        from transformers.utils import logging

        from moe_lens.lens.lens import MoELens

        if is_quiet() or not is_drawn():
            logging.disable_progress_bar()
        return MoELens.from_pretrained(
            self.model,
            delta=self.delta,
            dtype=console.dtype_named(self.dtype),
            device_map=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def facts(self) -> dict:
        """For the provenance: what of this changes the numbers and is not named there anyway."""
        return {"dtype": self.dtype}


@dataclass(frozen=True)
class Reading:
    """How a command reads its data.

    Raises MoELensError for values that make no sense, before anything is read.
    """

    columns: Columns = None
    skip_bad: SkipBad = False
    max_length: MaxLength = None
    too_long: HowTooLong = "drop"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise MoELensError(f"--max-length is a number of tokens, at least 1; got {self.max_length}")

    def load(self, data: str, *, split: str, limit: int | None = None) -> "list[Example]":
        """The first `limit` examples; bad rows, where they are skipped, are printed with their places."""
        from moe_lens.data import parse_columns, read_examples

        columns = None if self.columns is None else parse_columns(self.columns)
        loaded = read_examples(data, split=split, limit=limit, columns=columns, skip_bad=self.skip_bad)
        if loaded.bad:
            _say_left_out(f"{data}: left out {len(loaded.bad)} bad rows of {loaded.rows}", loaded.bad)
        return loaded.examples

    def fit(
        self,
        examples: "Sequence[Example]",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        of: str,
        with_answer: bool = False,
    ) -> "Fitted":
        """Those that fit --max-length; how many of them did not is printed, `of` naming the data.

        with_answer: the answer that training appends counts too.
        """
        from moe_lens.data import fit_length

        fitted = fit_length(
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

    def facts(self, *fitted: "Fitted") -> dict:
        """For the provenance: the options, and the counts of what was read under them."""
        counts = [one.facts() for one in fitted]
        summed = {name: sum(count[name] for count in counts) for name in ("dropped", "truncated")}
        return {"max_length": self.max_length, "too_long": self.too_long, **summed}


def _say_left_out(counted: str, reasons: Sequence[str]) -> None:
    """Prints the count and the first reasons."""
    more = len(reasons) - SHOWN
    console.say(counted, *(f"  {reason}" for reason in reasons[:SHOWN]), *([f"  and {more} more"] if more > 0 else []))
