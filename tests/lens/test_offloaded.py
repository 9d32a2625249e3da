"""Models of which a device_map keeps layers on a disk: measured as whole ones, digested, or refused before the work."""

import pytest
import torch
from conftest import build_model
from transformers import AutoModelForCausalLM

from moe_lens.causal import evaluate
from moe_lens.checks import run_checks
from moe_lens.data import Example
from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import apply_delta, fingerprint, save_delta, weights_digest
from moe_lens.lens.interventions import Zero
from moe_lens.lens.lens import MoELens
from moe_lens.statistics.weights import weight_similarity

EXAMPLES = [Example(str(n), f"c{n}", "q", ("c",)) for n in range(3)]
PARTS = ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")


def offloaded(whole, folder):
    """The same model with its first layer on a disk."""
    whole.save_pretrained(folder / "model")
    where = dict.fromkeys(PARTS, "cpu") | {f"model.layers.{i}": "cpu" if i else "disk" for i in range(3)}
    module = AutoModelForCausalLM.from_pretrained(folder / "model", device_map=where, offload_folder=folder / "away")
    assert module.model.layers[0].mlp.experts.down_proj.is_meta
    return module


@pytest.fixture(scope="module")
def lenses(tokenizer, tmp_path_factory):
    """A whole model, and the same with its first layer on a disk."""
    whole = build_model("mixtral", len(tokenizer))
    return MoELens(whole, tokenizer), MoELens(offloaded(whole, tmp_path_factory.mktemp("offloaded")), tokenizer)


def test_an_offloaded_model_has_the_digest_of_the_whole_one(lenses):
    whole, away = lenses
    assert weights_digest(away.module) == weights_digest(whole.module)


def test_an_offloaded_model_is_evaluated_and_masked_as_the_whole_one(lenses, tmp_path):
    masks = {"masked": Zero(ExpertSet.of({0: [0, 1, 2]}))}
    options = {"max_new_tokens": 3, "progress": False}
    expected, found = (
        evaluate(lens, EXAMPLES, masks, out=tmp_path / name, **options)
        for lens, name in zip(lenses, ("whole", "away"), strict=True)
    )
    assert found.answers.equals(expected.answers)


def test_a_weight_on_the_disk_that_is_not_finite_is_named(tokenizer, tmp_path):
    whole = build_model("mixtral", len(tokenizer))
    with torch.no_grad():
        whole.model.layers[0].mlp.experts.down_proj[:] = float("nan")
    lens = MoELens(offloaded(whole, tmp_path), tokenizer)
    with pytest.raises(NotFiniteError, match=r"NaN or infinity stands in model\.layers\.0\.mlp\.experts\.down_proj:"):
        lens.generate(EXAMPLES, max_new_tokens=1, progress=False)


def test_what_needs_weights_in_memory_is_refused_before_the_work(lenses, tmp_path):
    whole, away = lenses
    name = "model.layers.0.mlp.gate.weight"
    save_delta(whole.module, [name], tmp_path, facts={}, fingerprint=fingerprint(whole.module, [name]))
    with pytest.raises(MoELensError, match=rf"{name} was moved out of memory by device_map, and a delta changes it"):
        apply_delta(away.module, tmp_path)
    with pytest.raises(MoELensError, match="moved out of memory by device_map, and it is compared"):
        weight_similarity(away)
    table = run_checks(away, ["c0", "c1 q"], names=["zero", "reroute", "renormalize"]).set_index("check")
    assert table["outcome"].to_dict() == {"zero": "refused", "renormalize": "passed", "reroute": "refused"}
    assert "moved out of memory" in table.loc["zero", "detail"]


def test_a_model_without_any_weights_has_no_digest(lenses):
    module = build_model("mixtral", 320).to("meta")
    with pytest.raises(MoELensError, match="is on the meta device and has no values"):
        weights_digest(module)
