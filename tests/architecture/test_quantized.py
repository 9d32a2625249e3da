"""Quantised models: loaded in full precision where transformers can, right where only other parts are, else refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_model
from remote_models import KINDS, remote_folder
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP

from moe_lens.architecture.quantized import is_plain, quantization_method
from moe_lens.architecture.remote_code import load_remote
from moe_lens.checks import PROMPTS, run_checks
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}


def saved(model: nn.Module, folder: Path, change, stated: dict) -> Path:
    """A checkpoint of `model` whose tensors are changed by `change`, and whose config states a quantisation."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return folder


def assert_sound(lens: MoELens) -> None:
    table = run_checks(lens, PROMPTS)
    assert set(table["outcome"]) == {"passed"}, table.to_string()


@pytest.fixture
def gpt_oss(tokenizer):
    changes = {"num_local_experts": 8, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 2}
    return build_model("gpt_oss", len(tokenizer), **WIDE, **changes, layer_types=["sliding_attention"] * 2)


def test_four_bit_experts_are_loaded_as_the_numbers_they_stand_for(gpt_oss, tokenizer, tmp_path):
    generator = torch.Generator().manual_seed(0)
    packed = {}

    def pack(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, n_in, n_out = tensors.pop(name).shape
            shape = (experts, n_out, n_in // 32, 16)
            packed[f"{name}_blocks"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(122, 126, shape[:3], generator=generator, dtype=torch.uint8)
        return tensors | packed

    folder = saved(gpt_oss, tmp_path, pack, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    with pytest.warns(UserWarning, match=r"quantised \(mxfp4\); it is loaded in full precision"):
        lens = MoELens.from_pretrained(folder, tokenizer, dtype=torch.float32)
    assert packed
    for name in {name.rpartition("_")[0] for name in packed}:
        blocks, scales = packed[f"{name}_blocks"], packed[f"{name}_scales"]
        halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # the low half of a byte comes first
        numbers = torch.tensor(FP4)[halves.long()] * 2.0 ** (scales.float() - 127)[..., None]
        torch.testing.assert_close(lens.module.get_parameter(name), numbers.flatten(2).mT, rtol=0, atol=0)
    assert all(is_plain(parameter) for parameter in lens.module.parameters())
    assert_sound(lens)


def test_eight_bit_checkpoints_are_loaded_as_the_numbers_they_stand_for(tokenizer, tmp_path):
    model = build_model("deepseek_v3", len(tokenizer), **WIDE)
    numbers = {}

    def pack(tensors):
        for name in [name for name in tensors if ".mlp.experts." in name]:
            weight = tensors[name]
            scale = weight.abs().amax() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
            numbers[name] = tensors[name].float() * scale
        return tensors

    stated = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}
    folder = saved(model, tmp_path, pack, stated)
    with pytest.warns(UserWarning, match=r"quantised \(fp8\); it is loaded in full precision"):
        lens = MoELens.from_pretrained(folder, tokenizer, dtype=torch.float32)
    assert numbers
    down = lens.module.get_parameter("model.layers.1.mlp.experts.down_proj")
    for expert, weight in enumerate(down):
        torch.testing.assert_close(weight, numbers[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"])
    assert all(is_plain(parameter) for parameter in lens.module.parameters())
    assert_sound(lens)


def test_a_block_whose_kernel_passes_by_router_and_experts_is_refused(gpt_oss, tokenizer):
    for layer in gpt_oss.model.layers:
        layer.mlp = Mxfp4GptOssMLP(layer.mlp.router, Mxfp4GptOssExperts(gpt_oss.config))
    with pytest.raises(MoELensError, match=r"'model.layers.0.mlp.experts' is quantised: it has a Mxfp4GptOssExperts"):
        MoELens(gpt_oss, tokenizer)


def test_eight_bit_experts_are_refused(tokenizer):
    model = build_model("deepseek_v3", len(tokenizer), **WIDE)
    config = FineGrainedFP8Config(weight_block_size=(64, 64))
    model = replace_with_fp8_linear(model, quantization_config=config, pre_quantized=True)
    with pytest.raises(MoELensError, match=r"'model.layers.1.mlp.experts' is quantised: .*FP8Experts"):
        MoELens(model, tokenizer)


def test_packed_numbers_are_refused_whatever_made_them(tokenizer):
    model = build_model("olmoe", len(tokenizer))
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)
    with pytest.raises(MoELensError, match=r"'model.layers.1.mlp.experts' .* down_proj as Parameter of torch.int8"):
        MoELens(model, tokenizer)


def quantized(folder: Path, config) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_leaves_fused_experts_alone_and_is_right(bits, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    build_model("qwen2_moe", len(tokenizer), **WIDE).save_pretrained(tmp_path)
    model = quantized(tmp_path, BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    assert not is_plain(model.model.layers[1].self_attn.q_proj.weight)
    assert is_plain(model.model.layers[1].mlp.experts.down_proj)
    assert quantization_method(model.config) == "bitsandbytes"
    assert_sound(MoELens(model, tokenizer))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_packs_listed_experts_which_are_refused(bits, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = remote_folder(tmp_path / "own", tokenizer, {**KINDS["summed"], "hidden_size": 64, "inner": 64})
    model = load_remote(folder, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    with pytest.raises(MoELensError, match=r"'model.layers.0.mlp.experts' is quantised: it has 0.w1.weight as"):
        MoELens(model, tokenizer)


def test_torchao_is_right_but_on_experts(tokenizer, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    build_model("qwen2_moe", len(tokenizer), **WIDE).save_pretrained(tmp_path)
    eight_bits = torchao.Int8WeightOnlyConfig()
    model = quantized(tmp_path, TorchAoConfig(quant_type=eight_bits))
    assert not is_plain(model.model.layers[1].self_attn.q_proj.weight)
    assert_sound(MoELens(model, tokenizer))
    by_name = torchao.FqnToConfig({r"re:.*experts\.(gate_up|down)_proj": eight_bits})
    with pytest.raises(MoELensError, match=r"experts' is quantised: it has gate_up_proj as Int8Tensor"):
        MoELens(quantized(tmp_path, TorchAoConfig(quant_type=by_name)), tokenizer)
