"""Discovery of MoE layers, on models with weights and on the meta device."""

import pytest
import torch
from conftest import FAMILIES, SIZE, build_model
from transformers import AutoModelForCausalLM, LlamaConfig

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.routing import ScoringRule

SCORING = {
    "olmoe": ScoringRule("softmax", renormalizes=False),
    "mixtral": ScoringRule("softmax", renormalizes=True),
    "qwen2_moe": ScoringRule("softmax", renormalizes=False),
    "qwen3_moe": ScoringRule("softmax", renormalizes=True),
    "deepseek_v2": ScoringRule("softmax", renormalizes=False, scale=2.5),
    "deepseek_v3": ScoringRule("sigmoid", renormalizes=True, scale=2.5),
}


def test_finds_sizes_and_scoring_of_each_family(lens, family):
    architecture = lens.architecture
    dense_first = family.startswith("deepseek")
    assert architecture.n_layers == SIZE["num_hidden_layers"]
    assert architecture.moe_layers == ((1, 2) if dense_first else (0, 1, 2))
    assert architecture.n_experts == (16 if dense_first else 8)
    assert architecture.top_k == SIZE["num_experts_per_tok"]
    assert architecture.d_model == lens.module.config.hidden_size
    shared = {"deepseek_v2": 2, "deepseek_v3": 2, "qwen2_moe": 1}
    assert architecture.n_shared_experts == shared.get(family, 0)
    assert architecture.scoring == SCORING[family]
    assert architecture.groups == ((4, 2) if dense_first else None)


def test_paths_lead_to_the_modules_they_name(lens):
    architecture, module = lens.architecture, lens.module
    assert module.get_submodule(architecture.head) is module.lm_head
    assert module.get_submodule(architecture.final_norm) is module.model.norm
    for layer, path in enumerate(architecture.attentions):
        assert module.get_submodule(path) is module.model.layers[layer].self_attn
    for site in architecture.moe:
        assert module.get_submodule(site.router) is module.model.layers[site.layer].mlp.gate
        assert module.get_submodule(site.experts) is module.model.layers[site.layer].mlp.experts


def test_a_model_on_the_meta_device_is_described_alike(lens, family, tokenizer):
    config = lens.module.config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert next(empty.parameters()).is_meta
    assert MoEArchitecture.of(empty) == lens.architecture


def test_description_reads_no_weight_and_leaves_random_numbers_alone(tokenizer):
    model = build_model("olmoe", len(tokenizer))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    MoEArchitecture.of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_greedy_deepseek_has_no_groups(tokenizer):
    model = build_model("deepseek_v2", len(tokenizer), topk_method="greedy")
    assert MoEArchitecture.of(model).groups is None


def test_refuses_a_dense_model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(MoELensError, match="LlamaForCausalLM has no MoE layers"):
        MoEArchitecture.of(AutoModelForCausalLM.from_config(config))


def test_refuses_a_model_without_a_head(lenses):
    with pytest.raises(MoELensError, match="no language-model head"):
        MoEArchitecture.of(lenses["olmoe"].module.model)


def test_refuses_a_router_whose_rule_is_unknown(tokenizer):
    model = build_model("olmoe", len(tokenizer))
    router = type(model.model.layers[0].mlp.gate)

    class CubedRouter(router):
        def forward(self, hidden_states):
            logits, weights, indices = super().forward(hidden_states)
            return logits, weights**3, indices

    for layer in model.model.layers:
        layer.mlp.gate.__class__ = CubedRouter
    with pytest.raises(MoELensError, match=r"layers.0.mlp.gate.*rule that is not known"):
        MoEArchitecture.of(model)


def test_refuses_a_router_that_needs_more_than_hidden_states(tokenizer):
    model = build_model("olmoe", len(tokenizer))

    class BiasedRouter(type(model.model.layers[0].mlp.gate)):
        def forward(self, hidden_states, bias):
            return super().forward(hidden_states + bias)

    for layer in model.model.layers:
        layer.mlp.gate.__class__ = BiasedRouter
    with pytest.raises(MoELensError, match=r"hidden states \[token, d_model\] alone.*'bias'"):
        MoEArchitecture.of(model)


def test_refuses_experts_without_a_router(tokenizer):
    model = build_model("olmoe", len(tokenizer))
    mlp = model.model.layers[1].mlp
    mlp.chooser = mlp.gate
    del mlp.gate
    with pytest.raises(MoELensError, match=r"no router beside them.*chooser"):
        MoEArchitecture.of(model)


def test_a_dense_layer_is_named_in_the_refusal(lenses):
    with pytest.raises(MoELensError, match=r"layer 0 has no routed experts; the MoE layers are \(1, 2\)"):
        lenses["deepseek_v3"].architecture.at(0)


def test_all_families_are_covered():
    assert set(SCORING) == set(FAMILIES)


def test_refuses_a_block_that_does_more_to_its_experts_output_than_scaling_it(tokenizer):
    model = build_model("olmoe", len(tokenizer))

    class Capped(type(model.model.layers[0].mlp)):
        def forward(self, hidden_states):
            return super().forward(hidden_states).tanh()

    for layer in model.model.layers:
        layer.mlp.__class__ = Capped
    with pytest.raises(MoELensError, match=r"layers.0.mlp' does more to its experts' output than scaling it"):
        MoEArchitecture.of(model)


def test_a_factor_behind_the_experts_is_seen_whatever_its_name(tokenizer):
    model = build_model("qwen2_moe", len(tokenizer))

    class Doubled(type(model.model.layers[0].mlp)):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    for layer in model.model.layers:
        layer.mlp.__class__ = Doubled
    assert [site.scale_after for site in MoEArchitecture.of(model).moe] == [2.0] * 3


def test_refuses_a_block_that_cannot_be_called_alone(tokenizer):
    model = build_model("olmoe", len(tokenizer))

    class Wanting(type(model.model.layers[0].mlp)):
        def forward(self, hidden_states, more):
            return super().forward(hidden_states + more)

    for layer in model.model.layers:
        layer.mlp.__class__ = Wanting
    with pytest.raises(MoELensError, match=r"layers.0.mlp' cannot be called with hidden states .*'more'"):
        MoEArchitecture.of(model)
