"""Parameter counts: the published sizes of the paper's models (its Table 7), found on the meta device."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_lens.architecture import MoEArchitecture
from moe_lens.sizes import parameter_counts

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses" / "benchmarks"))
import paper_models

MODELS = [
    model for model in vars(paper_models).values() if isinstance(model, paper_models.PaperModel) and model.model_type
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_papers_models_have_their_published_sizes(model):
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model.model_type](**model.settings))
    counts = parameter_counts(module)
    architecture = MoEArchitecture.of(module)
    assert (architecture.top_k, architecture.n_experts) == (model.top_k, model.n_experts)
    assert round(counts.total / 1e9, 1) == model.total
    # DeepSeek leaves out the embedding, of which a token uses one row, and tells 2.45 as 2.4.
    without_embedding = counts.activated - counts.embedding if model.model_type == "deepseek_v2" else counts.activated
    assert without_embedding / 1e9 == pytest.approx(model.activated, abs=0.06)


def test_a_token_leaves_idle_all_experts_but_its_own(olmoe):
    counts = parameter_counts(olmoe.module)
    experts = olmoe.module.model.layers[0].mlp.experts
    of_one = experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()
    idle = len(olmoe.architecture.moe_layers) * (olmoe.architecture.n_experts - olmoe.architecture.top_k) * of_one
    assert counts.total - counts.activated == idle
    assert counts.total == sum(parameter.numel() for parameter in olmoe.module.parameters())
