"""Parameter counts: the published sizes of the paper's models (its Table 7), found on the meta device."""

import pytest
import torch
from remote_models import KINDS, build, remote_folder

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.listed import normalize
from moe_lens.architecture.paper_models import DEEPSEEK_V2_LITE, MINICPM_MOE, PAPER_MODELS
from moe_lens.architecture.sizes import parameter_counts


@pytest.mark.parametrize("model", PAPER_MODELS, ids=lambda model: model.name)
def test_the_papers_models_have_their_published_sizes(model):
    module = model.skeleton()
    counts = parameter_counts(module)
    architecture = MoEArchitecture.of(module)
    assert (architecture.top_k, architecture.n_experts) == (model.top_k, model.n_experts)
    total, activated = (
        (count - counts.embedding if name in model.without_embedding else count) / 1e9
        for name, count in (("total", counts.total), ("activated", counts.activated))
    )
    assert round(total, 1) == model.total
    assert activated == pytest.approx(model.activated, abs=0.06)  # one of them tells 2.45 as 2.4
    assert architecture.n_shared_experts == (2 if model is DEEPSEEK_V2_LITE else 0)


@pytest.mark.slow
def test_the_model_with_code_of_its_own_is_found_at_its_real_size_among_listed_experts(tmp_path, tokenizer):
    [real] = [model for model in PAPER_MODELS if model.own_code]
    assert real is MINICPM_MOE
    names = {"num_local_experts": "num_experts", "intermediate_size": "inner"}
    settings = {names.get(name, name): value for name, value in real.settings.items()}
    folder = remote_folder(tmp_path / "own", tokenizer, KINDS["summed"])  # code and a small model
    with torch.device("meta"):
        module = build(folder, **settings)
    normalize(module)
    architecture, counts = MoEArchitecture.of(module), parameter_counts(module)
    assert architecture.moe_layers == tuple(range(40))
    assert (architecture.n_experts, architecture.top_k, architecture.d_model) == (8, 2, 2304)
    assert (architecture.scoring.score, architecture.renormalizes) == ("softmax", True)
    same = parameter_counts(real.skeleton())
    positions = module.model.positions.weight.numel()  # learned here, rotary there
    assert (counts.total - positions, counts.activated - positions) == (same.total, same.activated)
    assert (counts.embedding, counts.head) == (same.embedding, 0)


def test_a_token_leaves_idle_all_experts_but_its_own(olmoe):
    counts = parameter_counts(olmoe.module)
    experts = olmoe.module.model.layers[0].mlp.experts
    of_one = experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()
    idle = len(olmoe.architecture.moe_layers) * (olmoe.architecture.n_experts - olmoe.architecture.top_k) * of_one
    assert counts.total - counts.activated == idle
    assert counts.total == sum(parameter.numel() for parameter in olmoe.module.parameters())
