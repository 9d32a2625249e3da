"""Checkpoints whose weights are not all there, or not all the model's: refused by name, or told."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens

ROUTER = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def changed(whole, tmp_path):
    """Makes a checkpoint with these weights put in, or left out where they are None, and these settings."""

    def make(weights=(), **settings):
        folder = shutil.copytree(whole, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors") | dict(weights)
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("name", [ROUTER, EXPERT, HEAD, "model.norm.weight"])
def test_a_missing_weight_is_refused_by_name(changed, name):
    told = "layers.1.mlp.experts.down_proj is" if name == EXPERT else f"lacks weights of OlmoeForCausalLM: {name}"
    with pytest.raises(MoELensError, match=told):
        MoELens.from_pretrained(changed({name: None}))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (ROUTER, r"layers.1.mlp.gate.weight is \[8, 16\] there and \[8, 32\] here"),
        (EXPERT, "cannot be put together: model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_weight_of_another_shape_is_refused_by_name(changed, whole, name, told):
    narrow = load_file(whole / "model.safetensors")[name][..., :16].contiguous()
    with pytest.raises(MoELensError, match=told):
        MoELens.from_pretrained(changed({name: narrow}))


def test_weights_that_cannot_be_put_together_are_named_also_where_transformers_logs_nothing(changed, whole):
    narrow = load_file(whole / "model.safetensors")[EXPERT][..., :16].contiguous()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with pytest.raises(MoELensError, match=r"cannot be put together: model\.layers\.1\.mlp\.experts\.down_proj"):
            MoELens.from_pretrained(changed({EXPERT: narrow}))
    finally:
        transformers.logging.set_verbosity(level)


def test_many_missing_weights_are_counted(changed):
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{layer}.{norm}.weight" for layer in range(3) for norm in norms]
    with pytest.raises(MoELensError, match=r"layers.0.input_layernorm.weight, .* and 1 more"):
        MoELens.from_pretrained(changed(dict.fromkeys(names)))


def test_a_head_that_is_tied_need_not_be_in_the_checkpoint(changed, recwarn):
    lens = MoELens.from_pretrained(changed({HEAD: None}, tie_word_embeddings=True))
    assert lens.module.lm_head.weight is lens.module.model.embed_tokens.weight
    assert not recwarn.list


def test_a_weight_without_a_place_is_told_and_left_out(changed):
    with pytest.warns(UserWarning, match="has no place for, and that are left out: model.layers.7.more"):
        MoELens.from_pretrained(changed({"model.layers.7.more": torch.zeros(2)}))
