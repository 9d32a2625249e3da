"""Models that are refused as what they are: split over devices, pruned layer by layer, adapted at their experts."""

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Zero
from moe_lens.lens.lens import MoELens


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.down_proj", "lm_head.weight"])
def test_a_split_model_is_called_split_and_not_quantised(mesh, name, tokenizer):
    model = build_model("mixtral", len(tokenizer))
    path, _, own = name.rpartition(".")
    whole = model.get_parameter(name).data
    setattr(model.get_submodule(path), own, nn.Parameter(distribute_tensor(whole, mesh, [Replicate()])))
    with pytest.raises(MoELensError, match=rf"'{name}' is a DTensor, .*device_map='auto'") as refusal:
        MoELens(model, tokenizer)
    assert "quantised" not in str(refusal.value)


def test_layers_with_fewer_experts_are_named(tokenizer):
    model = build_model("mixtral", len(tokenizer))
    block = model.model.layers[-1].mlp
    for module, names in ((block.gate, ["weight"]), (block.experts, ["gate_up_proj", "down_proj"])):
        module.num_experts = 5
        for name in names:
            setattr(module, name, nn.Parameter(getattr(module, name)[:5].clone()))
    told = r"layers 0, 1 have 8 experts, 3 per token, .*; layers 2 have 5 experts, 3 per token"
    with pytest.raises(MoELensError, match=told):
        MoELens(model, tokenizer)


def adapted(model: nn.Module, *parameters: str) -> nn.Module:
    """The model with LoRA on its queries and on these parameters, with an effect."""
    options = {"target_modules": ["q_proj"], "target_parameters": list(parameters) or None}
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))


def test_experts_under_lora_are_refused_until_they_are_merged(tokenizer):
    model = adapted(build_model("mixtral", len(tokenizer)), "experts.gate_up_proj", "experts.down_proj")
    with pytest.raises(MoELensError, match=r"merge_and_unload\(\)"):
        MoELens(model, tokenizer)
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer("the cat")["input_ids"]])).logits
    lens = MoELens(model.merge_and_unload(), tokenizer)
    logits, _ = lens.run_with_cache("the cat")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameters", [(), ("gate.weight",)], ids=["attention", "router"])
def test_other_parts_under_lora_are_measured_and_masked(parameters, tokenizer):
    model = adapted(build_model("mixtral", len(tokenizer)), *parameters)
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer("the cat")["input_ids"]])).logits
    lens = MoELens(model, tokenizer)
    plain, _ = lens.run_with_cache("the cat")
    assert torch.equal(plain, expected)
    with lens.intervene(Zero(ExpertSet.of({0: range(8)}))):
        masked, _ = lens.run_with_cache("the cat")
    assert not torch.equal(plain, masked)
