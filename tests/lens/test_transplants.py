"""Routers of another model in the place of this one's: exact as a model that has them, where they are to act."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import build_model, left_padded

from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import Bias, Force, MoELens, Replay, Reroute, RouteAs, Rows, Run, TopK, load_intervention
from moe_lens.lens.delta import apply_delta, fingerprint, restored, save_delta
from moe_lens.tuning import TuneExperts, save_trained
from moe_lens.tuning.methods import router_parameters

EXAMPLES = [
    Example("0", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("1", "", "Who slept in the sun?", ("the dog",)),
    Example("2", "The cat sat on the mat.", "What sat on the mat?", ("The cat",)),
]
TEXTS = [example.question for example in EXAMPLES]
DIFFERENT = ("olmoe", "qwen2_moe", "deepseek_v3")
SHORT = {"max_new_tokens": 4, "progress": False}


@pytest.fixture(params=DIFFERENT)
def lens(lenses, request):
    return lenses[request.param]


def other_routers(lens):
    """Router weights by path, those of another training, as a delta's names have them."""
    generator = torch.Generator().manual_seed(1)
    names = router_parameters(lens)
    return {name: torch.randn(lens.module.get_parameter(name).shape, generator=generator) for name in names}


def as_delta(lens, folder):
    """A folder with these routers as a delta of the lens's model, which stays as it is."""
    tensors = other_routers(lens)
    before = fingerprint(lens.module, tensors)
    with restored(lens.module, tensors):
        with torch.no_grad():
            for name, tensor in tensors.items():
                lens.module.get_parameter(name).copy_(tensor)
        save_delta(lens.module, tensors, folder, facts={"method": "router"}, fingerprint=before)
    return folder


def answered(lens, *interventions):
    """Answers, and the logits of all texts' positions."""
    with lens.intervene(*interventions):
        logits, _ = lens.run_with_cache(TEXTS)
        return lens.generate(EXAMPLES, **SHORT), logits


def same(first, second):
    return first[0] == second[0] and torch.equal(first[1], second[1])


@pytest.mark.parametrize("positions", ["all", "last", "decode"])
def test_the_own_routers_are_nothing_bit_for_bit(lens, positions):
    own = RouteAs(lens, positions=positions)
    plain = answered(lens)
    assert same(answered(lens, own), plain)
    assert same(answered(lens, Rows((None, own, own))), plain)


def test_a_delta_in_all_layers_or_some_is_the_delta_applied_there(lens, tmp_path):
    folder, plain = as_delta(lens, tmp_path), answered(lens)
    found = {}
    for layers in (None, [1], [1, 2]):
        found[str(layers)] = answered(lens, RouteAs(folder, layers=layers))
        with restored(lens.module, other_routers(lens)):
            apply_delta(lens.module, folder, layers=layers)
            applied = answered(lens)
            assert same(answered(lens, RouteAs(folder, layers=layers)), applied), "routers that are there already"
        assert same(found[str(layers)], applied)
        assert not torch.equal(applied[1], plain[1])
    assert not torch.equal(found["None"][1], found["[1]"][1])
    assert same(answered(lens), plain)


def test_another_lens_lends_its_routers_as_they_were_and_nothing_else(lens, tmp_path):
    other = MoELens(copy.deepcopy(lens.module), lens.tokenizer)
    apply_delta(other.module, as_delta(lens, tmp_path))
    with torch.no_grad():
        other.module.lm_head.weight.mul_(2)
    own = RouteAs(other, layers=[2])
    of_delta = answered(lens, RouteAs(tmp_path, layers=[2]))
    with torch.no_grad():
        for name in other_routers(lens):
            other.module.get_parameter(name).zero_()
    assert same(answered(lens, own), of_delta)


