"""A tiny random model of every MoE family in transformers, from its own configuration class; nothing is downloaded."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from moe_lens.architecture.tiny_sizes import (
    FAMILY_SIZES,
    PART_SIZES,
    SIZES,
    VISION_SIZES,
    VOCABULARY,
    VOCABULARY_NAMES,
)
from moe_lens.errors import MoELensError

FAMILIES = tuple(name for name in FAMILY_SIZES if name in CONFIG_MAPPING)
"""The model types of which there is a tiny model here and code in the installed transformers."""

NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
SPREAD = 0.25
SELECTION_BIAS_NAMES = ("correction_bias", "expert_bias", "balancing_biases")
EXPERTS_BY_TOKEN = "tid2eid"
N_EXPERTS = 8


def tiny_model(
    family: str,
    *,
    vocab_size: int = VOCABULARY,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] = NO_CHANGES,
) -> nn.Module:
    """A model of `family` with a few layers and random weights, large enough that every mechanism shows in the logits.

    vocab_size: by default that of `tiny_tokenizer`.
    changes: other settings of the language model's configuration than the tiny ones, such as `num_hidden_layers`.
    Raises MoELensError for a family that is not one of `FAMILIES`.
    """
    config = tiny_config(family, vocab_size=vocab_size, changes=changes)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    torch.manual_seed(seed)
    model: nn.Module = auto.from_config(config, dtype=dtype).eval()
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


def tiny_config(
    family: str, *, vocab_size: int = VOCABULARY, changes: Mapping[str, Any] = NO_CHANGES
) -> PreTrainedConfig:
    """The configuration of `tiny_model`."""
    if family not in FAMILIES:
        raise MoELensError(f"no tiny model of {family!r} is known; expected one of {', '.join(FAMILIES)}")
    own = CONFIG_MAPPING[family]
    sizes = SIZES | dict.fromkeys(VOCABULARY_NAMES, vocab_size)
    wanted = {**FAMILY_SIZES[family], **changes}
    if "text_config" not in own.sub_configs:
        return _sized(own, sizes, wanted)
    text = _sized(own.sub_configs["text_config"], sizes, wanted).to_dict()
    return own(**(PART_SIZES.get(family, {}) | _other_parts(own) | {"text_config": text}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, for `tiny_model`."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {name: place for place, name in enumerate(["<pad>", "<eos>", *names])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _other_parts(own: type[PreTrainedConfig]) -> dict[str, dict[str, Any]]:
    """Small settings of each part of a configuration of several, its language model left out."""
    found = {name: getattr(own(), name, None) for name in own.sub_configs if name != "text_config"}
    parts = {name: type(part) for name, part in found.items() if part is not None}
    return {
        name: _sized(part, VISION_SIZES, PART_SIZES.get(part.model_type, {}) | _other_parts(part)).to_dict()
        for name, part in parts.items()
    }


def _sized(own: type[PreTrainedConfig], sizes: Mapping[str, Any], wanted: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of class `own` with those of `sizes` that it has a setting for, and all of `wanted`."""
    known = own().to_dict()
    alias = own.attribute_map
    settings = {alias[name]: value for name, value in sizes.items() if name in alias}
    settings |= {name: value for name, value in sizes.items() if name in known and name not in alias}
    if settings.get("qk_rope_head_dim"):  # latent attention: as many key heads as query heads, of a width that follows
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return own(**(settings | {alias.get(name, name): value for name, value in wanted.items()}))


def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Random numbers for weights and for what is 0 at the start: biases, sinks, selection biases, tables."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                _fill(parameter, SPREAD, generator)
            elif not parameter.any():
                _fill(parameter, SPREAD / 2, generator)
        for name, buffer in model.named_buffers():
            if name.endswith(SELECTION_BIAS_NAMES):
                _fill(buffer, 1.0, generator)
            elif name.endswith(EXPERTS_BY_TOKEN):  # [token id, k]: k different experts for each id
                buffer.copy_(torch.rand(len(buffer), N_EXPERTS, generator=generator).argsort(-1)[:, : buffer.shape[1]])


def _fill(tensor: torch.Tensor, spread: float, generator: torch.Generator) -> None:
    tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
