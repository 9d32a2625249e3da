"""Specifications of experts, such as ce:4, random:8, planted, FILE.json or 3:5,7;4:0, and the sets that they name."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moe_lens.choosing.scores import SCORES, Score
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet

CHOSEN = "chosen"


@dataclass(frozen=True)
class Choice:
    """One set of experts to mask: its name in the tables, the family it belongs to, and its members.

    family: the score that ranked them, "planted", "random", or "chosen" by hand (a file, a literal).
    """

    intervention: str
    family: str
    experts: ExpertSet

    @property
    def size(self) -> float:
        """Members per layer, on average over the layers that have any; 0 for the empty set."""
        layers = len(self.experts.layers)
        return len(self.experts) / layers if layers else 0


def score_of(specification: str) -> Score | None:
    """The score that a specification ranks experts by, None for one that needs none."""
    return SCORES.get(specification.partition(":")[0])


def scores_needed(specifications: Iterable[str]) -> list[Score]:
    """The scores that a list of specifications ranks experts by."""
    return [score for score in dict.fromkeys(map(score_of, specifications)) if score is not None]


def choose(
    specification: str,
    *,
    tables: Mapping[str, pd.DataFrame],
    planted: Callable[[], ExpertSet],
    layers: Sequence[int] | None = None,
) -> list[Choice]:
    """The sets that a specification names.

    specification: `SCORE:N` or `SCORE:N,M` for the N (and the M) highest of each layer by a score of
        `moe_lens.choosing.scores.SCORES`; `planted`; a `.json` file of {layer: [experts]}; or literally `3:5,7;4:0`.
    tables: score name -> columns layer, expert, score. planted: gives the organism's planted experts.
    layers: the members in these only, None for all.

    Raises MoELensError for anything else, and for a set without members.
    """
    check_specification(specification)
    name, _, sizes = specification.partition(":")
    if name in SCORES:
        found = [Choice(f"{name}:{size}", name, ExpertSet.top(tables[name], int(size))) for size in sizes.split(",")]
    elif specification == "planted":
        found = [Choice("planted", "planted", planted())]
    elif specification.endswith(".json"):
        found = [Choice(Path(specification).stem, CHOSEN, ExpertSet.from_json(_read(specification)))]
    else:
        members = _within(ExpertSet.parse(specification), layers, specification)
        return [Choice(str(members), CHOSEN, members)]  # a literal is called by what is left of it
    return [Choice(one.intervention, one.family, _within(one.experts, layers, specification)) for one in found]


def check_specification(specification: str, *, n_experts: int | None = None) -> None:
    """MoELensError unless `choose` can make sense of it; needs no model.

    n_experts: of each layer, where it is known: more than these cannot be chosen by a score.
    """
    name, _, sizes = specification.partition(":")
    if name in SCORES:
        if not re.fullmatch(r"\d+(,\d+)*", sizes):
            raise MoELensError(
                f"expected {name}:N or {name}:N,M with whole numbers, such as {name}:4; got {specification!r}"
            )
        wrong = [size for size in map(int, sizes.split(",")) if size < 1 or size > (n_experts or size)]
        if wrong:
            most = "" if n_experts is None else f" to {n_experts}, the experts of each layer"
            raise MoELensError(f"{name}:N takes N from 1{most}; got {specification!r}")
    elif not (name.isdigit() or specification == "planted" or specification.endswith(".json")):
        raise MoELensError(
            f"cannot read the experts {specification!r}; expected a score and size such as ce:4 (scores: "
            f"{', '.join(SCORES)}), planted, a .json file, or layer:expert,expert;… such as 3:5,7;4:0"
        )


def choose_experts(
    specification: str,
    *,
    table: pd.DataFrame | None,
    planted: Callable[[], ExpertSet],
    moe_layers: Sequence[int],
    n_experts: int,
    seed: int,
    layers: Sequence[int] | None = None,
) -> ExpertSet:
    """The one set of experts, to train, that a specification names.

    specification: as `choose` takes it, with one size; besides `SCORE:p=0.2` for the highest of each layer until their
        scores sum to 0.2 (ESFT); and `random:N` for N of each layer drawn with `seed`.
    table: layer, expert, score of the score it names, if it names one. moe_layers, n_experts: what the model has.
    layers: the members in these only, None for all.

    Raises MoELensError for anything else, and for a set without members.
    """
    check_experts(specification, n_experts=n_experts)
    name, _, size = specification.partition(":")
    if name == "random":
        filled = ExpertSet.of({layer: range(int(size)) for layer in moe_layers})
        return _within(ExpertSet.random_like(filled, seed, n_experts=n_experts), layers, specification)
    if name in SCORES and size.startswith("p="):
        return _within(ExpertSet.cumulative(table, float(size.removeprefix("p="))), layers, specification)
    tables = {} if table is None else {name: table}
    [choice] = choose(specification, tables=tables, planted=planted, layers=layers)
    return choice.experts


def check_experts(specification: str, *, n_experts: int) -> None:
    """MoELensError unless `choose_experts` can read it; before scores are counted, for which routers may be tuned."""
    name, _, size = specification.partition(":")
    if name == "random":
        if not size.isdecimal() or not 0 < int(size) <= n_experts:
            raise MoELensError(f"random:N takes N of the {n_experts} experts of each layer; got {specification!r}")
    elif name in SCORES and size.startswith("p="):
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", size.removeprefix("p=")):
            raise MoELensError(f"expected a share of the summed score, such as {name}:p=0.2; got {specification!r}")
    elif name in SCORES and "," in size:
        raise MoELensError(f"experts are trained as one set; {specification!r} names {size.count(',') + 1}")
    else:
        check_specification(specification, n_experts=n_experts)


def _within(experts: ExpertSet, layers: Sequence[int] | None, specification: str) -> ExpertSet:
    """The members in these layers; MoELensError if there is none."""
    if not experts:
        raise MoELensError(f"{specification!r} names no experts; expected one or more")
    kept = experts if layers is None else experts.restrict(layers)
    if not kept:
        raise MoELensError(
            f"none of the experts of {specification!r} is in the layers {', '.join(map(str, layers))}; they are in "
            f"{', '.join(map(str, experts.layers))}"
        )
    return kept


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise MoELensError(f"cannot read experts from {file}: {reason}") from None
