"""Greedy decoding, whatever a checkpoint's generation config says: what holds, what ends a sequence, its text."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from moe_lens.architecture.discovery import pretrained, text_config
from moe_lens.data.thoughts import THOUGHTS, answer_start
from moe_lens.errors import MoELensError

HARMLESS = frozenset(
    "max_length max_new_tokens use_cache pad_token_id bos_token_id eos_token_id transformers_version".split()
)
"""Settings of a generation config that greedy decoding follows, replaces by its own, or promises to leave out."""

MARKS = frozenset(mark for pair in THOUGHTS for mark in pair)


@dataclass(frozen=True)
class Greedy:
    """How `module` generates: the most likely token each time, up to an end of sequence.

    told: what was said of the model's own settings before, so that it is said once.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    told: set[str] = field(default_factory=set)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a sequence: of generation config, model config, and tokenizer, whose ends training."""
        configs = (self._own, pretrained(self.module).config, text_config(self.module))
        named = [getattr(config, "eos_token_id", None) for config in configs] + [self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(end for ids in named for end in _several(ids)))

    @contextmanager
    def decoding(self, max_new_tokens: int, pad: int) -> Iterator[dict[str, Any]]:
        """Inside the block the model has a generation config for this alone; gives the arguments of `generate`.

        A warning says, once, what of its own is left out. Transformers fills gaps of a given config from the model's.
        """
        owner, own, kept = self._owner, self._own, self._owner.generation_config
        self._tell()
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=list(self.ends) or None,
            use_cache=own.use_cache,
        )
        owner.generation_config = greedy
        try:
            yield {"generation_config": greedy}
        finally:
            owner.generation_config = kept

    def texts(self, new: Tensor) -> list[str]:
        """What was generated [batch, new], up to the end of sequence, without special tokens but those of thoughts."""
        return [self._text(row[~after].tolist()) for row, after in zip(new, self.ended(new), strict=True)]

    def ended(self, new: Tensor) -> Tensor:
        """Where a sequence has ended, bool [batch, new], from its end-of-sequence on."""
        ends = torch.tensor(self.ends, dtype=new.dtype, device=new.device)
        return torch.isin(new, ends).cumsum(-1) > 0

    def _text(self, ids: list[int]) -> str:
        added = self.tokenizer.added_tokens_decoder
        marks = {token: mark for token in ids if token in added and (mark := str(added[token])) in MARKS}
        said, start = "", 0
        for at in [place for place, token in enumerate(ids) if token in marks]:
            said, start = said + self._decoded(ids[start:at]) + marks[ids[at]], at + 1
        return said + self._decoded(ids[start:])

    def _decoded(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def _owner(self) -> Any:
        """The module that generates: `module`, or what an adapter wraps."""
        return next((part for part in self.module.modules() if isinstance(part, GenerationMixin)), self.module)

    @property
    def _own(self) -> Any:
        """The model's generation config; where it has none, one that says nothing."""
        return self._owner.generation_config or GenerationConfig()

    def _tell(self) -> None:
        """Warnings of what the generation config says and is not followed, and of ends that it lacks."""
        own = self._own.to_diff_dict()
        left = sorted(f"{name}={value!r:.40}" for name, value in own.items() if _bends(name, value))
        if left:
            self._once(f"answers are greedy; left out is what else the generation config says: {', '.join(left)}")
        more = [end for end in self.ends if end not in _several(self._own.eos_token_id)]
        if more:
            names = ", ".join(repr(self.tokenizer.decode([end])) for end in more)
            self._once(f"answers also end at {names}, as tokenizer or config say and the generation config does not")

    def _once(self, said: str) -> None:
        if said not in self.told:
            self.told.add(said)
            warnings.warn(said, stacklevel=2)


def until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these within the answer, which begins after thoughts and white space.

    MoELensError for an empty one.
    """
    if isinstance(stop, str) or not all(stop):
        raise MoELensError(f"expected a sequence of texts to stop before, none empty; got {stop!r}")
    begun = answer_start(text)
    return text[: min((at for one in stop if (at := text.find(one, begun)) >= 0), default=len(text))]


def _bends(name: str, value: Any) -> bool:
    """Whether a setting of a generation config could bend greedy answers."""
    return name not in HARMLESS and not name.startswith("_") and value is not None and value is not False


def _several(ids: Any) -> tuple[int, ...]:
    """Token ids given as none, one, or several; MoELensError for what are no ids."""
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    found = () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    if not all(type(one) is int and 0 <= one < 2**31 for one in found):
        raise MoELensError(
            f"expected ids of tokens as eos_token_id; got {ids!r:.80}: correct it in the model's generation_config, "
            "its config, or the tokenizer"
        )
    return found
