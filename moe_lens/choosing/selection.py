"""Selections: how a set of experts is chosen, in one grammar for every option, recipe and figure."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from moe_lens.architecture import MoEArchitecture
from moe_lens.causal.evaluation import UNMASKED
from moe_lens.choosing.learned import LearnedSet
from moe_lens.choosing.planted import planted_experts
from moe_lens.choosing.scores import SCORES, Score
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, expect_experts


@dataclass(frozen=True)
class Ground:
    """What selections are resolved on.

    model: the name of the model, beside whose weights the truth about planted experts may lie. tables: what
    `score_tables` gave. seed: of random experts. layers: the members in these only, None for all.
    """

    architecture: MoEArchitecture
    model: str | Path
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    _: KW_ONLY
    seed: int = 0
    layers: Sequence[int] | None = None

    def table(self, score: Score) -> pd.DataFrame:
        """The score of every expert; MoELensError where it was not measured."""
        if score.name not in self.tables:
            raise MoELensError(
                f"experts are ranked by {score.name}, which was not measured: give its table, of score_tables([SCORES"
                f"[{score.name!r}]], …); given are {', '.join(self.tables) or 'none'}"
            )
        return self.tables[score.name]


class Selection(ABC):
    """A way to choose a set of experts, to be resolved on a model.

    score: the one that ranks the experts, None without one. size: how many of each layer, None where that is not said.
    """

    score: Score | None
    size: int | None

    @property
    @abstractmethod
    def name(self) -> str:
        """As it is written: what tells it from others of its kind."""

    @property
    @abstractmethod
    def family(self) -> str:
        """What it is shown together with in figures: the score that ranks, or how else the experts come about."""

    @abstractmethod
    def experts(self, ground: Ground) -> ExpertSet:
        """The experts chosen; MoELensError for what the model lacks."""

    @property
    def told(self) -> str:
        """All that tells it from other selections, for provenance."""
        return self.name

    def label(self, experts: ExpertSet) -> str:
        """What tables call these experts, once it has chosen them."""
        return self.name

    def check(self, architecture: MoEArchitecture) -> None:
        """MoELensError for more than the model has; before scores are measured, for which routers may be tuned."""
        if self.size is not None and self.size > architecture.n_experts:
            raise MoELensError(f"each layer has {architecture.n_experts} experts; '{self}' wants {self.size} of them")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Top(Selection):
    """The `size` experts of each layer with the highest score."""

    score: Score
    size: int

    def __post_init__(self) -> None:
        _check_size(self)

    @property
    def name(self) -> str:
        return f"{self.score.name}:{self.size}"

    @property
    def family(self) -> str:
        return self.score.name

    def experts(self, ground: Ground) -> ExpertSet:
        return ExpertSet.top(ground.table(self.score), self.size)


@dataclass(frozen=True)
class Share(Selection):
    """ESFT's choice: the experts of each layer with the highest score, until their scores sum to `p`.

    See `ExpertSet.cumulative`.
    """

    score: Score
    p: float
    size = None

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise MoELensError(f"p is a share of the summed score, above 0 and at most 1; got {self.name!r}")
        if not self.score.sums_to_one:
            raise MoELensError(
                f"{self.score.name} is no score whose sum over a layer is 1, so {self.name!r} means nothing; take "
                f"{self.score.name}:N, or p of a score such as esft-gate"
            )

    @property
    def name(self) -> str:
        return f"{self.score.name}:p={self.p:.15g}"

    @property
    def family(self) -> str:
        return self.score.name

    def experts(self, ground: Ground) -> ExpertSet:
        return ExpertSet.cumulative(ground.table(self.score), self.p)


@dataclass(frozen=True)
class Learned(Selection):
    """A set that is found as a whole, by masks trained against the model's own answers; see `find_set`."""

    way: LearnedSet

    @property
    def name(self) -> str:
        return self.way.name

    @property
    def family(self) -> str:
        return f"set{self.way.aim}"

    @property
    def size(self) -> int | None:  # type: ignore[override]  # follows from the way
        return self.way.wanted.size

    @cached_property
    def score(self) -> Score:  # type: ignore[override]
        return self.way.score

    def check(self, architecture: MoEArchitecture) -> None:
        self.way.wanted.check(architecture)

    def experts(self, ground: Ground) -> ExpertSet:
        chosen = ground.table(self.score).query("chosen")
        return ExpertSet.of({layer: part["expert"] for layer, part in chosen.groupby("layer")})


@dataclass(frozen=True)
class Random(Selection):
    """`size` experts of each layer, drawn at random."""

    size: int
    score = None

    def __post_init__(self) -> None:
        _check_size(self)

    @property
    def name(self) -> str:
        return f"random:{self.size}"

    @property
    def family(self) -> str:
        return "random set"

    def label(self, experts: ExpertSet) -> str:
        return f"random set:{self.size}"  # random:N are the controls

    def experts(self, ground: Ground) -> ExpertSet:
        architecture = ground.architecture
        filled = ExpertSet.of({layer: range(self.size) for layer in architecture.moe_layers})
        return ExpertSet.random_like(filled, ground.seed, n_experts=architecture.n_experts)


@dataclass(frozen=True)
class Planted(Selection):
    """The experts on which pretraining planted context reading, stored beside the model's weights."""

    name = "planted"
    family = "planted"
    score = None
    size = None

    def experts(self, ground: Ground) -> ExpertSet:
        return planted_experts(ground.model)


