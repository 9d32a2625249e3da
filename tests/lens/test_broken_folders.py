"""Folders of models with files that are cut, pointers, or say what makes no sense: refused by what is wrong."""

import json
import shutil

import pytest

from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model.safetensors", lambda whole: whole[: len(whole) // 2], r"model\.safetensors is cut short or damaged"),
        ("model.safetensors", lambda _: b"", r"model\.safetensors is cut short or damaged"),
        ("model.safetensors", lambda _: POINTER, r"model\.safetensors is a Git LFS pointer .* `git lfs pull`"),
        ("tokenizer.json", lambda _: POINTER, r"tokenizer\.json is a Git LFS pointer"),
        ("config.json", lambda _: b"[1]", r"config\.json is no JSON object"),
        ("generation_config.json", lambda _: b"[]", r"generation_config\.json is no JSON object"),
    ],
    ids=["cut", "empty", "pointer", "tokenizer", "config", "generation config"],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(folder, file, content, told):
    (folder / file).write_bytes(content((folder / file).read_bytes()))
    with pytest.raises(MoELensError, match=told):
        MoELens.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pad_token_id": 10**6}, "Padding_idx must be within"),
        ({"dtype": "zork"}, "no attribute 'zork'; correct what its config"),
        ({"num_experts_per_tok": "4"}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "selects no experts"),
        ({"num_attention_heads": 0}, "correct what its config"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(folder, settings, told):
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoELensError, match=told):
        MoELens.from_pretrained(folder)


@pytest.mark.parametrize("end", [-1, 2.0, "2", [[2]], 10**40], ids=str)
def test_ends_of_sequence_that_are_no_tokens_are_refused(olmoe, monkeypatch, end):
    monkeypatch.setattr(olmoe.module.generation_config, "eos_token_id", end)
    with pytest.raises(MoELensError, match="expected ids of tokens as eos_token_id"):
        olmoe.generate(["the cat"], max_new_tokens=1)


def test_a_model_without_a_generation_config_answers_and_stays_without(olmoe, monkeypatch):
    said = olmoe.generate(["the cat"], max_new_tokens=2)
    monkeypatch.setattr(olmoe.module, "generation_config", None)
    assert olmoe.generate(["the cat"], max_new_tokens=2) == said
    assert olmoe.module.generation_config is None


def test_what_is_no_tokenizer_is_refused(olmoe):
    with pytest.raises(MoELensError, match=r"expected a tokenizer of transformers, .* got a object"):
        MoELens.from_pretrained(olmoe.module, object())


def test_a_folder_that_is_missing_or_has_no_tokenizer_is_told_apart(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(MoELensError, match=r"no tokenizer at .*; pass tokenizer="):
        MoELens.from_pretrained(folder)
    with pytest.raises(MoELensError, match=r"^cannot load .*there is no such folder$"):
        MoELens.from_pretrained(folder / "nowhere")
