"""The models of the paper's Table 7 at their published configurations, and what the table says of them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class PaperModel:
    """A model of Table 7.

    hub: its id, of the variant that the paper uses. model_type: of transformers. settings: of its configuration.
    activated, total: billions of parameters, as the table has them. top_k, n_experts: likewise.
    without_embedding: which of "total" and "activated" the table gives without the embedding.
    own_code: whether it ships with code of its own, so that `model_type` is another with the same parts.
    """

    name: str
    hub: str
    model_type: str
    settings: dict[str, Any]
    activated: float
    total: float
    top_k: int
    n_experts: int
    without_embedding: tuple[str, ...] = ()
    own_code: bool = False

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device, without weights."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[self.model_type](**self.settings))
        return model


OLMOE = PaperModel(
    name="OLMoE-1B-7B",
    hub="allenai/OLMoE-1B-7B-0924-Instruct",
    model_type="olmoe",
    settings={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    activated=1.3,
    total=6.9,
    top_k=8,
    n_experts=64,
)
DEEPSEEK_V2_LITE = PaperModel(
    name="DeepSeek-V2-Lite",
    hub="deepseek-ai/DeepSeek-V2-Lite-Chat",
    model_type="deepseek_v2",
    settings={
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
    },
    activated=2.4,
    total=15.7,
    top_k=6,
    n_experts=64,
    without_embedding=("activated",),
)
MINICPM_MOE = PaperModel(
    name="MiniCPM-MoE-8x2B",
    hub="openbmb/MiniCPM-MoE-8x2B",
    model_type="mixtral",
    settings={
        "vocab_size": 122753,
        "hidden_size": 2304,
        "intermediate_size": 5760,
        "num_hidden_layers": 40,
        "num_attention_heads": 36,
        "num_key_value_heads": 36,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    },
    activated=4.0,
    total=13.6,
    top_k=2,
    n_experts=8,
    without_embedding=("total", "activated"),
    own_code=True,
)
MIXTRAL = PaperModel(
    name="Mixtral-8x7B",
    hub="mistralai/Mixtral-8x7B-Instruct-v0.1",
    model_type="mixtral",
    settings={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    activated=12.9,
    total=46.7,
    top_k=2,
    n_experts=8,
)

PAPER_MODELS = (OLMOE, DEEPSEEK_V2_LITE, MINICPM_MOE, MIXTRAL)
"""In the order of the table."""
