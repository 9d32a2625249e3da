"""What prompts a model takes: none with a token that it has no embedding of; longer ones than it knows are told."""

import warnings
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moe_lens.architecture.discovery import pretrained, text_config
from moe_lens.data import Encoded
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.errors import MoELensError


def expect_known(prompts: Sequence[Encoded], module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """MoELensError, by example and token, for one that the model has no embedding of; a warning of too long prompts."""
    size, longest = _n_embeddings(module), getattr(text_config(module), "max_position_embeddings", None)
    if longest is not None and any(len(prompt.input_ids) > longest for prompt in prompts):
        warnings.warn(  # always the same text, so that Python tells it once
            f"prompts have more than the {longest} tokens that the model's config says it knows positions of, where "
            f"its numbers may mean nothing; leave them out or cut them: --max-length {longest}",
            stacklevel=2,
        )
    for prompt in prompts:
        if prompt.input_ids and (highest := max(prompt.input_ids)) >= size:
            raise MoELensError(
                f"example {prompt.id!r} has the token {tokenizer.convert_ids_to_tokens(highest)!r}, number {highest}, "
                f"and the model has embeddings of {size}: open it with the tokenizer that belongs to it, or, where "
                "tokens were added, with weights that know them (model.resize_token_embeddings makes new ones)"
            )


def pad_id(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """What a batch is padded with; 0 where the tokenizer has no pad, or one that the model has no embedding of.

    Pads are masked: any token will do.
    """
    pad: int | None = tokenizer.pad_token_id
    return pad if pad is not None and pad < _n_embeddings(module) else 0


def _n_embeddings(module: nn.Module) -> int:
    return len(cast(Tensor, pretrained(module).get_input_embeddings().weight))


def kept_logits(logits: Tensor, kept: int | Sequence[int]) -> Tensor:
    """Logits [batch, row, vocab] at the last `kept` positions, or at these, from a model that was asked for them.

    Some models give all positions whatever they are asked (`logits_to_keep`).
    """
    if isinstance(kept, int):
        return logits[:, -kept:]
    return logits if logits.shape[1] == len(kept) else logits[:, kept]


def joint_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probability (nats) of each row's labels together, float32 [batch].

    logits: [batch, row, vocab], at the tokens before those of labels [batch, pos] and at the last; ignored ones are 0.
    """
    labels = labels.to(logits.device)
    log_probabilities = logits[:, :-1].float().log_softmax(-1)
    chosen = log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(labels == IGNORED_LABEL, 0).sum(-1)
