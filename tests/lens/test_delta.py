"""Delta checkpoints: exact on their own base, refused on any other."""

import ast
import copy
import json
import shutil
import warnings

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file

from moe_lens import ExpertSet
from moe_lens.data import FIGURE_10, TEMPLATES, PromptTemplate
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import (
    FACTS_FILE,
    TENSORS_FILE,
    apply_delta,
    fingerprint,
    read_facts,
    restored,
    save_delta,
    weights_digest,
    with_delta,
)
from moe_lens.lens.lens import MoELens
from moe_lens.storage import write_sealed_json
from moe_lens.tuning import TuneExperts, save_trained

TEXTS = ["the cat sat", "a dog"]


@pytest.fixture
def base(tokenizer):
    return build_model("olmoe", len(tokenizer))


@pytest.fixture
def names(base):
    return [name for name, _ in base.named_parameters() if ".gate." in name]


@pytest.fixture
def tuned(base, names):
    """The base with other router weights."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(0.5)
    return model


@pytest.fixture
def folder(base, tuned, names, tmp_path):
    facts = {"method": "router", "model": "tiny", "seed": 3}
    save_delta(tuned, names, tmp_path / "delta", facts=facts, fingerprint=fingerprint(base, names))
    return tmp_path / "delta"


def test_the_base_with_the_delta_is_the_tuned_model_bit_for_bit(base, tuned, folder, tokenizer):
    facts = apply_delta(base, folder)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))
    assert (facts["method"], facts["model"], facts["seed"]) == ("router", "tiny", 3)


def test_a_lens_opens_with_a_delta(base, tuned, folder, tokenizer):
    lens = MoELens.from_pretrained(base, tokenizer, delta=folder)
    expected, _ = MoELens(tuned, tokenizer).run_with_cache(TEXTS)
    assert torch.equal(lens.run_with_cache(TEXTS)[0], expected)


def test_a_delta_opened_under_another_template_warns(base, tuned, names, tokenizer, tmp_path):
    own = PromptTemplate("{context}\n\n{question}", "{question}", "\n=")
    used = {"plain": {"template": TEMPLATES["plain"].facts()}, "own": {"template": own.facts()}, "untold": {}}
    for folder, facts in used.items():
        save_delta(tuned, names, tmp_path / folder, facts=facts, fingerprint=fingerprint(base, names))

    def opened(folder, **asked):
        return MoELens.from_pretrained(copy.deepcopy(base), tokenizer, delta=tmp_path / folder, **asked)

    with pytest.warns(UserWarning, match=r"another template .*template=PromptTemplate\(\*\*(\{.*\})\)") as seen:
        opened("own")
    [warning] = seen
    told = str(warning.message).partition("PromptTemplate(**")[2].removesuffix(")")
    assert PromptTemplate(**ast.literal_eval(told)) == own
    with pytest.warns(UserWarning, match="open it with template='plain', on the command line --template plain") as seen:
        lens = opened("plain")
    [warning] = seen
    assert lens.template is FIGURE_10
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened("plain", template="plain").template is TEMPLATES["plain"]
        opened("untold")


def values_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_delta_holds_inside_its_block_only(base, tuned, folder):
    before = values_of(base)

    def fail():
        with with_delta(base, folder):
            assert all(torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    with with_delta(base, folder):  # a base again
        pass


def test_a_delta_that_does_not_fit_leaves_the_base_alone(base, folder, names, tmp_path):
    with torch.no_grad():
        base.get_parameter(names[0])[0, 0] += 1e-3
    before = values_of(base)
    with pytest.raises(MoELensError, match="another base"), with_delta(base, folder):
        pass
    with (
        pytest.raises(MoELensError, match=r"expected a delta checkpoint, .* at '.*nowhere'"),
        with_delta(base, tmp_path / "nowhere"),
    ):
        pass
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_block_puts_back_what_is_trained_in_it_also_under_a_tied_name(tokenizer):
    model = build_model("olmoe", len(tokenizer), tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = values_of(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        with restored(model, [name]), torch.no_grad():
            model.get_parameter(name).add_(1)
            assert not torch.equal(model.get_parameter(name), before[name])
        assert torch.equal(model.get_parameter(name), before[name])


def test_only_the_named_tensors_are_stored(folder, names):
    assert sorted(load_file(folder / TENSORS_FILE)) == sorted(names)


def test_the_same_delta_has_the_same_bytes(base, tuned, names, folder, tmp_path):
    facts = {"method": "router", "model": "tiny", "seed": 3}
    save_delta(
        tuned,
        reversed_names := names[::-1],
        tmp_path / "again",
        facts=facts,
        fingerprint=fingerprint(base, reversed_names),
    )
    for file in (TENSORS_FILE, FACTS_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_an_altered_base_is_refused_and_left_alone(base, folder, names):
    with torch.no_grad():
        base.get_parameter(names[0])[0, 0] += 1e-3
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(MoELensError, match=r"another base.*it names 'tiny'"):
        apply_delta(base, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_another_dtype_and_a_second_application_are_refused(base, folder):
    with pytest.raises(MoELensError, match=r"another dtype \(float32\)"):
        apply_delta(copy.deepcopy(base).bfloat16(), folder)
    apply_delta(base, folder)
    with pytest.raises(MoELensError, match="applied already"):
        apply_delta(base, folder)


def test_a_model_of_another_size_or_family_is_refused(folder, tokenizer):
    with pytest.raises(MoELensError, match=r"another size.*\[8, 32\] there and \[6, 32\] here"):
        apply_delta(build_model("olmoe", len(tokenizer), num_experts=6), folder)
    with pytest.raises(MoELensError, match="has no parameters"):
        apply_delta(build_model("olmoe", len(tokenizer), num_hidden_layers=1), folder)


def test_a_folder_without_a_delta_is_refused(base, folder, tmp_path):
    with pytest.raises(MoELensError, match="expected a delta checkpoint"):
        apply_delta(base, tmp_path / "nowhere")
    (folder / TENSORS_FILE).write_bytes(b"broken")
    with pytest.raises(MoELensError, match=r"delta.safetensors is damaged, or not of .*tune again into another folder"):
        apply_delta(base, folder)
    (folder / FACTS_FILE).write_text(json.dumps({"method": "router"}))
    with pytest.raises(MoELensError, match="carries no digest"):
        read_facts(folder)


def test_saving_a_parameter_that_is_not_there_is_refused(base, tmp_path):
    with pytest.raises(MoELensError, match=r"no parameters \['lm_tail.weight'\]"):
        save_delta(base, ["lm_tail.weight"], tmp_path, facts={}, fingerprint="")


def test_the_fingerprint_depends_on_names_and_values_only(base, names):
    twin = copy.deepcopy(base)
    assert fingerprint(base, names) == fingerprint(twin, names[::-1])
    assert fingerprint(base, names) != fingerprint(base, names[:1])
    with torch.no_grad():
        twin.lm_head.weight.add_(1)
    assert fingerprint(base, names) == fingerprint(twin, names)


def test_a_models_digest_tells_it_from_one_with_any_other_expert(tokenizer):
    module = build_model("olmoe", len(tokenizer))
    digest = weights_digest(module)
    assert digest == weights_digest(build_model("olmoe", len(tokenizer)))
    with torch.no_grad():
        module.model.layers[1].mlp.experts.down_proj[5] += 0.01
    assert weights_digest(module) != digest


@pytest.mark.parametrize(
    "shape", [(64, 128), (128, 64), (2048, 1024), (3, 5000), (8, 128, 64), (5000,), (7,), ()], ids=str
)
def test_a_models_digest_changes_with_any_column_or_row(shape):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(shape))
    digest, seen, several = weights_digest(module), set(), 1
    for axis, size in enumerate(shape):
        for place in range(0, size, 1 if size <= 128 else 17):
            with torch.no_grad():
                module.weight.select(axis, place).fill_(1)
                seen.add(weights_digest(module))
                module.weight.zero_()
            several += 1
    assert weights_digest(module) == digest
    assert len(seen | {digest}) == several


def test_a_models_digest_is_the_same_in_every_process():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.arange(3 * 64 * 128.0).view(3, 64, 128))
    assert weights_digest(module) == "b832a236f56173487a706a4254248aa3b5ca959777bc4b67ccd059b627c44eda"


@pytest.fixture
def experts_folder(base, tokenizer, tmp_path):
    """The delta of a few experts, trained in a copy of the base, and that copy."""
    lens = MoELens(copy.deepcopy(base), tokenizer)
    with TuneExperts(ExpertSet.of({0: [5], 2: [1, 6]})).attached(lens) as trained, torch.no_grad():
        for name in trained.names:
            lens.module.get_parameter(name).add_(0.1)
    save_trained(lens.module, trained, tmp_path / "experts", facts={"method": "ceft", "model": "tiny"})
    return tmp_path / "experts", lens.module


def test_experts_are_stored_as_slices_and_put_back_exactly(base, experts_folder):
    folder, tuned = experts_folder
    assert {name: len(value) for name, value in load_file(folder / TENSORS_FILE).items()} == {
        f"model.layers.{layer}.mlp.experts.{field}": size
        for layer, size in ((0, 1), (2, 2))
        for field in ("gate_up_proj", "down_proj")
    }
    apply_delta(base, folder)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))


def test_a_base_that_differs_in_other_weights_or_has_fewer_experts_is_refused(base, experts_folder, tokenizer):
    folder, _ = experts_folder
    with pytest.raises(MoELensError, match="another size"):
        apply_delta(build_model("olmoe", len(tokenizer), num_experts=4), folder)
    with torch.no_grad():
        base.lm_head.weight.add_(0.1)
    with pytest.raises(MoELensError, match="another base"):
        apply_delta(base, folder)


def test_only_the_named_layers_of_a_delta_are_put_in_place(base, tuned, folder, names):
    before = values_of(base)
    apply_delta(base, folder, layers=[1])
    for name, value in base.state_dict().items():
        source = tuned.state_dict() if name in names and ".layers.1." in name else before
        assert torch.equal(value, source[name]), name
    assert not torch.equal(base.get_parameter(names[1]), before[names[1]])


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_in_which_a_delta_changes_nothing_is_refused_and_the_base_left_alone(base, folder, layer):
    before = values_of(base)
    with pytest.raises(MoELensError, match=f"changes nothing in layer {layer}"):
        apply_delta(base, folder, layers=[0, layer])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    "facts",
    [{"rows": None}, {"rows": []}, {"rows": "text"}, {"rows": {"a": []}}, {"fingerprint": None}, {"template": 5}],
    ids=str,
)
def test_facts_that_make_no_sense_are_refused_though_they_are_sealed(base, folder, tmp_path, facts):
    changed = shutil.copytree(folder, tmp_path / "changed")
    write_sealed_json(changed / "delta.json", read_facts(folder) | facts)
    with pytest.raises(MoELensError, match=rf"delta\.json is not what moe_lens writes: its {next(iter(facts))} is "):
        apply_delta(base, changed)
