"""Configuration of the small models with listed experts that the tests load as remote code."""

from transformers import PretrainedConfig


class ListedConfig(PretrainedConfig):
    model_type = "listed_experts"

    def __init__(
        self, vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, inner=16, num_experts=8,
        num_experts_per_tok=2, block="summed", renormalize=True, routed_scaling_factor=1.0, n_shared=0, groups=1,
        **other,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.inner = vocab_size, hidden_size, inner
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_experts, self.num_experts_per_tok, self.groups = num_experts, num_experts_per_tok, groups
        self.block, self.renormalize, self.n_shared = block, renormalize, n_shared
        self.routed_scaling_factor = routed_scaling_factor
        super().__init__(**other)
