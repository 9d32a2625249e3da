"""What training minimises: the cross-entropy of the answers' tokens (Eq. 6), or another mean over examples."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from moe_lens.architecture.discovery import pretrained
from moe_lens.data import Batch, Encoded
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.lens.taken import kept_logits


class Objective(Protocol):
    """A mean over the parts of a step's examples, of which each forward pass gives some."""

    def rows(self, prompts: Sequence[Encoded], places: Sequence[int]) -> list[Encoded]:
        """What the model is run on for the examples at these places."""

    def parts(self, prompts: Sequence[Encoded], places: Sequence[int]) -> int:
        """How many parts the mean over these examples is of."""

    def loss(self, module: nn.Module, batch: Batch, places: Sequence[int]) -> torch.Tensor:
        """The sum (a scalar) over the parts of these examples; batch: of their `rows`."""


class AnswerLoss:
    """The cross-entropy of the answers' tokens (Eq. 6): a part is a token."""

    def rows(self, prompts: Sequence[Encoded], places: Sequence[int]) -> list[Encoded]:
        return [prompts[place] for place in places]

    def parts(self, prompts: Sequence[Encoded], places: Sequence[int]) -> int:
        return answer_tokens(self.rows(prompts, places))

    def loss(self, module: nn.Module, batch: Batch, places: Sequence[int]) -> torch.Tensor:
        return answer_loss(module, batch, tokens=1)


ANSWER_LOSS = AnswerLoss()


def answer_loss(module: nn.Module, batch: Batch, *, tokens: int | None = None) -> torch.Tensor:
    """The cross-entropy (nats) of the batch's answer tokens, end-of-sequence included; a scalar.

    tokens: what the sum over the tokens is divided by; None for their number, which gives the mean.
    """
    logits, labels = _scored(module, batch)
    tokens = int((labels != IGNORED_LABEL).sum()) if tokens is None else tokens
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum") / tokens


def answer_log_likelihoods(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The log-probability (nats) of each answer of the batch, end-of-sequence included; [batch]."""
    logits, labels = _scored(module, batch)
    nats = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
    return -nats.view(len(batch.ids), -1).sum(1)


def _scored(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [batch * pos, vocabulary] in float32 that predict the labels [batch * pos] beside them.

    Only the positions that predict them are projected on the vocabulary: with left padding, the last ones.
    """
    device = pretrained(module).device  # of its first part; a device_map may be of where it was once
    mask, labels = batch.attention_mask.to(device), batch.answer_labels
    kept = labels.shape[1] + 1
    given = module(
        input_ids=batch.input_ids.to(device),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    logits = kept_logits(given, kept)
    return logits[:, :-1].flatten(0, 1).float(), labels.flatten().to(logits.device)


def answer_tokens(prompts: Iterable[Encoded]) -> int:
    """The number of tokens that `answer_loss` scores in these prompts, which carry their answers."""
    return sum(len(prompt.input_ids) - prompt.prompt_length for prompt in prompts)
