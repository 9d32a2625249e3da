"""A trained bias is a `LogitBias`: it acts, and learns, as that acts, and the model stays as it is."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from training_cases import EXAMPLES, SCHEDULE, fresh, prompts

from moe_lens import MoELens, MoELensError
from moe_lens.data import collate
from moe_lens.lens import LogitBias, load_intervention
from moe_lens.tuning import TuneBias, fit, tune
from moe_lens.tuning.objective import answer_loss
from moe_lens.tuning.router_bias import FIELD

SOME = EXAMPLES[2:5]


def drawn(lens: MoELens, **place) -> LogitBias:
    """A random bias for every expert, large enough to change what is selected."""
    generator = torch.Generator().manual_seed(3)
    layers = lens.architecture.moe_layers
    return LogitBias({n: torch.randn(lens.architecture.n_experts, generator=generator) for n in layers}, **place)


def put(lens: MoELens, biases: LogitBias) -> None:
    """Gives the attached biases these values."""
    for layer, values in biases.biases.items():
        lens.module.get_submodule(lens.architecture.at(layer).router).get_parameter(FIELD).data.copy_(values)


def nats(lens: MoELens) -> float:
    """Of the answers of SOME, float64, from the logits that records hold."""
    [record] = lens.records(SOME, capture=("logits",), positions="answer", with_answer=True, progress=False)
    total, width = 0.0, record.input_ids.shape[1]
    for row, labels in enumerate(record.labels):
        for place in (labels >= 0).nonzero()[:, 0].tolist():
            at = record.kept.tolist().index(place - 1)
            total -= record.logits[row, at].double().log_softmax(-1)[labels[place]].item()
    assert width == record.labels.shape[1]
    return total


PLACES = [("olmoe", "all"), ("olmoe", "answer"), ("olmoe", (-1, 0, 1)), *((name, "from_question") for name in FAMILIES)]


@pytest.mark.parametrize(("family", "positions"), PLACES, ids=str)
def test_inside_training_the_model_decides_as_under_the_intervention(tokenizer, family, positions):
    lens = fresh(tokenizer, family)
    before, _ = lens.run_with_cache([SOME[0].question])
    biases = drawn(lens, positions=positions)
    batch = collate([prompts(lens)[place] for place in (2, 3, 4)], lens.tokenizer.pad_token_id)
    with TuneBias(positions=positions).attached(lens) as trained, torch.no_grad():
        put(lens, biases)
        assert trained.added.intervention() == biases
        plain = answer_loss(lens.module, batch, tokens=1).item()
        with trained.around(batch):
            found = answer_loss(lens.module, batch, tokens=1).item()
        assert answer_loss(lens.module, batch, tokens=1).item() == plain, "it acts inside the block alone"
        with lens.intervene(*trained.interventions()):
            expected = -sum(lens.answer_log_probabilities(SOME, progress=False))
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found - plain) > 1e-3
    assert torch.equal(lens.run_with_cache([SOME[0].question])[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_how_the_answers_change_under_the_intervention(tokenizer, family):
    lens = fresh(tokenizer, family)
    biases = drawn(lens, positions="from_question")
    batch = collate([prompts(lens)[place] for place in (2, 3, 4)], lens.tokenizer.pad_token_id)
    with TuneBias(positions="from_question").attached(lens) as trained:
        put(lens, biases)
        parameters = [lens.module.get_parameter(name).requires_grad_() for name in trained.names]
        with trained.around(batch):
            gradients = torch.autograd.grad(answer_loss(lens.module, batch, tokens=1), parameters)
    for layer, gradient in zip(biases.biases, gradients, strict=True):
        assert gradient.abs().max() > 0
        for expert in gradient.abs().topk(2).indices.tolist():
            ends = []
            for step in (1e-2, -1e-2):
                moved = {at: values.clone() for at, values in biases.biases.items()}
                moved[layer][expert] += step
                with lens.intervene(LogitBias(moved, positions="from_question")):
                    ends.append(nats(lens))
            assert gradient[expert].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=3e-2, abs=1e-3)


def test_training_a_bias_changes_no_bit_of_the_model_and_leaves_nothing_in_it(tokenizer):
    lens = fresh(tokenizer)
    before = {name: value.clone() for name, value in lens.module.state_dict().items()}
    schedule = replace(SCHEDULE, learning_rate=0.1)
    tuned = tune(lens, EXAMPLES, EXAMPLES, TuneBias((1, 2)), schedule, score="log_likelihood")
    after = lens.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (tuned.trained.count, tuned.parameters) == (2 * lens.architecture.n_experts, ())
    learnt = tuned.trained.added.intervention()
    assert learnt.layers == (1, 2)
    assert all(bias.abs().max() > 0 for bias in learnt.biases.values())
    with lens.intervene(learnt):
        better = sum(lens.answer_log_probabilities(EXAMPLES, progress=False))
    assert better > sum(lens.answer_log_probabilities(EXAMPLES, progress=False))


def test_the_dev_score_is_that_under_the_bias_and_the_best_rates_is_kept(tokenizer):
    lens, rates = fresh(tokenizer), [1e-3, 0.3]
    method = TuneBias(positions="from_question")
    tuned = tune(lens, EXAMPLES, EXAMPLES[:3], method, SCHEDULE, learning_rates=rates, score="log_likelihood")
    with lens.intervene(tuned.trained.added.intervention()):
        nats = -sum(lens.answer_log_probabilities(EXAMPLES[:3], progress=False))
    tokens = sum(len(prompt.input_ids) - prompt.prompt_length for prompt in prompts(lens)[:3])
    assert tuned.candidates["dev_log_likelihood"].max() == pytest.approx(-nats / tokens, abs=1e-5)
    by_em = tune(fresh(tokenizer), EXAMPLES, EXAMPLES[:3], method, replace(SCHEDULE, epochs=1), max_new_tokens=2)
    assert by_em.candidates["dev_em"].notna().all()


def test_an_interrupted_training_goes_on_to_the_same_bias_and_another_model_is_refused(tokenizer, tmp_path):
    schedule = replace(SCHEDULE, evaluate_every=2)
    whole = tune(fresh(tokenizer), EXAMPLES, [], TuneBias(), schedule).trained.added.intervention()
    lens = fresh(tokenizer)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    options = {"out": tmp_path, "checkpoint_seconds": 0}
    with lens.module.lm_head.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        tune(lens, EXAMPLES, [], TuneBias(), schedule, **options)
    assert not any(FIELD in name for name in lens.module.state_dict())
    calls.clear()
    with lens.module.lm_head.register_forward_hook(lambda *_: calls.append(1)):
        again = tune(lens, EXAMPLES, [], TuneBias(), schedule, **options)
    assert again.trained.added.intervention() == whole
    assert len(calls) == schedule.steps(len(EXAMPLES)) - 3, "the first steps are not made again"
    other = fresh(tokenizer)
    other.module.lm_head.weight.data += 1
    with pytest.raises(MoELensError, match="results of another run: its trained"):
        tune(other, EXAMPLES, [], TuneBias(), schedule, **options)


def test_checkpointed_layers_give_the_same_gradient(tokenizer):
    found = []
    for checkpointing in (False, True):
        schedule = replace(SCHEDULE, epochs=1, gradient_checkpointing=checkpointing)
        lens = fresh(tokenizer)
        with TuneBias(positions="from_question").attached(lens) as trained:
            fit(lens.module, trained.names, prompts(lens), schedule, pad_id=0, around=trained.around)
        found.append(torch.cat(list(trained.added.intervention().biases.values())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_learnt_bias_is_saved_and_read_again(tokenizer, tmp_path):
    tuned = tune(fresh(tokenizer), EXAMPLES, [], TuneBias(positions="from_question"), SCHEDULE)
    learnt = tuned.trained.added.intervention()
    learnt.save(tmp_path)
    assert load_intervention(tmp_path) == learnt
    assert load_intervention(tmp_path).positions == "from_question"


def test_a_bias_that_can_learn_nothing_or_acts_nowhere_is_refused(tokenizer):
    with (
        pytest.raises(MoELensError, match="no gradient reaches the routers"),
        TuneBias().attached(fresh(tokenizer, "mixtral", num_experts_per_tok=1)),
    ):
        pass
    with pytest.raises(MoELensError, match="positions must be one of"):
        TuneBias(positions="nowhere")
    with pytest.raises(MoELensError, match="layer"), TuneBias((7,)).attached(fresh(tokenizer)):
        pass
