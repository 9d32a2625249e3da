"""The training loop, router tuning, and its command line."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import build_model
from training_cases import EXAMPLES, SCHEDULE, fresh, prompts
from transformers import GPT2Config, GPT2LMHeadModel

from moe_lens import ExpertSet, MoELens, MoELensError, Zero
from moe_lens.data import collate, encode, template_named
from moe_lens.tuning import Checkpoints, Schedule, TuneRouters, fit, log_table, router_parameters, save_trained, tune
from moe_lens.tuning.objective import answer_loss
from moe_lens.tuning.state import training


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = [Schedule(learning_rate=1.0, warmup=0.1).rate(step, 100) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert max(rates) <= 1.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert [rates[step] for step in (0, 9, 10, 55)] == pytest.approx([1 / 11, 10 / 11, 1, 0.5])


def test_every_epoch_visits_every_example_once_in_an_order_of_its_own():
    schedule = Schedule(epochs=2, batch_size=4)
    assert schedule.steps(10) == 6
    epochs = [[i for step in steps for i in schedule.order(10, step)] for steps in (range(3), range(3, 6))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert schedule.order(10, 4) == replace(schedule).order(10, 4)
    assert schedule.order(10, 4) != replace(schedule, seed=1).order(10, 4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(({name: 0}, f"{name} must be at least 1; got 0") for name in ("epochs", "batch_size", "micro_batch")),
        *(({name: 0}, f"{name} must be at least 1; got 0") for name in ("evaluate_every", "patience")),
        *(
            ({name: value}, f"{name} must be finite and above 0; got {value}")
            for name in ("learning_rate", "max_gradient_norm")
            for value in (0, -1.0, math.nan, math.inf)
        ),
        *(({"weight_decay": value}, f"at least 0; got {value}") for value in (-1, math.nan, math.inf)),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"warmup": 1.5}, "from 0 to 1; got 1.5"),
    ],
    ids=str,
)
def test_a_schedule_refuses_numbers_that_make_no_sense(wrong, says):
    with pytest.raises(MoELensError, match=says):
        Schedule(**wrong)


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_checkpoints_refuse_a_time_below_0(tmp_path, seconds):
    with pytest.raises(MoELensError, match=f"at least 0; got {seconds}"):
        Checkpoints(tmp_path, {}, every=seconds)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"learning_rates": [1e-3, 0.0]}, "learning_rate must be finite"), ({"max_new_tokens": 0}, "at least 1; got 0")],
)
def test_tune_refuses_numbers_that_make_no_sense_before_it_trains(olmoe, tmp_path, wrong, says):
    with pytest.raises(MoELensError, match=says):
        tune(olmoe, EXAMPLES, EXAMPLES[:2], TuneRouters(), SCHEDULE, out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_the_loss_is_that_of_the_answers_alone(lens):
    batch = collate(prompts(lens)[2:5], lens.tokenizer.pad_token_id)
    with torch.no_grad():
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        whole = lens.module(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, labels=batch.labels
        )
        assert answer_loss(lens.module, batch).item() == pytest.approx(whole.loss.item(), rel=1e-5)


def test_padding_changes_no_loss_also_where_positions_are_learned(tokenizer):
    """Rotary positions are relative, so that a model with these alone would not show where they are counted from."""
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).eval()
    encoded = [encode(example, tokenizer, with_answer=True) for example in EXAMPLES[::4]]
    assert len({len(prompt.input_ids) for prompt in encoded}) > 1
    alone = 0.0
    for prompt in encoded:
        ids = torch.tensor([prompt.input_ids])
        scores = module(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        alone -= scores[prompt.prompt_length - 1 :].sum().item()
    assert answer_loss(module, collate(encoded, 0), tokens=1).item() == pytest.approx(alone, rel=1e-5)


def test_only_the_named_parameters_change_and_the_model_is_left_as_it_was_found(tokenizer):
    lens = fresh(tokenizer)
    before = {name: value.clone() for name, value in lens.module.state_dict().items()}
    names = router_parameters(lens, [1])
    log = log_table(fit(lens.module, names, prompts(lens), SCHEDULE, pad_id=0))
    changed = {name for name, value in lens.module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(names) == {"model.layers.1.mlp.gate.weight"}
    assert not lens.module.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in lens.module.parameters())
    assert list(log["step"]) == list(range(1, 7))


@pytest.mark.parametrize("before", [(False, False, True), (True, False, False), (True, True, True)])
def test_training_takes_sums_in_a_fixed_order_and_leaves_torch_as_it_was(tokenizer, before):
    def now() -> tuple[bool, bool, bool]:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns, torch.utils.deterministic.fill_uninitialized_memory

    def put(deterministic: bool, warns: bool, filled: bool) -> None:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = filled

    module = fresh(tokenizer).module
    trained = {"lm_head.weight": module.get_parameter("lm_head.weight")}
    default = now()
    put(*before)
    try:
        with pytest.raises(KeyboardInterrupt), training(module, trained):
            inside = now()
            raise KeyboardInterrupt
        assert inside == (True, True, False)
        assert now() == before
    finally:
        put(*default)


def test_the_same_seed_gives_the_same_bytes_also_with_two_threads(tokenizer):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = []
        for seed in (0, 0, 1):
            lens = fresh(tokenizer)
            fit(lens.module, router_parameters(lens), prompts(lens), replace(SCHEDULE, seed=seed), pad_id=0)
            results.append(torch.cat([lens.module.get_parameter(name).flatten() for name in router_parameters(lens)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_half_precision_model_is_tuned_and_keeps_its_dtype(tokenizer):
    lens = MoELens.from_pretrained(build_model("olmoe", len(tokenizer)).to(torch.bfloat16), tokenizer)
    before = lens.module.model.layers[0].mlp.gate.weight.clone()
    tuned = tune(lens, EXAMPLES, EXAMPLES[:2], TuneRouters(), SCHEDULE, max_new_tokens=2)
    assert {parameter.dtype for parameter in lens.module.parameters()} == {torch.bfloat16}
    assert not torch.equal(lens.module.model.layers[0].mlp.gate.weight, before)
    assert tuned.log["loss"].notna().all()


def test_tuning_lowers_the_loss_and_keeps_the_rate_that_answers_best(tokenizer):
    lens = fresh(tokenizer)
    schedule, rest = replace(SCHEDULE, epochs=6), {"max_new_tokens": 3}
    tuned = tune(lens, EXAMPLES, EXAMPLES[:3], TuneRouters(), schedule, learning_rates=[5e-2, 1e-9], **rest)
    assert list(tuned.candidates["learning_rate"]) == [1e-9, 5e-2]
    best = tuned.candidates.loc[tuned.candidates["dev_em"].idxmax(), "learning_rate"]
    assert tuned.schedule.learning_rate == best
    again = fresh(tokenizer)
    alone = tune(again, EXAMPLES, EXAMPLES[:3], TuneRouters(), replace(schedule, learning_rate=best), **rest)
    for name in tuned.parameters:  # trying other rates leaves no trace
        assert torch.equal(lens.module.get_parameter(name), again.module.get_parameter(name))
    assert alone.log.equals(tuned.log)
    course = fit(fresh(tokenizer).module, tuned.parameters, prompts(lens), schedule, pad_id=0)
    high = log_table(course)
    assert high["loss"].iloc[-1] < high["loss"].iloc[0]


def test_training_and_its_dev_score_ask_by_the_lenss_template_which_the_delta_names(tokenizer, tmp_path):
    lens, bare = fresh(tokenizer), fresh(tokenizer)
    lens.template = plain = template_named("plain")
    encoded = [encode(example, tokenizer, template=plain, with_answer=True) for example in EXAMPLES]
    with torch.no_grad():
        loss = answer_loss(bare.module, collate(encoded, tokenizer.pad_token_id)).item()
        dev = answer_loss(bare.module, collate(encoded[:3], tokenizer.pad_token_id)).item()
        assert loss != pytest.approx(answer_loss(bare.module, collate(prompts(bare), 0)).item(), rel=1e-4)
    still = Schedule(learning_rate=1e-12, epochs=1, batch_size=len(EXAMPLES))
    longest = max(len(one.input_ids) for one in encoded)  # by the other template all would be longer
    tuned = tune(lens, EXAMPLES, EXAMPLES[:3], TuneRouters(), still, score="log_likelihood", max_length=longest)
    assert tuned.dropped == 0
    assert tuned.log["loss"].tolist() == pytest.approx([loss], rel=1e-5)
    assert tuned.candidates["dev_log_likelihood"].tolist() == pytest.approx([-dev], rel=1e-5)
    save_trained(lens.module, tuned.trained, tmp_path, facts={"method": "router"})
    with pytest.warns(UserWarning, match="trained on prompts of another template"):
        MoELens.from_pretrained(fresh(tokenizer).module, tokenizer, delta=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoELens.from_pretrained(fresh(tokenizer).module, tokenizer, delta=tmp_path, template=plain)


def test_what_cannot_be_trained_is_refused(tokenizer):
    lens = fresh(tokenizer)
    with pytest.raises(MoELensError, match="nothing to train on"):
        fit(lens.module, router_parameters(lens), [], SCHEDULE, pad_id=0)
    with pytest.raises(MoELensError, match=r"no\.parameter"):
        fit(lens.module, ["no.parameter"], prompts(lens), SCHEDULE, pad_id=0)
    with pytest.raises(MoELensError, match="more than 3 tokens"):
        tune(lens, EXAMPLES, EXAMPLES, TuneRouters(), SCHEDULE, max_length=3)
    with pytest.raises(MoELensError, match="learning_rate"):
        Schedule(learning_rate=0)
    top1 = fresh(tokenizer, "mixtral", num_experts_per_tok=1)
    with pytest.raises(MoELensError, match="top_k = 1"):
        router_parameters(top1)


def test_tuning_inside_an_intervention_is_refused(olmoe):
    with olmoe.intervene(Zero(ExpertSet.of({0: [1]}))), pytest.raises(MoELensError, match="call it outside"):
        tune(olmoe, EXAMPLES, EXAMPLES[:2], TuneRouters(), SCHEDULE, max_new_tokens=2)


def test_a_rate_that_fails_leaves_the_routers_as_they_were(tokenizer, monkeypatch):
    lens = fresh(tokenizer)
    before = {name: lens.module.get_parameter(name).clone() for name in router_parameters(lens)}

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_lens.tuning.training.answer_table", fail)
    with pytest.raises(KeyboardInterrupt):
        tune(lens, EXAMPLES, EXAMPLES, TuneRouters(), SCHEDULE)
    assert all(torch.equal(lens.module.get_parameter(name), value) for name, value in before.items())


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(tokenizer):
    lens = fresh(tokenizer)
    with torch.no_grad():
        lens.module.model.norm.weight[0] = torch.nan
    with pytest.raises(MoELensError, match="loss became nan at step 1 of 6"):
        fit(lens.module, router_parameters(lens), prompts(lens), SCHEDULE, pad_id=0)
    assert not any(parameter.requires_grad for parameter in lens.module.parameters())


@pytest.mark.parametrize("method", ["router", TuneRouters])
def test_what_is_no_method_is_refused(olmoe, method):
    with pytest.raises(MoELensError, match="expected a method such as"):
        tune(olmoe, EXAMPLES, [], method)
