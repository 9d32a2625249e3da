"""Merged models: a plain checkpoint gives the logits of the lens that has the delta, whatever layout is on the disk."""

import pytest
import torch
from safetensors.torch import load_file
from test_methods import ALL_FAMILIES, OTHER_FAMILIES, TEXTS, some_experts
from training_cases import fresh
from transformers import AutoModelForCausalLM, GenerationConfig

from moe_lens import MoELens, MoELensError
from moe_lens.tuning import TuneExperts, TuneRouters, save_merged, save_trained

PER_EXPERT = {"phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2}}  # each expert on its own in the file


@pytest.mark.parametrize("family", [*ALL_FAMILIES, *PER_EXPERT])
def test_a_plain_checkpoint_has_the_logits_of_the_base_with_the_delta(tokenizer, tmp_path, family):
    changes = {**OTHER_FAMILIES, **PER_EXPERT}.get(family, {})
    lens, base = fresh(tokenizer, family, **changes), fresh(tokenizer, family, **changes)
    generator = torch.Generator().manual_seed(1)
    with TuneExperts(some_experts(lens)).attached(lens) as trained, torch.no_grad():
        for name in trained.names:
            parameter = lens.module.get_parameter(name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_trained(lens.module, trained, tmp_path / "delta", facts={"method": "ceft"})
    save_merged(lens, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    untuned, _ = base.run_with_cache(TEXTS)
    opened = MoELens.from_pretrained(base.module, tokenizer, delta=tmp_path / "delta")
    for name, value in opened.module.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    expected, _ = opened.run_with_cache(TEXTS)
    found, _ = MoELens.from_pretrained(plain, tokenizer).run_with_cache(TEXTS)
    assert torch.equal(found, expected)
    assert not torch.allclose(expected, untuned, atol=1e-3)


def test_what_was_there_stays_until_all_is_written_and_errors_name_the_folder(tokenizer, tmp_path):
    lens = fresh(tokenizer)
    save_merged(lens, tmp_path / "merged")
    before = load_file(tmp_path / "merged" / "model.safetensors")
    with TuneRouters().attached(lens) as trained, torch.no_grad():
        lens.module.get_parameter(trained.names[0]).neg_()
    (tmp_path / "file").write_text("")
    with pytest.raises(MoELensError, match=r"cannot write the model to .*file/merged"):
        save_merged(lens, tmp_path / "file" / "merged")
    save_merged(lens, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == list(trained.names[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "merged"]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"temperature": 0.6}, ["temperature=0.6"]),
        ({"temperature": 0.6, "top_p": 0.9, "num_beams": 3}, ["temperature=0.6", "top_p=0.9"]),
        ({"do_sample": True, "temperature": 0.6}, []),
        ({"num_return_sequences": 3}, ["num_return_sequences=3"]),
        ({"repetition_penalty": 1.2}, []),
    ],
    ids=str,
)
def test_a_generation_config_that_contradicts_itself_is_left_out_as_far_as_it_does(
    tokenizer, tmp_path, settings, left, recwarn
):
    lens = fresh(tokenizer)
    for name, value in settings.items():
        setattr(lens.module.generation_config, name, value)
    before = lens.module.generation_config.to_dict()
    save_merged(lens, tmp_path / "merged")
    told = [text for one in recwarn if "contradicts itself" in (text := str(one.message))]
    assert len(told) == bool(left)
    assert all(one in told[0] for one in left)
    assert lens.module.generation_config.to_dict() == before
    kept = GenerationConfig.from_pretrained(tmp_path / "merged").to_dict()
    gone = [one.partition("=")[0] for one in left]
    assert {name: kept[name] for name in settings} == {
        name: None if name in gone else value for name, value in settings.items()
    }
    assert kept["eos_token_id"] == before["eos_token_id"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