@dataclass(frozen=True)
class Given(Selection):
    """Experts named one by one. called: their name in tables; by default the experts themselves."""

    chosen: ExpertSet
    called: str = ""
    score = None
    size = None

    def __post_init__(self) -> None:
        expect_experts(self.chosen)
        if ":" in self.called or self.called in (UNMASKED, "planted"):
            raise MoELensError(f"experts cannot be called {self.called!r}, which has a meaning; give another name")
        if not self.chosen:
            raise MoELensError(f"{self.name!r} names no experts; expected one or more")

    @property
    def name(self) -> str:
        return self.called or str(self.chosen)

    @property
    def told(self) -> str:
        return f"{self.name}={self.chosen}"

    @property
    def family(self) -> str:
        return "chosen"

    def label(self, experts: ExpertSet) -> str:
        return self.called or str(experts)  # what is left of them

    def experts(self, ground: Ground) -> ExpertSet:
        return self.chosen


@dataclass(frozen=True)
class Choice:
    """One set of experts that a selection chose: its name in tables, the family it belongs to, and its members."""

    name: str
    family: str
    experts: ExpertSet

    @property
    def size(self) -> float:
        """Members per layer, on average over the layers that have any; 0 for the empty set."""
        layers = len(self.experts.layers)
        return len(self.experts) / layers if layers else 0


def parse(text: str) -> tuple[Selection, ...]:
    """The selections that a text names: what --experts and its like take.

    SCORE:4 (or SCORE:1,2,4 for several) the highest of each layer by a score of `SCORES`, also with what it takes in
    brackets, contrast(novel;swap):4; SCORE:p=0.2 the highest until their scores sum to 0.2; set:4, set:4;keep or
    set:budget=16;spare=closed_book, a set that is learned as a whole (`LearnedSet`); random:8; planted; FILE.json, an
    object of {layer: [experts]}; or literally 3:5,7;4:0.
    Raises MoELensError for anything else.
    """
    written = re.match(r"([a-z][\w-]*)(?:\((.*)\))?(?::|$)", text.strip())
    if written and written[1] == "set" and written[2] is None:
        return tuple(map(Learned, LearnedSet.parse(text.strip()[written.end() :], text)))
    if written and (written[1] in SCORES or (written[1] == "random" and written[2] is None)):
        return tuple(_ranked_or_drawn(written[1], written[2], text.strip()[written.end() :], text))
    if text.strip() == "planted":
        return (Planted(),)
    if text.endswith(".json"):
        return (Given(ExpertSet.from_json(_read(text)), called=Path(text).stem),)
    if text.strip().partition(":")[0].isdigit():
        return (Given(ExpertSet.parse(text)),)
    raise MoELensError(
        f"cannot read the experts {text!r}; expected a score and size such as ce:4 or esft-gate:p=0.2 (scores: "
        f"{', '.join(SCORES)}), set:N, random:N, planted, a .json file, or layer:expert,expert;… such as 3:5,7;4:0"
    )


def parse_one(text: str) -> Selection:
    """The one selection that a text names, for experts that are to be trained; MoELensError for several."""
    found = parse(text)
    if len(found) > 1:
        raise MoELensError(f"experts are trained as one set; {text!r} names {len(found)}: name one of them")
    return found[0]


def choices(selections: Iterable[Selection], ground: Ground) -> list[Choice]:
    """What the selections choose, each once, in the ground's layers; MoELensError for a set without members there."""
    found = []
    for selection in dict.fromkeys(selections):
        experts = selection.experts(ground)
        if not experts:
            raise MoELensError(f"'{selection}' names no experts; expected one or more")
        within = experts if ground.layers is None else experts.restrict(ground.layers)
        if not within:
            raise MoELensError(
                f"none of the experts of '{selection}' is in the layers {', '.join(map(str, ground.layers or ()))}; "
                f"they are in {', '.join(map(str, experts.layers))}"
            )
        found.append(Choice(selection.label(within), selection.family, within))
    return list(dict.fromkeys(found))


def scores_of(selections: Iterable[Selection]) -> list[Score]:
    """The scores by which any of the selections ranks experts, each once."""
    return list(dict.fromkeys(selection.score for selection in selections if selection.score is not None))


def _check_size(selection: Top | Random) -> None:
    """MoELensError unless so many experts of each layer can be chosen."""
    if not isinstance(selection.size, int) or selection.size < 1:
        raise MoELensError(f"{selection.name.partition(':')[0]}:N takes N from 1, whole; got {selection.name!r}")


def _ranked_or_drawn(name: str, argument: str | None, rest: str, text: str) -> Iterable[Selection]:
    """The selections of a name, with what was given in brackets, and sizes (`4`, `1,2,4`) or options (`p=0.2`)."""
    score = None
    if name != "random":
        score = SCORES[name] if argument is None else SCORES[name].given(argument)
        name = score.name
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", rest):
        sizes = map(int, rest.split(","))
        return [Random(size) if score is None else Top(score, size) for size in sizes]
    option, equals, value = rest.partition("=")
    if score is not None and option == "p" and equals and re.fullmatch(r"[0-9]*\.?[0-9]+", value):
        return [Share(score, float(value))]
    shares = "" if score is None else f", or {name}:p=0.2 for the highest until their scores sum to 0.2"
    raise MoELensError(f"expected {name}:N or {name}:N,M with whole numbers, such as {name}:4{shares}; got {text!r}")


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text, or no name of a file"
        raise MoELensError(f"cannot read experts from {file!r:.80}: {reason}") from None
