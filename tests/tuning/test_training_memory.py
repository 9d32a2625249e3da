"""Training where memory is too small: passes are halved with the step's gradients, or the remedy is told."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import build_model
from limited_memory import out_of_memory_backward_beyond, out_of_memory_beyond
from placed_models import placed
from pretend_device import pretend_devices
from training_cases import EXAMPLES, UNEVEN, fresh, prompts

from moe_lens import MoELens, MoELensError
from moe_lens.tuning import TuneAll, fit, log_table, router_parameters, slices
from moe_lens.tuning.processes import Processes
from moe_lens.tuning.steps import StepData
from moe_lens.tuning.training import _put, _values, dev_score

SCHEDULE = replace(UNEVEN, epochs=1)


def trained(lens: MoELens, schedule=SCHEDULE):
    names = router_parameters(lens)
    log = log_table(fit(lens.module, names, prompts(lens), schedule, pad_id=0))
    return log, [lens.module.get_parameter(name) for name in names]


def test_passes_that_do_not_fit_are_halved_and_the_training_is_that_of_smaller_ones(tokenizer):
    lens, small = fresh(tokenizer), fresh(tokenizer)
    with (
        out_of_memory_backward_beyond(2, lens.module.model.layers[1]),
        pytest.warns(
            UserWarning, match=r"out of memory with 4 of 4 examples .* going on with 2 \(--micro-batch\)"
        ) as told,
    ):
        log, values = trained(lens)
    assert len(told) == 1, "the smaller passes were not kept to"
    expected_log, expected = trained(small, replace(SCHEDULE, micro_batch=2))
    assert log.equals(expected_log)
    assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))


def test_what_halving_cannot_help_says_what_can(tokenizer):
    lens = fresh(tokenizer)
    with (
        out_of_memory_beyond(0, lens.module),
        pytest.warns(UserWarning, match="--micro-batch"),
        pytest.raises(
            MoELensError, match=r"1 of 4 examples of up to \d+ tokens per pass; use --gradient-checkpointing"
        ),
    ):
        trained(lens)
    data = StepData(prompts(lens), SCHEDULE, 0, Processes(0, 2, torch.device("cpu")), nullcontext)
    with (
        out_of_memory_beyond(1, lens.module),
        pytest.raises(MoELensError, match=r"other processes wait .* give a smaller --micro-batch"),
    ):
        data.backward(lens.module, 0, nullcontext())


def test_the_log_likelihood_on_dev_is_measured_in_halves_where_memory_is_too_small(tokenizer):
    lens = fresh(tokenizer)
    score = dev_score(lens, EXAMPLES, "log_likelihood", max_new_tokens=1, whole_model=True)
    with torch.no_grad():
        expected = score.measure()
        with out_of_memory_beyond(4, lens.module), pytest.warns(UserWarning, match="with 4 at a time"):
            assert score.measure() == pytest.approx(expected, rel=1e-6)


def test_experts_of_a_half_precision_model_multiply_in_it_while_all_of_it_is_trained(tokenizer, monkeypatch):
    lens = MoELens.from_pretrained(build_model("olmoe", len(tokenizer)).to(torch.bfloat16), tokenizer)
    seen, own = [], slices._grouped_linear

    def watched(rows, weight, *arguments, **named):
        seen.append((rows.dtype, weight.dtype))
        return own(rows, weight, *arguments, **named)

    monkeypatch.setattr(slices, "_grouped_linear", watched)
    before = lens.module.model.layers[1].mlp.experts.down_proj.clone()
    with TuneAll().attached(lens) as trainable:
        fit(lens.module, trainable.names, prompts(lens)[:2], SCHEDULE, pad_id=0)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert not torch.equal(lens.module.model.layers[1].mlp.experts.down_proj, before)


def test_values_to_go_back_to_are_kept_on_the_cpu_and_come_back_where_they_were(tokenizer):
    with pretend_devices():
        module = placed(build_model("olmoe", len(tokenizer)), "one")
        lens, name = MoELens(module, tokenizer), "model.layers.1.mlp.gate.weight"
        parameter = module.get_parameter(name)
        before, kept = parameter.cpu().clone(), _values(lens, [name])
        assert kept[name].device.type == "cpu"
        with torch.no_grad():
            parameter.zero_()
        assert torch.equal(kept[name], before), "what is kept changes with the parameter"
        _put(lens, kept)
        assert module.get_parameter(name) is parameter
        assert parameter.device.type == "pretend"
        assert torch.equal(parameter.cpu(), before)
