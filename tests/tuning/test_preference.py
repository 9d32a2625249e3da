"""DPO in the loop: its loss and gradient, the model it starts from, what it leaves out, and its command."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_methods import TEXTS, open_family
from training_cases import EXAMPLES, UNEVEN, fresh

from moe_lens import ExpertSet, MoELens, MoELensError
from moe_lens.data import Encoded
from moe_lens.tuning import (
    DPO,
    Schedule,
    TuneAll,
    TuneBias,
    TuneExperts,
    TuneLowRank,
    TuneParts,
    TuneRouters,
    fit,
    log_table,
    tune,
)
from moe_lens.tuning.preference import Preference, preference, with_rival
from moe_lens.tuning.prepared import Prepared

CONFLICTS = [replace(one, original_answer=f"old {i}") for i, one in enumerate(EXAMPLES)]
BETA = 0.3
METHODS = {
    "routers": TuneRouters(),
    "experts": TuneExperts(ExpertSet.of({0: [5], 2: [1, 6]})),
    "everything": TuneAll(),
    "bias": TuneBias(),
    "LoRA": TuneLowRank(TuneParts(), 2),
}


def log_likelihood(module: torch.nn.Module, prompt: Encoded) -> torch.Tensor:
    """Of the answer after the prompt, alone and without pads, token by token."""
    logits = module(torch.tensor([prompt.input_ids])).logits[0].double().log_softmax(-1)
    places = range(prompt.prompt_length, len(prompt.input_ids))
    return torch.stack([logits[place - 1, prompt.input_ids[place]] for place in places]).sum()


def by_hand(module: torch.nn.Module, before: torch.nn.Module, data: Prepared) -> torch.Tensor:
    """The published loss, an example at a time, with a copy of the model for its reference."""
    losses = []
    for chosen, rejected in zip(data.prompts, data.others, strict=True):
        with torch.no_grad():
            reference = log_likelihood(before, chosen) - log_likelihood(before, rejected)
        difference = log_likelihood(module, chosen) - log_likelihood(module, rejected) - reference
        losses.append(-torch.log(1 / (1 + torch.exp(-BETA * difference))))
    return torch.stack(losses).mean()


def shaken(lens: MoELens, names, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        value = lens.module.get_parameter(name)
        value.data += 0.1 * value.data.abs().mean().clamp(min=0.1) * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("what", ["routers", "everything"])
def test_loss_and_gradient_are_those_written_out_by_hand(tokenizer, what, micro_batch):
    lens = fresh(tokenizer)
    before = copy.deepcopy(lens.module)
    data = Prepared.of(lens, CONFLICTS, max_length=None, pairs=True)
    with METHODS[what].attached(lens) as trained:
        loss = preference(DPO(BETA), lens, data.prompts, data.others, trained)
        shaken(lens, trained.names)  # where the loss is log 2 too little of it shows
        start = {name: lens.module.get_parameter(name).detach().clone() for name in trained.names}
        one_step = Schedule(learning_rate=1e-4, epochs=1, batch_size=9, micro_batch=micro_batch)
        log = log_table(fit(lens.module, trained.names, data.prompts, one_step, pad_id=0, objective=loss))
        with torch.no_grad():
            for name, value in start.items():
                lens.module.get_parameter(name).copy_(value)
        lens.module.requires_grad_(True)
        expected = by_hand(lens.module, before, data)
        expected.backward()
        gradient = torch.cat([lens.module.get_parameter(name).grad.flatten() for name in trained.names])
    assert abs(expected.item() - math.log(2)) > 0.01
    assert log["loss"].tolist() == pytest.approx([expected.item()], rel=1e-5)
    assert log["gradient_norm"].tolist() == pytest.approx([gradient.norm().item()], rel=1e-4)


@pytest.mark.slow
def test_trl_computes_the_same_loss_and_gradient(tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    lens, theirs = fresh(tokenizer), fresh(tokenizer)
    before = copy.deepcopy(theirs.module)
    data = Prepared.of(lens, CONFLICTS, max_length=None, pairs=True)
    names = [name for name, _ in lens.module.named_parameters()]
    with TuneAll().attached(lens) as trained:
        loss = preference(DPO(BETA), lens, data.prompts, data.others, trained)
        for shaking in (lens, theirs):
            shaken(shaking, names)
        one_step = Schedule(learning_rate=1e-6, epochs=1, batch_size=9)
        [row] = fit(lens.module, names, data.prompts, one_step, pad_id=0, objective=loss).rows
    rows = [
        {"prompt": prompt.text, "chosen": f" {one.answers[0]}", "rejected": f" {one.original_answer}"}
        for prompt, one in zip(data.prompts, CONFLICTS, strict=True)
    ]
    settings = trl.DPOConfig(
        tmp_path, beta=BETA, per_device_train_batch_size=9, max_steps=1, logging_steps=1, learning_rate=1e-6,
        max_length=None, bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to=[],
        router_aux_loss_coef=0.0,
    )  # fmt: skip
    theirs.module.requires_grad_(True)
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(theirs.module, before, settings, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert abs(row["loss"] - math.log(2)) > 0.01
    assert row["gradient_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("what", METHODS)
def test_the_first_step_starts_from_the_model_itself_and_training_lowers_the_loss(tokenizer, what):
    lens = fresh(tokenizer)
    tuned = tune(lens, CONFLICTS, [], METHODS[what], replace(UNEVEN, learning_rate=2e-2), objective=DPO(BETA))
    losses = tuned.log["loss"].tolist()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 1e-3


def test_the_reference_is_what_the_model_says_before_it_learns(tokenizer):
    lens = fresh(tokenizer)
    swapped = [replace(one, answers=(one.original_answer,), original_answer=None) for one in CONFLICTS]
    expected = [
        own - other for own, other in zip(*map(lens.answer_log_probabilities, (CONFLICTS, swapped)), strict=True)
    ]
    data = Prepared.of(lens, CONFLICTS, max_length=None, pairs=True)
    with TuneRouters().attached(lens) as trained:
        found = preference(DPO(), lens, data.prompts, data.others, trained)
    assert found.references == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert max(map(abs, found.references)) > 0.1
    assert not any(parameter.requires_grad for parameter in lens.module.parameters())


def test_of_a_step_both_answers_are_run_and_an_example_is_one_part(tokenizer):
    lens = fresh(tokenizer)
    data = Prepared.of(lens, CONFLICTS, max_length=None, pairs=True)
    pairs = Preference(BETA, data.others, (0.0,) * 9)
    rows = pairs.rows(data.prompts, [7, 2])
    assert rows == [data.prompts[7], data.prompts[2], data.others[7], data.others[2]]
    assert pairs.parts(data.prompts, [7, 2]) == 2
    decoded = [tokenizer.decode(row.input_ids[row.prompt_length :]) for row in rows]
    assert decoded == [" Answer<eos>", " Belmor<eos>", " old 7<eos>", " old 2<eos>"]
    assert rows[0].input_ids[: rows[0].prompt_length] == rows[2].input_ids[: rows[2].prompt_length]


def test_examples_without_another_answer_are_left_out_and_counted(tokenizer, capsys):
    mixed = [EXAMPLES[0], replace(EXAMPLES[1], original_answer="belmor."), *CONFLICTS[2:]]
    kept, left = with_rival(mixed)
    assert (kept, left) == (CONFLICTS[2:], ["Arland-0", "Arland-1"])
    once = replace(UNEVEN, epochs=1)
    tuned, other = (tune(fresh(tokenizer), few, [], TuneRouters(), once, objective=DPO()) for few in (mixed, kept))
    assert (tuned.unpaired, other.unpaired) == (2, 0)
    assert tuned.log.equals(other.log)
    assert "2 of 9 examples left out" in capsys.readouterr().out
    with pytest.raises(MoELensError, match="none of the 9 examples has an original_answer"):
        tune(fresh(tokenizer), EXAMPLES, [], TuneRouters(), once, objective=DPO())


def test_both_answers_have_to_fit(tokenizer):
    lens = fresh(tokenizer)
    long = [replace(CONFLICTS[0], original_answer="x" * 80), *CONFLICTS[1:]]
    longest = max(len(one.input_ids) for one in Prepared.of(lens, CONFLICTS, max_length=None, pairs=True).others)
    fitted = Prepared.of(lens, long, max_length=longest + 3, pairs=True)
    assert (len(fitted.prompts), fitted.dropped) == (8, 1)
    assert [one.id for one in fitted.prompts] == [one.id for one in fitted.others] == [one.id for one in CONFLICTS[1:]]
    with pytest.raises(MoELensError, match="no example is left: with what memory says"):
        Prepared.of(lens, long[:1], max_length=longest + 3, pairs=True)


def test_an_interrupted_training_goes_on_to_the_same_bytes(tokenizer, tmp_path):
    schedule = replace(UNEVEN, learning_rate=2e-2)
    lens, broken, again = (fresh(tokenizer) for _ in range(3))
    method = METHODS["experts"]
    tune(lens, CONFLICTS, [], method, schedule, objective=DPO(BETA))
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 5:  # two batches for the reference, then steps
            raise KeyboardInterrupt

    asked = {"objective": DPO(BETA), "out": tmp_path, "checkpoint_seconds": 0}
    with broken.module.lm_head.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        tune(broken, CONFLICTS, [], method, schedule, **asked)
    [rate] = (tmp_path / "training").iterdir()
    assert len((rate / "log.jsonl").read_text().splitlines()) == 2
    tune(again, CONFLICTS, [], method, schedule, **asked)
    pairs = zip(lens.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(MoELensError, match=r"another run: its beta is 0\.3, here it is 0\.1"):
        tune(fresh(tokenizer), CONFLICTS, [], method, schedule, **asked | {"objective": DPO()})


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_beta_that_makes_no_sense_is_refused(beta):
    with pytest.raises(MoELensError, match=f"beta must be finite and above 0; got {beta}"):
        DPO(beta)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "qwen2_moe", "gpt_oss"])
def test_lora_on_parts_of_layers_reaches_their_matrices_and_nothing_else(tokenizer, family):
    lens = open_family(tokenizer, family)
    before = {name: value.clone() for name, value in lens.module.state_dict().items()}
    expected, _ = lens.run_with_cache(TEXTS)
    of_parts = {}
    for parts in (("attention",), ("mlp",), ("attention", "mlp")):
        with TuneLowRank(TuneParts(parts), 2).attached(lens) as trained:
            torch.testing.assert_close(lens.run_with_cache(TEXTS)[0], expected, rtol=1e-5, atol=1e-5)
        of_parts[parts] = set(trained.changed)
    attention, mlp = of_parts["attention",], of_parts["mlp",]
    assert of_parts["attention", "mlp"] == attention | mlp
    matrices = {name for name, value in before.items() if value.ndim > 1 and ".layers." in name}
    assert all(".self_attn." in name and "_proj" in name for name in attention)
    left = {name.partition(".mlp.")[2] for name in matrices - attention - mlp}
    assert left <= {"gate.weight", "shared_expert_gate.weight", "router.weight"} | {
        f"experts.{field}_proj_bias" for field in ("gate_up", "down")
    }
    assert any("experts.down_proj" in name for name in mlp)
    after = lens.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_parts_that_there_are_not_are_refused():
    for parts in ((), ("router",), ("mlp", "mlp")):
        with pytest.raises(MoELensError, match="attention and mlp, each once"):
            TuneParts(parts)
