"""Lists of prompts in place of data: a .txt file, one a line, whose right answers are what the model itself says."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moe_lens.causal import own_answers
from moe_lens.choosing.contrast import load_prompts
from moe_lens.choosing.procedures import Examples
from moe_lens.commands import console
from moe_lens.commands.options import Opening, Reading
from moe_lens.data import Example, Fitted
from moe_lens.data.lookup import SOURCES
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens

ENDING = ".txt"
TRAIN = "train"


def is_list(data: str) -> bool:
    """Whether it names a list of prompts, and not the file of a named data set, as gigaword:train.article.txt."""
    return data.endswith(ENDING) and data.partition(":")[0] not in SOURCES


def asking(opening: Opening, data: Iterable[str]) -> Opening:
    """How a model is opened for these data: where all are lists and no template is said, prompts are asked bare."""
    bare = opening.template is None and all(map(is_list, data))
    return replace(opening, template="bare") if bare else opening


@dataclass(frozen=True)
class Asked:
    """How a command reads examples, or lists of prompts, and what is then an answer.

    max_new_tokens, stop: of the model's own answers to prompts.
    """

    reading: Reading
    max_new_tokens: int = 16
    stop: Sequence[str] = ()

    def load(self, data: str, *, split: str, limit: int | None = None) -> Examples:
        """The first `limit` examples, or prompts: of a list every second line, from the first for "train" alone."""
        if not is_list(data):
            return self.reading.load(data, split=split, limit=limit)
        listed = load_prompts(data)
        lines = list(dict.fromkeys(listed))
        if len(lines) < len(listed):  # on one half it would be learned, on the other judged
            console.note(f"{data}: {len(listed) - len(lines)} of {len(listed)} prompts came before, and are left out")
        if len(lines) < 2:
            raise MoELensError(
                f"{data} has {len(lines)} different prompts; experts are found on one half of a list and judged on the "
                "other: give two or more, one a line"
            )
        return lines[split != TRAIN :: 2][:limit]

    def fit(self, examples: Examples, lens: MoELens, *, of: str) -> Fitted:
        """Those that fit --max-length, as `Reading.fit` has it; bare prompts with the lens's own answers."""
        prompts = [one for one in examples if isinstance(one, str)]
        answered = own_answers(lens, prompts, max_new_tokens=self.max_new_tokens, stop=self.stop) if prompts else []
        return self.reading.fit([*(one for one in examples if isinstance(one, Example)), *answered], lens, of=of)
