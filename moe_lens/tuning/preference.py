"""DPO (Rafailov et al., 2023; Context-DPO, Bi et al., 2024): the context's answer is preferred to memory's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from moe_lens.data import Batch, Encoded, Example, collate
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import run_batches
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import done_by_first
from moe_lens.lens.taken import pad_id
from moe_lens.metrics.catalogue import same_as_memory
from moe_lens.tuning.methods import Trainable
from moe_lens.tuning.objective import answer_log_likelihoods
from moe_lens.tuning.processes import Processes
from moe_lens.tuning.state import training

PAIRS = 8
"""How many pairs the reference is measured on at once."""


@dataclass(frozen=True)
class DPO:
    """Prefer the context's answer to memory's: -log sigma(beta (m - m_ref)), the mean over the examples of a step.

    m: log p(first gold answer) - log p(what memory says), end-of-sequence included, in nats; m_ref: that of the model
        before training. beta: how dear leaving that model is; the smaller, the cheaper.

    Raises MoELensError for a beta that is not finite and above 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < inf:
            raise MoELensError(f"beta must be finite and above 0; got {self.beta}")

    def facts(self) -> dict[str, object]:
        """For provenance."""
        return {"objective": "dpo", "beta": self.beta}


@dataclass(frozen=True)
class Preference:
    """`DPO` over encoded examples: to each prompt, which carries the answer preferred, the same with the other one.

    references: m_ref of each, in nats. At the start a part of the loss is log 2.
    """

    beta: float
    rejected: tuple[Encoded, ...]
    references: tuple[float, ...]

    def rows(self, prompts: Sequence[Encoded], places: Sequence[int]) -> list[Encoded]:
        return [*(prompts[place] for place in places), *(self.rejected[place] for place in places)]

    def parts(self, prompts: Sequence[Encoded], places: Sequence[int]) -> int:
        return len(places)

    def loss(self, module: nn.Module, batch: Batch, places: Sequence[int]) -> torch.Tensor:
        margins = _margins(module, batch)
        references = torch.tensor([self.references[place] for place in places], device=margins.device)
        return -F.logsigmoid(self.beta * (margins - references)).sum()


def with_rival(examples: Iterable[Example]) -> tuple[list[Example], list[str]]:
    """The examples of which it is known what memory says, and that it is none of their answers; the others' ids."""
    kept, left = list[Example](), list[str]()
    for example in examples:
        if example.memory and not same_as_memory(example):
            kept.append(example)
        else:
            left.append(example.id)
    if not kept:
        raise MoELensError(
            f"preference training needs an answer to prefer the context's to, and none of the {len(left)} examples has "
            "an original_answer that is not its answer; give data that say what memory answers"
        )
    return kept, left


def preference(
    dpo: DPO,
    lens: MoELens,
    prompts: Sequence[Encoded],
    others: Sequence[Encoded],
    trained: Trainable,
    *,
    split: bool = False,
) -> Preference:
    """`DPO` over these prompts and their other halves, with the lens as it is now for the reference.

    trained: what of the lens will learn. The reference is measured once, the way training will measure the margins, and
    the processes share the work. split: of a model that is to be split over them the first does it, which holds it, and
    where it lies: its rounding is then that device's.
    """
    pairs = Preference(dpo.beta, tuple(others), ())
    processes = Processes.current()
    if split:
        references = done_by_first(lambda: _references(pairs, lens, prompts, trained, range(len(prompts))))
    else:
        own = range(len(prompts))[processes.rank :: processes.count]
        references = processes.sums(*_references(pairs, lens, prompts, trained, own))
    return replace(pairs, references=tuple(references))


def _references(
    pairs: Preference, lens: MoELens, prompts: Sequence[Encoded], trained: Trainable, own: Iterable[int]
) -> list[float]:
    """The margins of the pairs at these places, and 0 at all others."""
    pad, own = pad_id(lens.module, lens.tokenizer), sorted(own, key=lambda at: len(prompts[at].input_ids))
    batches = (tuple(own[start : start + PAIRS]) for start in range(0, len(own), PAIRS))

    def measured(places: Sequence[int], _: Sequence[Encoded]) -> list[float]:
        batch = collate(pairs.rows(prompts, places), pad)
        with trained.around(batch):
            return _margins(lens.module, batch).tolist()

    references = [0.0] * len(prompts)
    with training(lens.module, {name: lens.module.get_parameter(name) for name in trained.names}) as autocast:
        lens.module.eval()
        with torch.no_grad(), autocast, parametrize.cached():
            for place, margin in run_batches(((at, [prompts[one] for one in at]) for at in batches), measured):
                references[place] = margin
    return references


def _margins(module: nn.Module, batch: Batch) -> torch.Tensor:
    """How much more likely (nats) the answers of the batch's first half are than those of its second; [pair]."""
    preferred, other = answer_log_likelihoods(module, batch).chunk(2)
    return preferred - other
