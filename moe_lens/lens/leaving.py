"""Greedy decoding of a batch that its rows leave once they have ended."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moe_lens.architecture.discovery import text_config
from moe_lens.lens.finite import FiniteSteps
from moe_lens.lens.twins import ContrastSteps, LogitContrast

SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""The layers of a cache that hold nothing but keys and values by row, of which rows can be taken."""
ENOUGH = 0.25
"""The share of rows that must have ended before these leave: to take rows of a cache costs about a step."""


class EnoughEnded(StoppingCriteria):
    """Stops all rows at once when enough of them have ended. ended: which have, bool [batch]."""

    def __init__(self, ends: Sequence[int], like: Tensor) -> None:
        self._ends = torch.tensor(ends, dtype=like.dtype, device=like.device)
        self.ended = torch.zeros(len(like), dtype=torch.bool, device=like.device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.ended = self.ended | torch.isin(input_ids[:, -1], self._ends)
        return (self.ended.float().mean() >= ENOUGH).expand(len(self.ended))


class Telling(StoppingCriteria):
    """Stops nothing; tells after each token what every row has said since `width`, the prompts' positions."""

    def __init__(self, width: int, told: Callable[[Tensor], None]) -> None:
        self._width, self._told = width, told

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self._told(input_ids[:, self._width :])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Leaving:
    """How `module` decodes, greedily as `config` says, up to any of the tokens `ends`.

    keep: told which of the rows that ran until then are left, each time some leave; None: none leave. contrast: of both
    halves of the batch, prompts and then their twins, which so end together. told: what each row has said, [row, new],
    after each token.
    """

    module: Any
    config: GenerationConfig
    ends: Sequence[int]
    keep: Callable[[list[int]], None] | None
    contrast: LogitContrast | None = None
    told: Callable[[Tensor], None] | None = None

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The new tokens of prompts [batch, pos], [batch, new], and whether the logits of each were finite.

        Of a row that has left, the tokens after its end are pads, and finite.
        """
        keep = self.keep
        cache = None if keep is None else selectable_cache(self.module, self.config)
        width, rows = input_ids.shape[1], torch.arange(len(input_ids), device=input_ids.device)
        whole = input_ids.new_full((len(rows), int(self.config.max_new_tokens)), self.config.pad_token_id)
        fine, done = torch.ones_like(whole, dtype=torch.bool), 0
        while True:
            ended, steps = EnoughEnded(self.ends, input_ids), FiniteSteps()
            given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
            given |= {"position_ids": position_ids}
            telling = [] if self.told is None else [Telling(width, self.told)]
            given |= {"stopping_criteria": [*telling, *([] if cache is None else [ended])]}
            given |= {} if cache is None else {"past_key_values": cache}
            processors = [steps, *([] if self.contrast is None else [ContrastSteps(self.contrast)])]
            said = self.module.generate(**given, generation_config=self._with_left(done), logits_processor=processors)
            new = said[:, width + done :]
            now = slice(done, done + new.shape[1])
            whole[rows, now], fine[rows, now] = new, torch.stack(steps.steps, -1)
            done += new.shape[1]
            left = (~ended.ended).nonzero()[:, 0]
            if keep is None or cache is None or done == whole.shape[1] or not len(left):
                return whole[:, :done], fine[:, :done]
            attention_mask = torch.cat([attention_mask, torch.ones_like(new, dtype=attention_mask.dtype)], -1)
            input_ids, attention_mask, rows = said[left], attention_mask[left], rows[left]
            position_ids = None if position_ids is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
            layers: Sequence[Any] = cache.layers
            for layer in layers:  # each may lie on a device of its own
                layer.batch_select_indices(left if layer.keys is None else left.to(layer.keys.device))
            keep(left.tolist())

    def _with_left(self, done: int) -> GenerationConfig:
        """The config for as many new tokens as are left."""
        config = copy.deepcopy(self.config)
        config.max_new_tokens = self.config.max_new_tokens - done
        return config


def selectable_cache(module: nn.Module, config: GenerationConfig) -> DynamicCache | None:
    """An empty cache of which rows can be taken; None for a model that keeps something else, or no cache at all."""
    if config.use_cache is False or not config.eos_token_id:
        return None
    cache = DynamicCache(config=text_config(module))
    return cache if cache.layers and all(type(layer) in SELECTABLE for layer in cache.layers) else None
