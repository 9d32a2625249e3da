"""Teaching a split model to answer as the dense one does: the objective, the run, and what it is judged by."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lens.data import Batch, Encoded
from moe_lens.errors import MoELensError
from moe_lens.tuning import Schedule
from moe_lens.tuning.checkpoint import Checkpoints, Progress
from moe_lens.tuning.loop import fit


class Distilled:
    """The divergence of the model's next-token distributions from the teacher's, KL(teacher ‖ model) in nats.

    A part is a token with one before it: all of a text counts, not only the answer.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def rows(self, prompts: Sequence[Encoded], places: Sequence[int]) -> list[Encoded]:
        return [prompts[place] for place in places]

    def parts(self, prompts: Sequence[Encoded], places: Sequence[int]) -> int:
        return sum(len(prompts[place].input_ids) - 1 for place in places)

    def loss(self, module: nn.Module, batch: Batch, places: Sequence[int]) -> Tensor:
        wanted = batch.attention_mask[:, :-1].bool()
        with torch.no_grad():
            told = _log_probabilities(self.teacher, batch)[wanted]
        return F.kl_div(_log_probabilities(module, batch)[wanted], told, log_target=True, reduction="sum")


def distil(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Sequence[Encoded],
    schedule: Schedule,
    *,
    pad_id: int,
    out: Path,
    run: Mapping[str, Any],
    routers_only: bool = False,
) -> Progress:
    """Trains the student's MoE layers, or their routers alone, towards the teacher, and tells how it went.

    It goes on where it was stopped, from `out`. run: what tells this run from any other.
    """
    part = ".mlp.gate." if routers_only else ".mlp."
    names = [name for name, _ in student.named_parameters() if part in name]
    checkpoints = Checkpoints(out, {**run, "routers_only": routers_only}, every=300)
    label, objective = "routers" if routers_only else "MoE layers", Distilled(teacher)
    return fit(
        student, names, prompts, schedule, pad_id=pad_id, checkpoints=checkpoints, objective=objective, label=label
    )


@torch.no_grad()
def text_loss(model: nn.Module, prompts: Sequence[Encoded]) -> float:
    """The mean negative log-likelihood (nats) of the texts' tokens, each given those before it.

    Raises MoELensError where it is no number, as of a model with damaged weights.
    """
    total, count = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(prompt.input_ids) - 1
    if not isfinite(total):
        raise MoELensError(f"the texts' loss is {total}: this model's weights give no numbers; take one that is whole")
    return total / count


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Of each position's next token, [batch, pos, vocabulary], of all positions but the last."""
    mask = batch.attention_mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return torch.as_tensor(logits[:, :-1]).float().log_softmax(-1)
