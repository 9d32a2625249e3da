"""The logit lens and single experts' outputs, against the model's own logits and sums."""

import pytest
import torch
from conftest import build_model
from torch.testing import assert_close

from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.errors import MoELensError
from moe_lens.lens import MoELens, Zero

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]


def test_at_the_last_layer_the_logit_lens_gives_the_models_logits(lens):
    logits, record = lens.run_with_cache(TEXTS, capture=("residual",))
    last = record.residual[lens.architecture.n_layers - 1]
    assert_close(lens.project_on_vocab(last), logits)
    assert_close(lens.project_on_vocab(last[1, 2]), logits[1, 2])
    assert not torch.allclose(lens.project_on_vocab(record.residual[0]), logits, atol=1e-2)


def test_the_logit_lens_leaves_the_model_as_it_was(olmoe):
    layers = olmoe.module.model.layers
    before, _ = olmoe.run_with_cache(TEXTS)
    with pytest.raises(MoELensError, match=r"\[..., 32\]; got \[2, 5\]"):
        olmoe.project_on_vocab(torch.zeros(2, 5))
    assert olmoe.module.model.layers is layers
    assert torch.equal(olmoe.run_with_cache(TEXTS)[0], before)


def test_gradients_pass_the_logit_lens(olmoe):
    residual = torch.randn(3, olmoe.architecture.d_model, requires_grad=True)
    olmoe.project_on_vocab(residual)[:, 7].sum().backward()
    expected = torch.randn(3, olmoe.architecture.d_model, requires_grad=True)
    expected.data.copy_(residual.data)
    olmoe.module.lm_head(olmoe.module.model.norm(expected))[:, 7].sum().backward()
    assert_close(residual.grad, expected.grad)


def test_it_is_verified_once_by_each_lens(tokenizer):
    module, passes = build_model("olmoe", len(tokenizer)), []
    residual = torch.randn(4, module.config.hidden_size)
    module.register_forward_pre_hook(lambda *call: passes.append(1))
    for _ in range(2):
        lens = MoELens(module, tokenizer)
        for expected in (3, 1, 1):  # with both passes of the verification, then without
            passes.clear()
            lens.project_on_vocab(residual)
            assert len(passes) == expected


def test_a_model_that_reads_more_than_its_last_layer_is_refused_each_time():
    lens = MoELens(tiny_model("inkling2_text"), tiny_tokenizer())
    for _ in range(2):
        with pytest.raises(MoELensError, match="depend on more than its last layer's output"):
            lens.project_on_vocab(torch.zeros(4, lens.architecture.d_model))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_weighted_outputs_of_single_experts_sum_to_the_experts_output(lens, masked, most_used_experts):
    seen = {}
    sites = lens.architecture.moe
    with lens.intervene(*([Zero(most_used_experts)] if masked else [])), torch.no_grad(), lens.model.trace(TEXTS):
        for site in sites:
            weights, outputs = lens.gating_weights[site.layer], lens.expert_outputs[site.layer]
            whole = lens.model.get(site.experts).output
            seen[site.layer] = torch.einsum("bpk,bpkd->bpd", weights, outputs).save(), whole.save()
    for summed, whole in seen.values():
        assert_close(summed, whole.view(summed.shape))


def test_recorded_outputs_of_experts_are_those_at_the_kept_positions(lens):
    capture = ("routing", "expert_outputs")
    [whole] = lens.records(TEXTS, capture=capture, positions="all", progress=False)
    [last] = lens.records(TEXTS, capture=capture, positions="last", progress=False)
    assert tuple(last.expert_outputs) == lens.architecture.moe_layers
    for layer, outputs in last.expert_outputs.items():
        k, d_model = lens.architecture.top_k, lens.architecture.d_model
        assert outputs.shape == (3, 1, k, d_model)
        assert_close(outputs, whole.expert_outputs[layer][:, last.kept])
        assert torch.equal(last.routing[layer].indices, whole.routing[layer].indices)
