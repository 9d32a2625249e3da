"""Models with code of their own: asked for by name, made readable only where that is proven, saved as they were."""

import json
import sys

import pytest
import torch
from conftest import most_used
from remote_models import KINDS, build, remote_folder
from safetensors.torch import load_file

from moe_lens import evaluate, intervene
from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.listed import IndexedExperts, normalize, restore
from moe_lens.architecture.remote_code import load_remote
from moe_lens.commands import console
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions import Reroute, Zero
from moe_lens.lens.lens import MoELens
from moe_lens.lens.loading import load_model
from moe_lens.results import read_table
from moe_lens.routing import ScoringRule

pytestmark = pytest.mark.filterwarnings("ignore:The attention mask API")  # as old modeling files use it

TEXTS = ["the cat sat on the mat", "a dog", "Question: What is the capital of Arland?"]
RULES = {
    "summed": ScoringRule("softmax", renormalizes=True),
    "not_renormalized": ScoringRule("softmax", renormalizes=False, scale=2.5),
    "choosing": ScoringRule("sigmoid", renormalizes=True, scale=2.5),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("remote")
    return {kind: remote_folder(root / kind, tokenizer, settings) for kind, settings in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind):
    return folders[kind]


@pytest.fixture(scope="module")
def lenses_of(folders):
    return {kind: MoELens.from_pretrained(folder, trust_remote_code=True) for kind, folder in folders.items()}


@pytest.fixture
def lens(lenses_of, kind):
    return lenses_of[kind]


def inputs_of(tokenizer, texts=TEXTS):
    return dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))


def test_code_is_not_run_unless_asked_for_by_name(folder):
    with pytest.raises(MoELensError, match=r"trust_remote_code=True \(on a command line: --trust-remote-code\)"):
        MoELens.from_pretrained(folder)
    with pytest.raises(MoELensError, match="brings Python code of its own"):
        load_model(folder, dtype=None, device_map=None)


def test_names_of_transformers_4_are_there_only_while_loading(folders):
    import transformers.utils.import_utils as names

    load_remote(folders["summed"])
    assert not hasattr(names, "is_torch_fx_available")


def test_architecture_and_logits_are_those_of_the_original(folder, kind, lens, tokenizer):
    settings = KINDS[kind]
    assert lens.architecture.moe_layers == (0, 1, 2)
    assert (lens.architecture.n_experts, lens.architecture.top_k) == (8, settings.get("num_experts_per_tok", 2))
    assert lens.architecture.scoring == RULES[kind]
    assert (lens.architecture.moe[0].shared_experts is not None) == (kind == "choosing")
    original = load_remote(folder).eval()
    assert not any(isinstance(module, IndexedExperts) for module in original.modules())
    with torch.no_grad():
        for text in TEXTS:
            expected = original(**inputs_of(tokenizer, [text])).logits
            torch.testing.assert_close(lens.run_with_cache(text)[0], expected, rtol=1e-4, atol=1e-4)


def test_routing_is_what_the_experts_are_called_with(lens):
    _, record = lens.run_with_cache(TEXTS[0])
    seen = {}
    hooks = [
        lens.module.model.layers[layer]
        .mlp.experts[expert]
        .register_forward_hook(lambda *call, key=(layer, expert): seen.update({key: len(call[1][0])}))
        for layer in range(3)
        for expert in range(8)
    ]
    with torch.no_grad():
        lens.module(**inputs_of(lens.tokenizer, TEXTS[:1]))
    for hook in hooks:
        hook.remove()
    counted = {
        (layer, expert): count
        for layer, routing in record.routing.items()
        for expert, count in enumerate(routing.indices.flatten().bincount(minlength=8).tolist())
        if count
    }
    assert seen == counted


