"""One router step: which experts are used more once the routers have taken a single gradient step to the answers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch

from moe_lens.choosing.procedures import Examples, Load, Procedure, expect_answers
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import restored
from moe_lens.lens.gradients import answer_log_probability, of_gradients
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.statistics import ExpertUsage


@dataclass(frozen=True)
class RouterStep(Procedure):
    """Selection frequency after one gradient step of the routers on log p(answer), and its gain over before.

    length: of the step, all routers together, as a share of the norm of their weights.
    """

    positions: Positions = "all"
    length: float = 0.1

    @property
    def settings(self) -> dict[str, object]:
        return {"positions": self.positions, "length": self.length}

    @classmethod
    def tables(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load, batch_size: int | None
    ) -> list[pd.DataFrame]:
        """Tables with the columns score, after the step, and gain, after minus before."""
        asked, found = expect_answers(examples), []
        for length in dict.fromkeys(own.length for own in wanted):
            ways = [own for own in wanted if own.length == length]
            before = _usage(lens, asked, ways, batch_size)
            with stepped(lens, asked, length, batch_size=batch_size):
                after = _usage(lens, asked, ways, batch_size)
            found += [(own, own_after.assign(gain=own_after["score"] - own_before["score"]))
                      for own, own_before, own_after in zip(ways, before, after, strict=True)]  # fmt: skip
        tables = dict(found)
        return [tables[own] for own in wanted]

    @classmethod
    def passes(cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load) -> float:
        return 3 * len({own.length for own in wanted})


@contextmanager
def stepped(
    lens: MoELens, examples: Sequence[Example], length: float, *, batch_size: int | None = None
) -> Iterator[None]:
    """Inside the block the routers have taken a step of this length up the gradient of the answers' log-probability.

    Afterwards their weights are as before, bit for bit. Raises MoELensError where no gradient reaches them.
    """
    names = [
        f"{site.router}.{name}"
        for site in lens.architecture.moe
        for name, _ in lens.module.get_submodule(site.router).named_parameters()
    ]
    at_once = of_gradients(lens.batch_size if batch_size is None else batch_size)
    gradients = lens.weight_gradients(examples, answer_log_probability, names, with_answer=True, batch_size=at_once)
    weights = {name: lens.module.get_parameter(name) for name in names}
    size, norm = _norm(weights.values()), _norm(gradients.values())
    if not norm:
        raise MoELensError("no gradient reaches the routers, so that they cannot take a step to the answers")
    with restored(lens.module, names):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_((gradients[name] * (length * size / norm)).to(weight))
        yield


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    """Of all of them together."""
    return math.sqrt(sum(float(tensor.detach().float().norm()) ** 2 for tensor in tensors))


def _usage(
    lens: MoELens, examples: Sequence[Example], ways: Sequence[RouterStep], batch_size: int | None
) -> list[pd.DataFrame]:
    found = lens.measure(examples, *(ExpertUsage(positions=own.positions) for own in ways), batch_size=batch_size)
    return [usage.table() for usage in found]
