"""Models whose parts accelerate keeps on the CPU and on a disk: opened, read and changed as if they were in memory."""

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from moe_lens import ExpertSet, MoELens, MoELensError, Zero
from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.checks import PROMPTS, run_checks
from moe_lens.lens import CAPTURES

TEXTS = ["hello there you", "a"]
PRELOADED = {"dbrx": ["DbrxExperts"]}  # whose code reads the weights of a module that it does not call


def on_disk(model: nn.Module, folder, family: str, first: str = "cpu") -> nn.Module:
    """The model with all layers but the first on a disk; first: where what comes before the layers is."""
    layers = MoEArchitecture.of(model).layers
    parent = layers[0].rpartition(".")[0].rpartition(".")[0]
    parts = [f"{parent}.{name}" for name, child in model.get_submodule(parent).named_children()]
    parts = [part for part in parts if not layers[0].startswith(f"{part}.")]
    device_map = dict.fromkeys([*parts, "lm_head"], "cpu") | dict.fromkeys(layers[1:], "disk") | {layers[0]: "cpu"}
    device_map |= {part: first for part in parts if "embed" in part}
    return dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, preload_module_classes=PRELOADED.get(family)
    )


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "dbrx"])
def test_a_model_on_a_disk_opens_and_says_what_it_says_in_memory(family, tmp_path):
    """Also where a router's own children hold its weights, which are fetched when these are called."""
    whole = MoELens(tiny_model(family), tiny_tokenizer())
    lens = MoELens(on_disk(tiny_model(family), tmp_path, family), tiny_tokenizer())
    assert lens.architecture == whole.architecture
    capture = set(CAPTURES) - {"shared_output"}
    (expected, there), (logits, record) = (one.run_with_cache(TEXTS, capture=capture) for one in (whole, lens))
    assert torch.equal(logits, expected)
    for name in capture - {"routing", "logits"}:
        for layer, value in there.captured[name].items():
            assert torch.equal(record.captured[name][layer], value)
    masked = Zero(ExpertSet.of({lens.architecture.moe_layers[-1]: [0, 1, 2, 3]}))
    with whole.intervene(masked), lens.intervene(masked):
        changed, found = (one.run_with_cache(TEXTS)[0] for one in (whole, lens))
    assert torch.equal(found, changed)
    assert not torch.equal(found, logits)


def test_checks_that_change_weights_say_that_these_are_on_a_disk(tmp_path):
    lens = MoELens(on_disk(tiny_model("olmoe"), tmp_path, "olmoe"), tiny_tokenizer())
    table = run_checks(lens, PROMPTS, names=["capture", "zero", "reroute"]).set_index("check")
    assert table["outcome"].to_dict() == {"capture": "passed", "zero": "refused", "reroute": "refused"}
    assert table.loc[["zero", "reroute"], "detail"].str.contains("moved out of memory by device_map").all()


def test_a_model_whose_embeddings_are_on_a_disk_is_refused(tmp_path):
    model = on_disk(tiny_model("olmoe"), tmp_path, "olmoe", first="disk")
    with pytest.raises(MoELensError, match="takes the tokens, was moved out of memory"):
        MoELens(model, tiny_tokenizer())
