"""The training loop: chosen parameters, loss on the answers only, the paper's schedule."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from moe_lens.data import Batch, Encoded, collate
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.errors import MoELensError


@dataclass(frozen=True)
class Schedule:
    """The numbers of a training run; the defaults are the paper's (Appendix A) where it gives them.

    warmup: share of the steps in which the rate rises linearly; after it a cosine leads to 0.
    weight_decay: 0, since decay would also move what the task's loss does not ask for.
    max_gradient_norm: gradients are scaled down to this norm.
    """

    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size"):
            if getattr(self, name) <= 0:
                raise MoELensError(f"{name} must be above 0; got {getattr(self, name)}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of `step`, counted from 0, of `steps`."""
        warm = self.warmup * steps
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    def steps(self, examples: int) -> int:
        """Optimizer steps in all epochs over that many examples."""
        return self.epochs * math.ceil(examples / self.batch_size)

    def order(self, examples: int, step: int) -> list[int]:
        """The places of the examples in the batch of `step`: a function of the seed and the step alone."""
        epoch, place = divmod(step, math.ceil(examples / self.batch_size))
        shuffled = random.Random(f"epoch/{self.seed}/{epoch}").sample(range(examples), examples)
        return shuffled[place * self.batch_size : (place + 1) * self.batch_size]


def fit(
    module: nn.Module,
    parameters: Sequence[str],
    prompts: Sequence[Encoded],
    schedule: Schedule,
    *,
    pad_id: int,
    label: str = "training",
) -> pd.DataFrame:
    """Trains the named parameters in place, all others frozen, and returns the log: step, loss, learning_rate.

    prompts: encoded with their answers; the loss is the mean cross-entropy of a batch's answer tokens (Eq. 6).
    Afterwards `module` is in evaluation mode, nothing in it requires a gradient, and all has its old dtype.
    Raises MoELensError for no prompts, unknown parameters, or a loss that is not finite.
    """
    if not prompts:
        raise MoELensError("there is nothing to train on: expected one or more examples")
    trained = _parameters(module, parameters)
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    steps = schedule.steps(len(prompts))
    log = []
    with _training(module, trained), tqdm(total=steps, desc=label, unit="step") as progress:
        for step in range(steps):
            rate = schedule.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = collate([prompts[i] for i in schedule.order(len(prompts), step)], pad_id)
            loss = answer_loss(module, batch)
            if not torch.isfinite(loss):
                raise MoELensError(
                    f"the loss became {loss.item()} at step {step + 1} of {steps} (examples {', '.join(batch.ids)}); "
                    "use a lower learning rate"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, schedule.max_gradient_norm)
            optimizer.step()
            log.append((step + 1, loss.item(), rate))
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return pd.DataFrame(log, columns=["step", "loss", "learning_rate"])


def answer_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy of the batch's answer tokens, end-of-sequence included; a scalar.

    Only the positions that predict them are projected on the vocabulary: with left padding, the last ones.
    """
    device = next(module.parameters()).device
    labels, mask = batch.labels.to(device), batch.attention_mask.to(device)
    first = batch.first_label
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = module(
        input_ids=batch.input_ids.to(device),
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=labels.shape[1] - first + 1,
        use_cache=False,
    ).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, first:].flatten(), ignore_index=IGNORED_LABEL
    )


def _parameters(module: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    known = dict(module.named_parameters())
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise MoELensError(f"expected names of the model's parameters; it has no {missing or 'empty name'}")
    return [known[name] for name in names]


@contextmanager
def _training(module: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for `trained` alone, in float32 since small updates vanish in half precision; all undone after.

    A half-precision model runs under autocast. Sums are made in a fixed order, so the same seed gives the same
    bytes also with several threads.
    """
    dtypes = [parameter.dtype for parameter in trained]
    half = {parameter.dtype for parameter in module.parameters()} - {torch.float32}
    cast = torch.autocast(next(module.parameters()).device.type, dtype=half.pop()) if half else nullcontext()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        module.train()
        module.requires_grad_(False)
        for parameter in trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        with cast:
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        module.eval()
        module.requires_grad_(False)
        for parameter, dtype in zip(trained, dtypes, strict=True):
            parameter.data, parameter.grad = parameter.data.to(dtype), None
