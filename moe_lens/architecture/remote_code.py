"""Loading models that bring their own code, also code written for transformers 4."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers.utils
import transformers.utils.import_utils
from torch import nn
from transformers import AutoConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.whole_weights import load_whole
from moe_lens.errors import MoELensError

GONE = "is_torch_fx_available"
"""What files for transformers 4 import and transformers 5 lacks."""


@contextmanager
def prepare_remote(folder: str | Path) -> Iterator[None]:
    """Inside the block, the code at a folder or hub id can be imported, whichever transformers it was written for.

    What files for transformers 4 import and transformers 5 lacks is there inside the block only. What they call on
    caches at run time is added to transformers' cache classes for good, but only what the file mentions.
    """
    places = [transformers.utils, transformers.utils.import_utils]
    lacking = [place for place in places if not hasattr(place, GONE)]
    for place in lacking:
        setattr(place, GONE, lambda: False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        if reference := (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM"):
            _adapt(get_class_from_dynamic_module(reference, str(folder)))
        yield
    finally:
        for place in lacking:
            delattr(place, GONE)


def load_remote(folder: str | Path, **chosen: Any) -> nn.Module:
    """The causal language model at a folder or hub id, run by the code that lies beside its weights.

    chosen: what else `AutoModelForCausalLM.from_pretrained` takes. Call it only where the user trusts that code.
    Raises MoELensError where input and output embeddings should share weights and do not, and as `load_whole`.
    """
    with prepare_remote(folder):
        model = pretrained(load_whole(folder, trust_remote_code=True, **chosen))
    if getattr(model.config, "tie_word_embeddings", False) and (
        model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    ):
        raise MoELensError(f"{type(model).__name__} says that its embeddings are tied, but its code does not tie them")
    return model


def _adapt(model_class: type[Any]) -> None:
    """Let a model class for transformers 4 be built, run and saved under transformers 5."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    for name, (owner, method) in _CACHE_METHODS.items():
        if name in source and not hasattr(owner, name):
            setattr(owner, name, method)
    tied = getattr(model_class, "_tied_weights_keys", None)
    if isinstance(tied, list):  # transformers 5 wants to know what each is tied to
        embedding = f"{model_class.base_model_prefix}.embed_tokens.weight"
        model_class._tied_weights_keys = dict.fromkeys(tied, embedding)
    if "logits_to_keep" not in inspect.signature(model_class.forward).parameters:
        model_class.forward = _keeping_logits(model_class.forward)
    if not issubclass(model_class, GenerationMixin):
        # transformers adds it too, but only when a class is loaded for the first time in a process.
        model_class.__bases__ += (GenerationMixin,)
    if "get_max_length" in source or "seen_tokens" in source:
        model_class.prepare_inputs_for_generation = _prepare_inputs


def _keeping_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a causal language model that also takes `logits_to_keep`, as those of transformers 5 do."""

    @functools.wraps(forward)
    def keeping(self: nn.Module, *args: Any, logits_to_keep: int | torch.Tensor = 0, **named: Any) -> Any:
        output = forward(self, *args, **named)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output["logits"] = output["logits"][:, kept]
        return output

    own = inspect.signature(forward)
    kept = inspect.Parameter("logits_to_keep", inspect.Parameter.KEYWORD_ONLY, default=0)
    named = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    others = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    vars(keeping)["__signature__"] = own.replace(parameters=[*others, kept, *named])
    return keeping


def _prepare_inputs(self: Any, input_ids: torch.LongTensor, **kwargs: Any) -> dict[str, Any]:
    """What one step of generation takes: as transformers 5 prepares it, always with an attention mask [batch, pos].

    Old code of a model's own takes a cache's "no limit" (-1) for a limit of one token; and its forward pass needs a
    mask, which transformers leaves out where nothing is padded.
    """
    # transformers looks for the name `kwargs` to see that whatever `forward` takes can be given.
    inputs: dict[str, Any] = GenerationMixin.prepare_inputs_for_generation(self, input_ids, **kwargs)
    if inputs.get("attention_mask") is None:
        cache, ids = inputs.get("past_key_values"), inputs["input_ids"]
        length = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        inputs["attention_mask"] = ids.new_ones(len(ids), length)
    return inputs


def _usable_length(self: Cache, new_seq_length: int, layer_idx: int = 0) -> int:
    """Tokens before the new ones that a layer can attend to: a cache without a limit keeps all."""
    return self.get_seq_length(layer_idx)


def _from_legacy(
    cls: type[DynamicCache], past_key_values: Iterable[tuple[torch.Tensor, torch.Tensor]] | None = None
) -> DynamicCache:
    """A cache that holds the (keys, values) of each layer, [batch, head, pos, d_head]."""
    cache = cls()
    for layer, (keys, values) in enumerate(past_key_values or ()):
        cache.update(keys, values, layer)
    return cache


def _to_legacy(self: DynamicCache) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], ...]:
    """The (keys, values) of each layer, [batch, head, pos, d_head]."""
    return tuple((layer.keys, layer.values) for layer in cast("list[DynamicLayer]", self.layers))


_CACHE_METHODS = {
    "get_usable_length": (Cache, _usable_length),
    "from_legacy_cache": (DynamicCache, classmethod(_from_legacy)),
    "to_legacy_cache": (DynamicCache, _to_legacy),
}
