"""Where an intervention acts: in which layers, at which positions and steps; and where a run is when it is called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from moe_lens.data import Batch
from moe_lens.errors import MoELensError
from moe_lens.lens.positions import SPANNED, Positions, check_positions, position_mask, predicting, steps_of

T = TypeVar("T")

Steps = Literal["all", "prefill", "decode"] | tuple[int, ...]
"""When: always, while the prompt is read (step 0), at the tokens after it (steps 1, 2, …), or at certain steps."""
PROMPT_ONLY = ("prompt", "context", "question", "last")
"""The words for positions that are all in the prompt."""


def check_place(positions: Positions, steps: Steps) -> None:
    """MoELensError unless there are such positions and steps, and they meet."""
    check_positions(positions)
    if isinstance(steps, tuple):
        if not steps or len(set(steps)) != len(steps) or not all(type(step) is int and step >= 0 for step in steps):
            raise MoELensError(
                f"steps must be different numbers from 0, the prompt's, such as (0, 1); got steps={steps!r}"
            )
    elif steps not in ("all", "prefill", "decode"):
        raise MoELensError(f"steps must be 'all', 'prefill', 'decode' or a tuple of numbers; got {steps!r}")
    numbers = {max(0, step) for step in positions} if isinstance(positions, tuple) else None
    if numbers is None:
        numbers = {0} if positions in PROMPT_ONLY else None
    wanted = {"all": None, "prefill": {0}}.get(steps) if isinstance(steps, str) else set(steps)
    later = steps == "decode" or positions == "decode"
    apart = numbers is not None and wanted is not None and not numbers & wanted
    if apart or (later and (numbers == {0} or wanted == {0})):
        raise MoELensError(f"positions={positions!r} and steps={steps!r} never meet, so nothing would be changed")


@dataclass(frozen=True, eq=False)
class Here:
    """Where in a run an intervention is called: the layer, and which positions of which prompts pass through it now.

    layer: absolute decoder index. rows, width: of this pass. past: positions that passed before.
    prompt: positions of the first pass, with which all prompts have been read.
    batch: the examples' tokens and spans, left-padded; None in a trace of one's own, where nobody knows them.
    device: where the layer's numbers are.
    prepared: what interventions had to know of the batch (`prepare`), by the id of each.
    """

    layer: int
    rows: int
    width: int
    past: int
    prompt: int
    batch: Batch | None
    device: torch.device
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    prepared: dict[int, Any] = field(default_factory=dict, repr=False)

    def once(self, name: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once for the batch on this device."""
        key = name, self.rows, self.prompt, self.device
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def mask(self, positions: Positions = "all", steps: Steps = "all") -> Tensor | None:
        """Which positions of this pass are meant, bool [batch, pos]; None where all are.

        positions: as everywhere (`moe_lens.lens.positions`). steps: see `Steps`.
        Raises MoELensError for spans that nobody knows here.
        """
        if positions == "all" and steps == "all":
            return None
        if self.past < self.prompt:
            whole = self.once((positions, steps), lambda: self._in_prompt(positions, steps))
            return whole[:, self.past : self.past + self.width]
        return self.once((positions, steps, self.past, self.width), lambda: self._after_prompt(positions, steps))

    def _in_prompt(self, positions: Positions, steps: Steps) -> Tensor:
        """`mask` of the first pass, bool [batch, pos]."""
        if self.batch is not None:
            return in_batch(self.batch, positions, steps).to(self.device)
        number = range(1 - self.prompt, 1)
        chosen = torch.tensor([_meant(positions, step) and _taken(steps, step) for step in number])
        return chosen.expand(self.rows, -1).to(self.device)

    def _after_prompt(self, positions: Positions, steps: Steps) -> Tensor:
        """`mask` of a pass after the first, bool [batch, pos]."""
        first = self.past - (self.prompt - 1)
        numbers = range(first, first + self.width)
        if self.batch is not None and positions in ("thought", "answer"):
            meant = predicting(torch.tensor([*numbers]), positions, self.batch.thoughts)
            taken = torch.tensor([_taken(steps, step) for step in numbers])
            return (meant & taken).expand(self.rows, -1).to(self.device)
        chosen = torch.tensor([_meant(positions, step) and _taken(steps, step) for step in numbers])
        return chosen.expand(self.rows, -1).to(self.device)


def in_batch(batch: Batch, positions: Positions, steps: Steps) -> Tensor:
    """Which positions of a batch are meant, bool [batch, pos], on the CPU; never pads."""
    spans = batch.context_spans, batch.question_spans
    mask = position_mask(batch.attention_mask, *spans, positions, batch.labels, batch.thoughts)
    number = steps_of(batch.attention_mask, batch.labels).clamp(min=0)
    if steps == "decode":
        return mask & (number > 0)
    if steps == "all":
        return mask
    return mask & torch.isin(number, torch.tensor((0,) if steps == "prefill" else steps))


def _meant(positions: Positions, step: int) -> bool:
    """Whether the position `step` steps from the prompt's last token is meant, where spans are not known before it."""
    if isinstance(positions, tuple):
        return step in positions
    if (positions in SPANNED and step <= 0) or positions == "thought":
        raise MoELensError(
            f"nobody knows where {positions!r} is in a trace of your own; ask for 'all', 'last' or steps there, or run "
            "examples by lens.records, lens.generate or what builds on them"
        )
    return {
        "all": True,
        "prompt": step <= 0,
        "last": step == 0,
        "answer": step >= 0,
        "decode": step > 0,
        "from_question": True,
    }.get(positions, False)


def _taken(steps: Steps, step: int) -> bool:
    """Whether a position of this step is among `steps`."""
    step = max(0, step)
    return step in steps if isinstance(steps, tuple) else steps == "all" or (steps == "decode") == (step > 0)
