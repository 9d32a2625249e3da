"""LoRA on routers and chosen experts: nothing at first, W + alpha / rank · B A afterwards, and no other bit changes."""

from dataclasses import replace

import pytest
import torch
from conftest import build_model
from safetensors.torch import load_file
from test_methods import ALL_FAMILIES, TEXTS, gradients, open_family, some_experts
from training_cases import EXAMPLES, SCHEDULE, fresh, prompts

from moe_lens import ExpertSet, MoELens, MoELensError
from moe_lens.tuning import (
    Checkpoints,
    DevScore,
    TuneExperts,
    TuneLowRank,
    TuneRouters,
    fit,
    save_trained,
    tune,
)

RANK, ALPHA = 2, 6
EXPERTS = ExpertSet.of({0: [5], 2: [1, 6]})
METHODS = {"routers": TuneRouters(), "experts": TuneExperts(EXPERTS)}


@pytest.fixture(params=METHODS)
def method(request):
    return TuneLowRank(METHODS[request.param], RANK, ALPHA)


def chosen(lens: MoELens, trained) -> dict[str, torch.Tensor]:
    """What a method changes: parameters, or of those in `rows` these experts."""
    own = {name: lens.module.get_parameter(name).detach().clone() for name in trained.changed}
    return {name: value[list(trained.rows[name])] if name in trained.rows else value for name, value in own.items()}


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("what", METHODS)
def test_attaching_changes_nothing_and_leaves_no_trace(tokenizer, family, what):
    lens = open_family(tokenizer, family)
    method = TuneRouters() if what == "routers" else TuneExperts(some_experts(lens))
    with method.attached(lens):
        expected, _ = lens.run_with_cache(TEXTS)
    before = {name: value.clone() for name, value in lens.module.state_dict().items()}
    classes = [type(module) for module in lens.module.modules()]
    with TuneLowRank(method, RANK).attached(lens) as trained:
        assert torch.equal(lens.run_with_cache(TEXTS)[0], expected)
        assert trained.count == sum(lens.module.get_parameter(name).numel() for name in trained.names)
        assert set(trained.changed) <= set(before)
    after = lens.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [type(module) for module in lens.module.modules()] == classes