def test_what_is_asked_of_routers_is_asked_of_those_that_decide(lens, tmp_path):
    folder = as_delta(lens, tmp_path)
    one = ExpertSet.of({1: [3], 2: [5]})
    for asked in (Bias(one, 2.0), Bias(one, 2.0, weights="unbiased"), Reroute(one), Force(one, "sum"), TopK(2)):
        found = answered(lens, asked, RouteAs(folder))
        with restored(lens.module, other_routers(lens)):
            apply_delta(lens.module, folder)
            assert same(found, answered(lens, asked))
    where = RouteAs(folder, positions="last")
    found, fewer = answered(lens, TopK(2), where)[1], answered(lens, TopK(2))[1]
    torch.testing.assert_close(found[:, :-1], fewer[:, :-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[:, -1], fewer[:, -1], atol=1e-2)


@pytest.mark.parametrize(("positions", "steps"), [("question", "all"), ((-2, 0), "all"), ("all", "prefill")])
def test_positions_and_steps_are_those_of_a_hook_that_mixes_two_routers_logits(olmoe, tmp_path, positions, steps):
    """Of one example without pads, so that the positions are counted here by hand; decoding steps in test_places."""
    example, own = EXAMPLES[0], RouteAs(as_delta(olmoe, tmp_path), positions=positions, steps=steps)
    with olmoe.intervene(own):
        [record] = olmoe.records([example], capture=("logits",), positions="all", progress=False)
    length, (question,) = record.input_ids.shape[1], record.question_spans
    chosen = {"question": range(question.start, question.stop), (-2, 0): (length - 3, length - 1)}
    where = torch.tensor([place in chosen.get(positions, range(length)) for place in range(length)])[:, None]
    others = other_routers(olmoe)

    def hook_on(path):
        def hook(gate, arguments, _):
            logits, theirs = (arguments[0] @ weight.T for weight in (gate.weight, others[f"{path}.weight"]))
            mixed = torch.where(where, theirs, logits)
            weights, indices = mixed.softmax(-1).topk(gate.top_k)
            return mixed, weights, indices

        return olmoe.module.get_submodule(path).register_forward_hook(hook)

    handles = [hook_on(site.router) for site in olmoe.architecture.moe]
    try:
        with torch.no_grad():
            expected = olmoe.module(record.input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(record.logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - olmoe.module(record.input_ids, use_cache=False).logits).abs().max() > 1e-2


def test_a_record_tells_the_other_routers_logits_and_the_own_ones_before(olmoe, tmp_path):
    with olmoe.intervene(RouteAs(as_delta(olmoe, tmp_path), layers=[0], positions="last")):
        _, record = olmoe.run_with_cache(TEXTS, capture=("routing", "router_input"))
    given, weight = record.router_input[0], other_routers(olmoe)["model.layers.0.mlp.gate.weight"]
    after, before = record.routing[0].logits, record.routing_before[0].logits
    torch.testing.assert_close(after[:, -1], given[:, -1] @ weight.T)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-2)


def test_a_selection_bias_that_the_block_hands_over_is_the_other_models_too():
    """Of minimax_m2 it is no part of the router's own module."""
    lens, other = (MoELens(tiny_model("minimax_m2", changes={}), tiny_tokenizer()) for _ in range(2))
    other.module.load_state_dict(lens.module.state_dict())
    names = [path for path, _ in lens.architecture.moe[0].router_tensors]
    assert names == ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.e_score_correction_bias"]
    for site in other.architecture.moe:
        bias = dict(other.module.named_buffers() or other.module.named_parameters())[site.router_tensors[1][0]]
        bias.copy_(torch.linspace(-9, 9, 8))
    [logits, expected, plain] = [
        answered(lens, RouteAs(other))[1],
        other.run_with_cache(TEXTS)[0],
        lens.run_with_cache(TEXTS)[0],
    ]
    assert torch.equal(logits, expected)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_in_a_trace_of_ones_own_it_acts_too(olmoe, tmp_path):
    own = RouteAs(as_delta(olmoe, tmp_path), positions="last")
    with olmoe.intervene(own):
        expected, _ = olmoe.run_with_cache(TEXTS)
        with torch.no_grad(), olmoe.model.trace(**left_padded(olmoe, TEXTS)):
            logits = olmoe.model.output.logits.save()
    assert torch.equal(logits, expected)


def test_a_saved_one_needs_no_delta_any_more(olmoe, tmp_path):
    folder = as_delta(olmoe, tmp_path / "delta")
    own = RouteAs(folder, layers=[1], steps="prefill")
    own.save(tmp_path / "own")
    for file in folder.iterdir():
        file.unlink()
    found = load_intervention(tmp_path / "own")
    assert found == own
    assert same(answered(olmoe, found), answered(olmoe, own))
    assert own != replace(own, steps="all")
    assert repr(found) == "RouteAs(3 tensors of other routers, layers=[1], steps='prefill')"


def test_what_is_no_router_of_this_model_is_named(olmoe, tokenizer, tmp_path):
    larger = MoELens(build_model("olmoe", len(tokenizer), num_experts=16), tokenizer)
    first = {"model.layers.1.mlp.gate.weight": torch.ones(8, 32)}
    wrong = [
        (lambda: RouteAs(larger), r"is \[16, 32\] in the other routers and \[8, 32\] here"),
        (
            lambda: RouteAs({"model.layers.1.moe.gate.weight": torch.ones(8, 32)}),
            "is no part of a router of this model",
        ),
        (
            lambda: RouteAs(first, layers=[0]),
            "other router for layer 0",
        ),
        (lambda: RouteAs({}), "expected routers of another lens"),
        (lambda: RouteAs(tmp_path / "nothing"), "expected a delta checkpoint"),
        (lambda: RouteAs(3), "expected routers of another lens, or the folder of a delta; got 3"),
    ]
    for make, said in wrong:
        with pytest.raises(MoELensError, match=said), olmoe.intervene(make()):
            pass
    half = {path: tensor.bfloat16() for path, tensor in RouteAs(olmoe).held.items()}
    with pytest.raises(MoELensError, match=r"torch.bfloat16 in the other routers and torch.float32 here"):
        answered(olmoe, RouteAs(half))


def test_a_delta_of_more_than_routers_is_refused_and_its_model_lends_its_routers(tokenizer, tmp_path):
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer)
    with TuneExperts(ExpertSet.of({0: [1]})).attached(lens) as trained:
        pass
    save_trained(lens.module, trained, tmp_path, facts={"method": "ceft"})
    with pytest.raises(MoELensError, match=r"takes routers alone; open a lens with the whole delta"):
        answered(lens, RouteAs(tmp_path))


def test_a_replay_and_other_routers_are_refused_in_one_row_and_layer(olmoe):
    own, replay = RouteAs(olmoe, layers=[1]), Replay(Run(olmoe, EXAMPLES))
    for several in ([own, replay], [replay, own], [Rows((own, replay, None)), replay]):
        with pytest.raises(MoELensError, match="layer 1 cannot get the selection of another run and RouteAs"):
            answered(olmoe, *several)
    with olmoe.intervene(replace(replay, layers=(0,)), own), olmoe.at_rest():
        pass
