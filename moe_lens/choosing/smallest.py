"""find_smallest: as few experts as keep a share of the answers, by searches for sets of other and other budgets."""

import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from moe_lens.architecture import MoEArchitecture
from moe_lens.choosing.procedures import Examples
from moe_lens.choosing.search import SEEDS, FoundSet, Recipe, Wanted, find_set
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Zero
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import agreed
from moe_lens.metrics import exact_match


@dataclass(frozen=True)
class Sufficing:
    """What `find_smallest` is to find: the least budget that keeps this share of the answers."""

    share: float
    size: ClassVar[None] = None
    keep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise MoELensError(f"a share of answers to keep is above 0 and at most 1; got {self.share}")

    def check(self, architecture: MoEArchitecture) -> None:
        """Any model has some."""


def find_smallest(
    lens: MoELens,
    examples: Examples,
    share: float,
    *,
    recipe: Recipe = Recipe(),
    seeds: int = SEEDS,
    seed: int = 0,
    max_new_tokens: int = 16,
    progress: bool | None = None,
) -> FoundSet:
    """The set with the least budget of which, all others masked, so many answers stay the same (exact match).

    Every third example is held out: on these it is seen what each set keeps, and sets are found on the others, by
    `find_set`. The budget is found by bisection, to a 64th of all experts: the last one below did not do, though one
    that was not tried may. passes and seconds are of all searches; the other arguments those of `find_set`.
    Raises MoELensError for fewer than two examples, and where nothing less than all experts will do.
    """
    Sufficing(share)
    held, fitted = examples[::3], [own for place, own in enumerate(examples) if place % 3]
    if not fitted:
        raise MoELensError("the least that suffices is judged on examples held out; give two or more")
    every = ExpertSet.of({layer: range(lens.architecture.n_experts) for layer in lens.architecture.moe_layers})
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    began, passes, best = time.perf_counter(), 0, None
    said, below, above = lens.generate(held, **asked), 0, len(every)
    while above - below > max(1, len(every) // 64):
        wanted = Wanted(budget=(below + above) // 2, keep=True)
        found = find_set(lens, fitted, wanted, recipe=recipe, seeds=seeds, seed=seed, **asked)
        passes += found.passes
        with lens.intervene(Zero(every - found.experts)):
            texts = lens.generate(held, **asked)
        kept = np.mean([exact_match(text, [own]) for text, own in zip(texts, said, strict=True)])
        if agreed(lambda: bool(kept >= share)):  # noqa: B023 - asked at once
            above, best = len(found.experts), found
        else:
            below = len(found.experts)
    if best is None:
        raise MoELensError(f"no set that leaves an expert out keeps {share:.0%} of the answers; ask for a lower share")
    return replace(best, passes=passes, seconds=time.perf_counter() - began)
