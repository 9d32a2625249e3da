"""What training minimises: the cross-entropy of the answers' tokens (Eq. 6), and nothing else."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from moe_lens.architecture.discovery import pretrained
from moe_lens.data import Batch, Encoded
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.lens.taken import kept_logits


def answer_loss(module: nn.Module, batch: Batch, *, tokens: int | None = None) -> torch.Tensor:
    """The cross-entropy (nats) of the batch's answer tokens, end-of-sequence included; a scalar.

    tokens: what the sum over the tokens is divided by; None for their number, which gives the mean.

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
    labels = labels.flatten().to(logits.device)
    tokens = int((labels != IGNORED_LABEL).sum()) if tokens is None else tokens
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return summed / tokens


def answer_tokens(prompts: Iterable[Encoded]) -> int:
    """The number of tokens that `answer_loss` scores in these prompts, which carry their answers."""
    return sum(len(prompt.input_ids) - prompt.prompt_length for prompt in prompts)
