"""Folders with small models that bring their own code, for tests of remote code."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from moe_lens.architecture.remote_code import prepare_remote

CODE = Path(__file__).parent / "remote"
KINDS = {
    "summed": {"block": "summed", "tie_word_embeddings": True},
    "not_renormalized": {
        "block": "summed",
        "renormalize": False,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
    },
    "choosing": {
        "block": "choosing",
        "n_shared": 2,
        "groups": 4,
        "routed_scaling_factor": 2.5,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": False,
    },
}


def remote_folder(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: dict) -> Path:
    """A checkpoint as a hub repository has it: config.json with its auto_map, code, tokenizer and random weights."""
    folder.mkdir()
    for file in CODE.glob("*.py"):
        shutil.copy(file, folder)
    config = {
        "model_type": "listed_experts",
        "architectures": ["ListedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_listed.ListedConfig",
            "AutoModelForCausalLM": "modeling_listed.ListedForCausalLM",
        },
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    with_weights = build(folder)
    with_weights.save_pretrained(folder)
    return folder


def build(folder: Path, **changes: object) -> torch.nn.Module:
    """The model of a folder's code with random weights; on the current default device."""
    with prepare_remote(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True, **changes)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