def test_the_first_gradients_are_full_trainings_seen_through_the_two_matrices(tokenizer, method):
    lens = fresh(tokenizer)
    with method.method.attached(lens) as whole:
        full = gradients(lens, whole.names)
    with method.attached(lens) as trained:
        ours = gradients(lens, trained.names)
        for name, gradient in full.items():
            owner, _, field = name.rpartition(".")
            a, b = (f"{owner}.parametrizations.{field}.0.{part}" for part in "AB")
            expected = ALPHA / RANK * gradient @ lens.module.get_parameter(a).detach().mT
            torch.testing.assert_close(ours[b], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
            assert expected.abs().max() > 0
            assert not ours[a].any()


def test_training_adds_the_scaled_product_to_what_was_chosen_and_changes_no_other_bit(tokenizer, method, tmp_path):
    lens = fresh(tokenizer)
    before = {name: value.clone() for name, value in lens.module.state_dict().items()}
    run = Checkpoints(tmp_path, {})
    with method.attached(lens) as trained:
        decayed = replace(SCHEDULE, weight_decay=0.1)
        course = fit(lens.module, trained.names, prompts(lens), decayed, pad_id=0, checkpoints=run)
        attached, _ = lens.run_with_cache(TEXTS)
    assert course.rows[-1]["loss"] < course.rows[0]["loss"]
    factors = load_file(run.newest)
    assert set(factors) == set(trained.names)
    after = chosen(lens, trained)
    for name in trained.changed:
        owner, _, field = name.rpartition(".")
        field = f"trained_{field}" if trained.rows else field
        a, b = (factors[f"{owner}.parametrizations.{field}.0.{part}"] for part in "AB")
        was = before[name][list(trained.rows[name])] if trained.rows else before[name]
        assert (a.shape[-2], b.shape[-1]) == (RANK, RANK)
        torch.testing.assert_close(after[name], was + ALPHA / RANK * torch.matmul(b, a), rtol=1e-6, atol=1e-6)
        assert not torch.equal(after[name], was)
    for name, value in lens.module.state_dict().items():
        same = value == before[name]
        if name in trained.rows:
            assert same[[i for i in range(8) if i not in trained.rows[name]]].all()
        elif name not in trained.changed:
            assert same.all()
    torch.testing.assert_close(lens.run_with_cache(TEXTS)[0], attached, rtol=1e-5, atol=1e-5)


def test_the_counts_are_rank_times_both_sides_of_every_matrix(tokenizer):
    lens = fresh(tokenizer)
    hidden, inner = 32, lens.module.config.intermediate_size
    of_expert = RANK * (hidden + 2 * inner) + RANK * (inner + hidden)
    for method, count in ((TuneRouters(), 3 * RANK * (8 + hidden)), (TuneExperts(EXPERTS), 3 * of_expert)):
        with TuneLowRank(method, RANK).attached(lens) as trained:
            assert trained.count == count
            assert str(trained).startswith(f"{count:,} of ")
    assert TuneLowRank(TuneRouters(), 4, 12).facts() == {
        "method": "router-lora", "layers": None, "rank": 4, "alpha": 12, "lora_seed": 0,
    }  # fmt: skip


def test_the_same_seed_gives_the_same_bytes_and_an_interrupted_run_goes_on_to_them(tokenizer, method, tmp_path):
    schedule = replace(SCHEDULE, evaluate_every=2)
    results = []
    for seed in (0, 0, 1):
        lens = fresh(tokenizer)
        tuned = tune(lens, EXAMPLES, [], replace(method, seed=seed), schedule)
        results.append(torch.cat([value.flatten() for value in chosen(lens, tuned.trained).values()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])

    def interrupt() -> float:
        raise KeyboardInterrupt

    for dev in (DevScore("dev_em", interrupt), None):
        lens = fresh(tokenizer)
        try:
            with method.attached(lens) as trained:
                run = Checkpoints(tmp_path, {}, every=0)
                fit(lens.module, trained.names, prompts(lens), schedule, pad_id=0, dev=dev, checkpoints=run)
        except KeyboardInterrupt:
            assert run.load()[0].step == 2
    assert torch.equal(torch.cat([value.flatten() for value in chosen(lens, trained).values()]), results[0])


def test_a_delta_holds_the_sums_and_opens_on_the_base(tokenizer, method, tmp_path):
    lens = fresh(tokenizer)
    tuned = tune(lens, EXAMPLES, EXAMPLES[:2], method, SCHEDULE, learning_rates=[1e-3, 2e-2], max_new_tokens=2)
    save_trained(lens.module, tuned.trained, tmp_path, facts=method.facts())
    opened = MoELens.from_pretrained(build_model("olmoe", len(tokenizer)), tokenizer, delta=tmp_path)
    pairs = zip(opened.module.parameters(), lens.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_half_precision_weights_stay_so_and_their_sums_are_learned_in_float32(tokenizer, method):
    lens = MoELens.from_pretrained(build_model("olmoe", len(tokenizer)).to(torch.bfloat16), tokenizer)
    with method.attached(lens) as trained:
        assert {lens.module.get_parameter(name).dtype for name in trained.names} == {torch.float32}
        course = fit(lens.module, trained.names, prompts(lens), SCHEDULE, pad_id=0)
    assert course.rows[-1]["loss"] < course.rows[0]["loss"]
    assert {parameter.dtype for parameter in lens.module.parameters()} == {torch.bfloat16}


def test_a_plain_checkpoint_is_refused_while_sums_are_attached(tokenizer, method, tmp_path):
    lens = fresh(tokenizer)
    with method.attached(lens), pytest.raises(MoELensError, match="leave the training block"):
        lens.module.save_pretrained(tmp_path)
    lens.module.save_pretrained(tmp_path)
    with pytest.raises(MoELensError, match="rank = 0"):
        TuneLowRank(TuneRouters(), rank=0)


def test_peft_computes_the_same_from_the_same_matrices(tokenizer, method):
    """PEFT reaches chosen experts only through their slices, and calls what it wraps by other paths."""
    peft = pytest.importorskip("peft")
    ours, theirs = fresh(tokenizer), fresh(tokenizer)
    targets = ["mlp.gate.weight"]
    if isinstance(method.method, TuneExperts):
        targets = ["mlp.experts.trained_gate_up_proj", "mlp.experts.trained_down_proj"]
    batch = {"input_ids": torch.tensor([ours.tokenizer(TEXTS[0])["input_ids"]])}
    with method.attached(ours) as trained, method.method.attached(theirs):
        generator = torch.Generator().manual_seed(1)
        for name in trained.names:
            ours.module.get_parameter(name).data.normal_(generator=generator)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=targets)
        wrapped = peft.get_peft_model(theirs.module, config)
        layers = {name: module for name, module in wrapped.named_modules() if hasattr(module, "parameter_name")}
        for name, module in layers.items():
            field = module.parameter_name
            owner = name.removeprefix("base_model.model.").replace(".base_layer", "")
            a, b = (ours.module.get_parameter(f"{owner}.parametrizations.{field}.0.{part}") for part in "AB")
            # A [rank · expert, in], by expert; B [out, rank · expert], by rank
            module.lora_A["default"].weight.data = a.detach().flatten(0, -2)
            module.lora_B["default"].weight.data = b.detach() if b.ndim == 2 else b.detach().permute(1, 2, 0).flatten(1)
        assert len(layers) == len(trained.names) // 2
        with torch.no_grad():
            expected, found = wrapped(**batch).logits, ours.module(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
