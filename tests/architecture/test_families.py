"""Every MoE family of the installed transformers is found, and each check passes or is refused for its reason."""

import gc
import re

import pytest
import torch

from moe_lens.architecture import MoEArchitecture, Moment
from moe_lens.architecture.tiny import FAMILIES, tiny_model, tiny_tokenizer
from moe_lens.checks import CHECKS, run_checks
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import CAPTURES, MoELens, Zero

TEXTS = ["the cat sat on", "a dog slept in the sun", "xy"]
#: What of a family cannot be opened, and why.
NOT_OPENED = {
    "diffusion_gemma": "expected all experts in one list of decoder layers",
    "doge": "finds its experts by product keys",
}
#: Why those that select in another way than by a top-k cannot select otherwise.
FIXED = {"force": "cannot be replaced: {}", "top_k": "1 instead of 2 experts: {}", "replay": "cannot be replaced: {}"}
#: What is refused of a family that can be opened, and why. All else passes.
REFUSED = {
    "dbrx": {name: why.format("the block around") for name, why in FIXED.items()},
    "deepseek_v4": {name: why.format("it selects experts by a fixed table") for name, why in FIXED.items()},
    "inkling2_text": {"logit_lens": "depend on more than its last layer's output"},
    "jetmoe": {"top_k": "experts get tokens that are sorted by expert"},
    "llama4_text": {"expert_outputs": "gating weights scale the experts' inputs", "top_k": "get scores of all tokens"},
    "longcat_flash": {"top_k": "its experts need 2 or more"},
    "phimoe": {name: why.format("it selects one expert after another") for name, why in FIXED.items()},
    "zaya": {"top_k": "its router can also skip the experts"},
}
#: Checks that the fast tests make of all families, in few passes; the slow ones of MODELS.md make every check of all.
FEW = ("capture", "weights_rule", "zero", "attention", "expert_outputs", "logit_lens")
#: One of each way of routing and of calling experts.
VARIED = ("deepseek_v3", "gpt_oss", "nemotron_h", "olmoe", "zaya")
#: What blocks multiply their experts' output by, and what modules they send it through, where they do.
SCALE_AFTER = {"beam": 2.5, "cohere2_moe": 0.5, "laguna": 2.5, "minimax_m3_vl_text": 2.0, "step3p7": 2.5}
PASSED_THROUGH = {"axk1": "post_mlp_layernorm", "muse_spark": "post_expert_proj"}
#: Whose shared experts are gated by a sigmoid, run before the router or, of one, between it and the routed experts, and
#: are scaled. Those of all others run last and are added as they are.
GATED = ("qwen2_moe", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text")
SHARED_FIRST = (*GATED, "ernie4_5_moe", "hunyuan_v1_moe", "laguna", "minimax_m3_vl_text", "step3p7")
SHARED_BETWEEN = "afmoe"
SHARED_SCALE = {"cohere2_moe": 0.5}
#: Whose own code in transformers multiplies float32 by bfloat16, which torch refuses.
NOT_IN_BFLOAT16 = ("inkling2_text",)
OPENED = [family for family in FAMILIES if family not in NOT_OPENED]


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Wrapped models hold themselves in circles, which are let go only when collected."""
    yield
    gc.collect()


def assert_as_expected(family: str, *, dtype: torch.dtype = torch.float32, implementation: str | None = None) -> None:
    """Each check of a tiny model passes, or is refused for the reason that is stated above."""
    model = tiny_model(family, dtype=dtype)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    lens = MoELens.from_pretrained(model, tiny_tokenizer())
    whole = implementation is None and family in VARIED
    table = run_checks(lens, TEXTS, names=None if whole else {*FEW, *REFUSED.get(family, ())})
    expected = {name: REFUSED.get(family, {}).get(name) for name in CHECKS}
    wrong = [
        row
        for row in table.itertuples()
        if row.outcome != ("refused" if expected[row.check] else "passed")
        or not re.search(expected[row.check] or "", row.detail)
    ]
    assert not wrong, "\n" + table.to_string()


@pytest.mark.parametrize("family", OPENED)
def test_each_check_passes_or_is_refused_for_its_reason(family):
    assert_as_expected(family)


@pytest.mark.parametrize("family", OPENED)
def test_models_on_the_meta_device_are_described_alike(family):
    model = tiny_model(family)
    found = MoEArchitecture.of(model)
    assert MoEArchitecture.of(model.to("meta")) == found
    for site in found.moe:
        assert site.scale_after == SCALE_AFTER.get(family, 1.0)
        block = site.experts.rpartition(".")[0]
        assert site.passed_through == ((f"{block}.{PASSED_THROUGH[family]}",) if family in PASSED_THROUGH else ())
        assert site.shared_gate == (f"{block}.shared_expert_gate" if family in GATED else None)
        assert site.shared_scale == (SHARED_SCALE.get(family, 1.0) if site.shared_experts else None)
        moments = {**dict.fromkeys(SHARED_FIRST, Moment.BEFORE_ROUTER), SHARED_BETWEEN: Moment.BEFORE_EXPERTS}
        assert site.shared_moment == moments.get(family, Moment.AFTER_EXPERTS)


@pytest.mark.parametrize("family", OPENED)
def test_without_any_routed_expert_a_block_gives_what_shared_experts_add(family):
    lens = MoELens(tiny_model(family), tiny_tokenizer())
    sharing = list(CAPTURES["shared_output"].layers(lens.architecture))
    assert bool(sharing) == bool(lens.architecture.n_shared_experts)
    for layer in sharing[-1:]:
        with lens.intervene(Zero(ExpertSet.of({layer: range(lens.architecture.n_experts)}))):
            _, record = lens.run_with_cache(TEXTS, capture=("shared_output", "moe_output"))
        expected = record.shared_output[layer]
        assert expected.abs().max() > 1e-3
        for path in lens.architecture.at(layer).passed_through:
            expected = lens.module.get_submodule(path)(expected)
        torch.testing.assert_close(record.moe_output[layer], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [*SCALE_AFTER, "deepseek_v3"])
def test_what_zeroed_experts_take_from_the_block_is_their_scaled_output(family):
    lens = MoELens.from_pretrained(tiny_model(family), tiny_tokenizer())
    layer = lens.architecture.moe_layers[0]
    whole = ("routing", "moe_output", "expert_outputs")
    _, record = lens.run_with_cache(TEXTS, capture=whole)
    with lens.intervene(Zero(ExpertSet.of({layer: range(lens.architecture.n_experts)}))):
        _, without = lens.run_with_cache(TEXTS, capture=whole)
    weights = record.routing[layer].weights * lens.architecture.at(layer).scale_after
    summed = torch.einsum("bpk,bpkd->bpd", weights, record.expert_outputs[layer])
    torch.testing.assert_close(record.moe_output[layer] - without.moe_output[layer], summed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", NOT_OPENED)
def test_a_model_that_cannot_be_read_is_refused_for_its_reason(family):
    with pytest.raises(MoELensError, match=NOT_OPENED[family]):
        MoELens.from_pretrained(tiny_model(family), tiny_tokenizer())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", VARIED)
def test_checks_of_varied_families_under_each_experts_implementation(family, implementation):
    assert_as_expected(family, implementation=implementation)


@pytest.mark.parametrize("family", VARIED)
def test_checks_of_varied_families_in_bfloat16(family):
    assert_as_expected(family, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("family", [family for family in OPENED if family not in VARIED])
def test_each_check_under_each_experts_implementation(family, implementation):
    assert_as_expected(family, implementation=implementation)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in OPENED if family not in (*VARIED, *NOT_IN_BFLOAT16)])
def test_each_check_in_bfloat16(family):
    assert_as_expected(family, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", NOT_IN_BFLOAT16)
def test_a_model_that_cannot_run_in_bfloat16_fails_without_the_lens_too(family):
    with pytest.raises(RuntimeError, match="same dtype"):
        tiny_model(family, dtype=torch.bfloat16)(input_ids=torch.tensor([[1, 2, 3]]))
