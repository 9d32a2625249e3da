"""Tiny random models of each router family, and a tiny byte-level tokenizer; nothing is downloaded."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from moe_lens.experts import ExpertSet
from moe_lens.lens import MoELens
from moe_lens.statistics import ExpertUsage

CORPUS = [
    "Based on the context below, output the correct answer for the following question.",
    "Context: The capital of Arland is Belmor. Question: What is the capital of Arland? Answer: Belmor",
    "The cat sat on the mat while the dog slept in the sun.",
]
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
}
FAMILIES = {
    "olmoe": {"num_experts": 8, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 1},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True, "head_dim": 8, "decoder_sparse_step": 1},
    "deepseek_v2": {"n_routed_experts": 16, "topk_method": "group_limited_greedy", **LATENT_ATTENTION},
    "deepseek_v3": {"n_routed_experts": 16, "norm_topk_prob": True, **LATENT_ATTENTION},
}
SELECTION_BIAS_FAMILIES = ("deepseek_v3",)


def build_model(family: str, vocab_size: int, **changes: object) -> torch.nn.Module:
    """A tiny model of `family` with random weights, large enough that every mechanism shows in the logits."""
    settings = SIZE | FAMILIES.get(family, {}) | {"vocab_size": vocab_size} | changes
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def left_padded(lens: MoELens, texts: list[str]) -> dict[str, torch.Tensor]:
    """What a bare model takes for these texts: ids, mask, and positions counted from each first token."""
    rows = [lens.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    pad = lens.tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}


def most_used(lens: MoELens, texts: list[str], *, size: int) -> ExpertSet:
    """The experts of each layer that these texts use most, so that masking them must show."""
    [usage] = lens.measure(texts, ExpertUsage(), progress=False)
    return ExpertSet.top(usage.table(), size)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def lenses(tokenizer: PreTrainedTokenizerFast) -> dict[str, MoELens]:
    return {name: MoELens.from_pretrained(build_model(name, len(tokenizer)), tokenizer) for name in FAMILIES}


@pytest.fixture
def lens(lenses: dict[str, MoELens], family: str) -> MoELens:
    """A lens on each family in turn; tests that change its weights put them back."""
    return lenses[family]


@pytest.fixture
def olmoe(lenses: dict[str, MoELens]) -> MoELens:
    return lenses["olmoe"]


@pytest.fixture
def most_used_experts(lens: MoELens) -> ExpertSet:
    """The two most used experts of each layer on the fixed corpus."""
    return most_used(lens, CORPUS, size=2)
