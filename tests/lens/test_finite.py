"""Numbers that are not finite: every pass stops, and says in which layer and example they begin."""

import copy

import pytest
import torch
from conftest import build_model

from moe_lens.causal import evaluate
from moe_lens.causal.sweep import single_expert_effects
from moe_lens.checks import run_checks
from moe_lens.data import Example, encode
from moe_lens.errors import NotFiniteError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions import Reroute, Zero
from moe_lens.lens.lens import MoELens
from moe_lens.statistics import ExpertUsage
from moe_lens.statistics.weights import weight_similarity
from moe_lens.tuning.training import dev_score

EXAMPLES = [
    Example("short", "", "Who sat?", ("the cat",)),
    Example("long", "The cat sat on the mat while the dog slept in the sun.", "Who sat on the mat?", ("The cat",)),
]
NAN, INF = float("nan"), float("inf")


def expert(model):
    model.model.layers[1].mlp.experts.down_proj.data[:] = NAN


def router(model):
    model.model.layers[1].mlp.gate.weight.data[2] = INF


def head(model):
    model.lm_head.weight.data[7] = NAN


def norm(model):
    model.model.norm.weight.data[3] = INF


def last_layer(model):
    model.model.layers[2].mlp.experts.down_proj.data *= 1e38


BOTH = r"first after layer 1, at token 0 of example '(short|long)' \(and in 1 more of 2\); NaN or infinity stands in "
FAULTS = {
    expert: BOTH + r"model\.layers\.1\.mlp\.experts\.down_proj: take a checkpoint",
    router: BOTH + r"model\.layers\.1\.mlp\.gate\.weight: take",
    head: r"behind the layers, .* the head 'lm_head', .*; NaN or infinity stands in lm_head\.weight",
    norm: r"behind the layers, in the final norm 'model\.norm' .*; NaN or infinity stands in model\.norm\.weight",
    last_layer: r"first after layer 2, .*; no weight is, so they overflow in float32: the weights are too large",
}
PASSES = {
    "measure": lambda lens: lens.measure(EXAMPLES, ExpertUsage(), progress=False),
    "records": lambda lens: list(lens.records(EXAMPLES, capture=("attention",), progress=False)),
    "evaluate": lambda lens: evaluate(lens, EXAMPLES, max_new_tokens=2, progress=False),
    "generate": lambda lens: lens.generate(EXAMPLES, max_new_tokens=2, progress=False),
    "log-probabilities": lambda lens: lens.answer_log_probabilities(EXAMPLES, progress=False),
    "sweep": lambda lens: single_expert_effects(lens, EXAMPLES, progress=False),
    "checks": lambda lens: run_checks(lens, ["Who sat?", "Who sat on the mat while the dog slept?"]),
}


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model("olmoe", len(tokenizer))


@pytest.fixture
def broken(model, tokenizer):
    """A lens on a model with a fault; the lens is made before, as on a model that breaks in training."""

    def make(fault):
        lens = MoELens(copy.deepcopy(model), tokenizer)
        with torch.no_grad():
            fault(lens.module)
        return lens

    return make


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["measure", "generate", "log-probabilities"])
def test_a_pass_stops_and_says_where_numbers_stop_being_finite(broken, fault, way):
    with pytest.raises(NotFiniteError, match=FAULTS[fault]):
        PASSES[way](broken(fault))


@pytest.mark.parametrize("way", PASSES)
def test_nothing_is_measured_with_numbers_that_are_not_finite(broken, way):
    with pytest.raises(NotFiniteError, match="first after layer 1, at token 0 of example"):
        PASSES[way](broken(expert))


def test_the_example_and_its_token_are_named_where_only_one_is_not_finite(broken, tokenizer):
    lens = broken(lambda model: None)
    ids = {name: encode(example, tokenizer).input_ids for name, example in zip("sl", EXAMPLES, strict=True)}
    token = next(token for token in ids["l"][5:] if token not in (*ids["s"], *ids["l"][:5]))
    with torch.no_grad():
        lens.module.model.embed_tokens.weight[token] = INF
    place = ids["l"].index(token)
    with pytest.raises(NotFiniteError, match=rf"in the embeddings, at token {place} of example 'long';"):
        lens.measure(EXAMPLES, ExpertUsage(), progress=False)
    lens.measure(EXAMPLES[:1], ExpertUsage(), progress=False)


def test_what_is_generated_is_looked_at_step_by_step(broken, tokenizer):
    lens = broken(lambda model: None)
    lens.module.generation_config.eos_token_id = None
    asked = encode(EXAMPLES[0], tokenizer).input_ids
    with torch.no_grad():
        said = lens.module.generate(torch.tensor([asked]), max_new_tokens=6, do_sample=False)[0, len(asked) :].tolist()
    token, step = next((token, step) for step, token in enumerate(said) if token not in asked)
    with torch.no_grad():
        lens.module.model.embed_tokens.weight[token] = INF
    lens.generate(EXAMPLES[:1], max_new_tokens=step + 1, progress=False)  # said, and not read
    with pytest.raises(NotFiniteError, match=f"in the embeddings, at token {len(asked) + step} of example 'short'"):
        lens.generate(EXAMPLES[:1], max_new_tokens=step + 2, progress=False)


def test_pads_and_what_comes_after_the_end_do_not_count(broken, tokenizer):
    lens = broken(lambda model: None)
    expected = lens.generate(EXAMPLES, max_new_tokens=6, progress=False)
    lens.tokenizer.pad_token = lens.tokenizer.convert_ids_to_tokens(2)  # no prompt holds it
    with torch.no_grad():
        lens.module.model.embed_tokens.weight[2] = 1e30  # what a pad is must not reach anything
    assert lens.generate(EXAMPLES, max_new_tokens=6, progress=False) == expected
    lens.measure(EXAMPLES, ExpertUsage(), progress=False)


def test_minus_infinity_in_router_logits_is_meant(olmoe):
    experts = ExpertSet.of({1: [0, 1]})
    with olmoe.intervene(Reroute(experts)):
        [record] = olmoe.records(EXAMPLES, progress=False)
        assert (record.routing[1].logits[..., :2] == -INF).all()
        olmoe.generate(EXAMPLES, max_new_tokens=2, progress=False)


def test_interventions_are_named_with_it(broken):
    lens = broken(expert)
    with lens.intervene(Zero(ExpertSet.of({0: [1]}))), pytest.raises(NotFiniteError, match=r"not finite under Zero\("):
        lens.measure(EXAMPLES, ExpertUsage(), progress=False)


def test_half_precision_that_overflows_is_told_to_be_opened_in_another(model, tokenizer):
    half = copy.deepcopy(model).half()
    with torch.no_grad():
        half.model.layers[0].mlp.experts.down_proj *= 6e4
        half.model.layers[0].mlp.experts.gate_up_proj *= 100
    with pytest.raises(NotFiniteError, match=r"overflow in float16: open the model in float32 \(--dtype float32\)"):
        MoELens(half, tokenizer).measure(EXAMPLES, ExpertUsage(), progress=False)


def test_no_state_is_best_by_a_likelihood_that_is_no_number(broken):
    score = dev_score(broken(expert), EXAMPLES, "log_likelihood", max_new_tokens=4, whole_model=True)
    with pytest.raises(NotFiniteError, match="log-likelihood of the dev data is nan"):
        score.measure()


def test_weights_that_are_not_finite_are_not_compared(broken):
    with pytest.raises(NotFiniteError, match="experts in layer 1"):
        weight_similarity(broken(expert))