def test_zero_is_the_original_with_the_experts_last_weights_zero(folder, lens, tokenizer):
    experts = most_used(lens, TEXTS, size=2)
    original = load_remote(folder).eval()
    with torch.no_grad():
        for layer in experts.layers:
            for expert in experts[layer]:
                original.model.layers[layer].mlp.experts[expert].w2.weight.zero_()
        with lens.intervene(Zero(experts)):
            for text in TEXTS:
                logits, _ = lens.run_with_cache(text)
                expected = original(**inputs_of(tokenizer, [text])).logits
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
                unmasked = lens.module(**inputs_of(tokenizer, [text])).logits
                assert (logits - unmasked).abs().max() > 1e-2


def test_reroute_takes_the_best_of_the_other_experts(lens):
    experts = most_used(lens, TEXTS, size=1)
    with lens.intervene(Reroute(experts)):
        _, record = lens.run_with_cache(TEXTS)
    real = record.attention_mask.bool()
    for layer, routing in record.routing.items():
        assert not torch.isin(routing.indices[real], torch.tensor(experts[layer])).any()
        assert torch.isin(record.routing_before[layer].indices[real], torch.tensor(experts[layer])).any()
        before = record.routing_before[layer]
        kept = ~torch.isin(before.indices, torch.tensor(experts[layer])).any(-1) & real
        if layer == 0 and lens.architecture.groups is None:  # a group is judged by experts that are not chosen, too
            assert torch.equal(routing.indices[kept].sort(-1)[0], before.indices[kept].sort(-1)[0])


