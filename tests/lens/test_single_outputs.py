"""Single experts' outputs from the model's own run: those of a second call, and the run is as if nobody looked."""

import pytest
import torch
from conftest import build_model
from torch import nn
from torch.testing import assert_close

from moe_lens import ExpertSet, MoELens, load_examples
from moe_lens.lens.interventions import Patch, Run, Zero
from moe_lens.lens.single_outputs import ALL_EXPERTS_FUNCTIONS, IMPLEMENTATIONS, SingleOutputs

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often experts run by each implementation."""
    counts = dict.fromkeys(IMPLEMENTATIONS, 0)

    def counting(name, implementation):
        def run(*args, **kwargs):
            counts[name] += 1
            return implementation(*args, **kwargs)

        return run

    for name in IMPLEMENTATIONS:
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, name, counting(name, ALL_EXPERTS_FUNCTIONS[name]))
    return counts


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_one_run_gives_what_a_second_call_of_each_expert_gives(
    tokenizer, monkeypatch, calls, implementation, positions
):
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer, progress=False)
    lens.module.set_experts_implementation(implementation)
    ask = {"capture": ("routing", "expert_outputs", "logits"), "positions": positions, "batch_size": 3}
    with lens.intervene(Zero(ExpertSet.of({1: [0, 2]}))):  # weights of 0 show nothing in the sum
        [once] = lens.records(TEXTS, **ask)
        assert calls[implementation] == len(lens.architecture.moe_layers)
        monkeypatch.setattr(SingleOutputs, "of", lambda *_: None)
        [twice] = lens.records(TEXTS, **ask)
    assert calls[implementation] == 3 * len(lens.architecture.moe_layers)
    assert torch.equal(once.logits, twice.logits)
    for layer, outputs in once.expert_outputs.items():
        assert_close(outputs, twice.expert_outputs[layer], rtol=1e-5, atol=1e-5)
        assert once.expert_outputs[layer].abs().amin((-1, -2)).min() > 0


def test_a_patch_of_expert_outputs_needs_no_second_run_of_the_experts(olmoe, calls):
    examples = load_examples("swap", limit=3)
    layers = len(olmoe.architecture.moe_layers)
    own = Patch(Run(olmoe, examples), what="expert_outputs", layers=[1])
    [plain] = olmoe.records(examples, capture=("logits",), progress=False)
    with olmoe.intervene(own):
        [patched] = olmoe.records(examples, capture=("logits",), progress=False)
    assert calls["grouped_mm"] == 3 * layers, "the plain run's, the source's and the patched one's"
    assert torch.equal(plain.logits, patched.logits), "these are its own values"


def test_the_implementations_are_the_librarys_again_after_an_error(olmoe):
    before = {name: ALL_EXPERTS_FUNCTIONS[name] for name in IMPLEMENTATIONS}
    experts = olmoe.module.get_submodule(olmoe.architecture.at(0).experts)
    single = SingleOutputs()

    def fail() -> None:
        with single.watching([experts]), single.watching([nn.Linear(1, 1)]):
            assert single.watches(experts)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not single.watches(experts)
    assert {name: ALL_EXPERTS_FUNCTIONS[name] for name in IMPLEMENTATIONS} == before
