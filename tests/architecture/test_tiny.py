"""Tiny models: one of every MoE family that the installed transformers has, small, random, the same each time."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from moe_lens.architecture.tiny import FAMILIES, tiny_config, tiny_model, tiny_tokenizer
from moe_lens.architecture.tiny_sizes import FAMILY_SIZES
from moe_lens.errors import MoELensError

COUNTS_OF_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
NO_LANGUAGE_MODELS = {
    "dots3_note_vision_encoder": "images",
    "nllb-moe": "encoder and decoder",
    "openai_privacy_filter": "an encoder",
    "qwen3_omni_moe_talker_text": "speech",
    "switch_transformers": "encoder and decoder",
    "vitpose_backbone": "images",
}
#: Language models that are parts of others: by whose name they are here.
WHOLE = {"step3p5": "step3p7", "qwen3_omni_moe_text": "qwen3_omni_moe_thinker"}


def settings_of(config: type) -> set[str]:
    """All settings that a configuration class and those above it declare."""
    return {name for base in config.__mro__ for name in getattr(base, "__annotations__", {})}


@pytest.mark.slow  # imports every configuration of transformers
def test_every_family_with_experts_in_the_installed_transformers_is_here():
    with_experts = {name for name in CONFIG_MAPPING if COUNTS_OF_EXPERTS & settings_of(CONFIG_MAPPING[name])}
    assert set(NO_LANGUAGE_MODELS) <= with_experts
    named = {WHOLE.get(name, name) for name in with_experts - set(NO_LANGUAGE_MODELS)}
    missing = {name for name in named if not {name, name.removesuffix("_text")} & set(FAMILIES)}
    assert missing == set()


def test_all_of_them_are_in_the_installed_transformers():
    assert set(FAMILIES) == set(FAMILY_SIZES)


def test_a_model_depends_on_its_seed_alone():
    first, again, other = (tiny_model("deepseek_v3", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert first[name].any()
    assert not torch.equal(first[name], other[name])


def test_changes_and_sizes_are_taken_also_under_another_name_of_the_setting():
    config = tiny_config("deepseek_v3", vocab_size=99, changes={"num_local_experts": 4, "num_hidden_layers": 2})
    assert (config.vocab_size, config.n_routed_experts, config.num_hidden_layers) == (99, 4, 2)
    whole = tiny_config("qwen3_vl_moe", vocab_size=99, changes={"num_experts": 4})
    assert (whole.text_config.vocab_size, whole.text_config.num_experts) == (99, 4)


def test_an_unknown_family_is_refused():
    with pytest.raises(MoELensError, match="no tiny model of 'llama' is known; expected one of afmoe, "):
        tiny_model("llama")


def test_the_tokenizer_is_of_bytes():
    tokenizer = tiny_tokenizer()
    text = "Zürich, naïve\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == tiny_config("olmoe").vocab_size