def test_masked_generation_equals_the_zeroed_original_token_by_token(folder, lens, tokenizer):
    experts = most_used(lens, TEXTS, size=2)
    original = load_remote(folder).eval()
    with torch.no_grad():
        for layer in experts.layers:
            for expert in experts[layer]:
                original.model.layers[layer].mlp.experts[expert].w2.weight.zero_()
        expected = []
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            for _ in range(6):
                ids.append(original(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
                if ids[-1] == 1:
                    break
            expected.append(tokenizer.decode(ids[len(tokenizer(text)["input_ids"]) :], skip_special_tokens=True))
    with lens.intervene(Zero(experts)):
        assert lens.generate(TEXTS, max_new_tokens=6, progress=False) == expected
        assert lens.generate(TEXTS, max_new_tokens=6, batch_size=1, progress=False) == expected


def test_gradients_reach_routers_and_experts(lens, folder):
    ids = inputs_of(lens.tokenizer, TEXTS[:1])
    original = load_remote(folder).eval()
    for module, reached in ((original, False), (lens.module, True)):
        module.zero_grad()
        module(**ids).logits.square().sum().backward()
        block = module.model.layers[2].mlp
        gradients = [p.grad for p in block.experts.parameters() if p.grad is not None and p.grad.any()]
        assert bool(gradients) == reached
    assert lens.module.model.layers[0].mlp.gate.weight.grad.any()
    lens.module.zero_grad()


def test_gradients_equal_finite_differences(folders):
    model = load_remote(folders["summed"], dtype=torch.float64).eval()
    normalize(model)
    block = model.model.layers[1].mlp
    hidden = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = block.gate.weight
    loss = block(hidden).square().sum()
    [gradient] = torch.autograd.grad(loss, [weight])
    direction, step = torch.randn_like(weight), 1e-4
    with torch.no_grad():
        weight += step * direction
        above = block(hidden).square().sum()
        weight -= 2 * step * direction
        below = block(hidden).square().sum()
    assert ((above - below) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-2)


def test_a_saved_model_has_its_original_layout(folder, lens, tmp_path):
    lens.module.save_pretrained(tmp_path / "saved")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["ListedForCausalLM"]


def test_restore_gives_the_classes_back(folder, tokenizer):
    model = load_remote(folder).eval()
    classes = [type(module) for module in model.modules()]
    ids = inputs_of(tokenizer)
    with torch.no_grad():
        expected = model(**ids).logits
        assert normalize(model) == tuple(f"model.layers.{i}.mlp" for i in range(3))
        assert normalize(model) == ()  # once is enough
        assert [type(module) for module in model.modules()] != classes
        restore(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(**ids).logits, expected)


def test_half_precision_is_recognised_too(folder, kind):
    model = load_remote(folder, dtype=torch.bfloat16).eval()
    normalize(model)
    assert MoEArchitecture.of(model).scoring == RULES[kind]


def test_on_the_meta_device_too(folder, kind):
    with torch.device("meta"):
        model = build(folder)
    normalize(model)
    assert MoEArchitecture.of(model).scoring == RULES[kind]


def test_a_rule_that_is_not_known_is_refused_and_the_model_left_alone(tmp_path, tokenizer):
    model = load_remote(remote_folder(tmp_path / "unknown", tokenizer, {**KINDS["summed"], "block": "unknown"}))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(MoELensError, match=r"no known ways of routing reproduce the output of 'model.layers.0.mlp'"):
        normalize(model)
    assert [type(module) for module in model.modules()] == classes


def test_one_odd_layer_refuses_the_whole_model(folders):
    model = load_remote(folders["not_renormalized"])
    model.model.layers[2].mlp.infer = lambda x, chosen, weights: torch.ones_like(x)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(MoELensError, match=r"model.layers.2.mlp"):
        normalize(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_package_that_the_code_needs_is_named(tmp_path, tokenizer):
    folder = remote_folder(tmp_path / "needing", tokenizer, KINDS["summed"])
    file = folder / "modeling_listed.py"
    file.write_text("import package_of_nowhere\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(MoELensError, match=r"needs a package that is not installed: .*package_of_nowhere"):
        load_model(folder, dtype=None, device_map=None, trust_remote_code=True)


class WithIds(torch.nn.Module):
    """Put before a block's class: a forward pass that needs token ids."""

    def forward(self, hidden_states, input_ids):
        return super().forward(hidden_states)


class WithoutLogits(torch.nn.Module):
    """Put before a block's class: router logits beside the output, none of them a number."""

    def forward(self, hidden_states):
        logits = torch.full((hidden_states.shape[:-1].numel(), len(self.experts)), torch.nan)
        return super().forward(hidden_states), logits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (WithIds, r"'model.layers.1.mlp' cannot be called .*TypeError.*input_ids"),
        (WithoutLogits, r"'model.layers.1.mlp' is not reproduced: relative error nan"),
    ],
)
def test_a_block_that_crashes_or_cannot_be_compared_is_refused_and_the_model_left_alone(folders, change, said):
    model = load_remote(folders["summed"])
    block = model.model.layers[1].mlp
    block.__class__ = type("Changed", (change, type(block)), {})
    classes = [type(module) for module in model.modules()]
    with pytest.raises(MoELensError, match=said):
        normalize(model)
    assert [type(module) for module in model.modules()] == classes


def test_an_interrupted_normalization_leaves_the_model_alone(folders, monkeypatch):
    model = load_remote(folders["summed"])
    classes = [type(module) for module in model.modules()]

    def interrupted(*call):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_lens.architecture.listed.normalizing.check_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        normalize(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_command_line_names_the_option(folder, tmp_path, monkeypatch, capsys):
    line = f"intervene --model {folder} --data swap --experts 0:1 --out {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as end:
        console.run(intervene.main)
    assert end.value.code == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_evaluation_runs_the_code_only_when_asked(folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"context": "a cat sat", "question": "who sat?", "answer": "a cat"}]))
    line = f"evaluate --model {folder} --data {data} --max-new-tokens 2 --out {tmp_path / 'out'}".split()
    for asked, code in (([], 2), (["--trust-remote-code"], 0)):
        monkeypatch.setattr(sys, "argv", line + asked)
        with pytest.raises(SystemExit) as end:
            console.run(evaluate.main)
        assert end.value.code == code
    assert "--trust-remote-code" in capsys.readouterr().err
    assert len(read_table(tmp_path / "out" / "answers.parquet")) == 1
