"""How training runs: shared steps, checkpoints, interruptions, the best state, and several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_cases import EXAMPLES, SCHEDULE, UNEVEN, fresh, prompts

from moe_lens import ExpertSet, MoELens, MoELensError
from moe_lens.data import collate
from moe_lens.lens.delta import read_facts
from moe_lens.tuning import (
    Checkpoints,
    DevScore,
    Schedule,
    TuneExperts,
    TuneRouters,
    fit,
    log_table,
    router_parameters,
    tune,
)
from moe_lens.tuning.checkpoint import LOG, NEWEST, Progress
from moe_lens.tuning.objective import answer_loss

TESTS = Path(__file__).parents[1] / "support"


#: Adam divides a gradient by its own size, so where one is near 0, adding up in another order shows: one process that
#: takes an example at a time ends 4.5e-6 from one that takes them together. A wrong mean would show at the rate, 5e-3.
ROUNDING = 1e-5


def train(lens: MoELens, schedule: Schedule = UNEVEN, names=None, **options) -> Progress:
    return fit(lens.module, names or router_parameters(lens), prompts(lens), schedule, pad_id=0, **options)


def values(lens: MoELens) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lens.module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


class Scripted:
    """A dev score that gives these numbers, one after another; an exception among them is raised."""

    def __init__(self, *scores: object) -> None:
        self.scores = list(scores)

    def __call__(self) -> float:
        score = self.scores.pop(0)
        if isinstance(score, type):
            raise score
        return score


def test_every_process_gets_as_many_passes_and_together_all_examples_once():
    schedule = Schedule(micro_batch=2)
    passes = [schedule.passes([10, 11, 12, 13, 14], rank=rank, processes=3) for rank in range(3)]
    assert passes == [[[10, 13]], [[11, 14]], [[12]]]
    assert Schedule(micro_batch=1).passes([10, 11, 12], rank=1, processes=2) == [[11], []]
    assert Schedule().passes([10, 11, 12]) == [[10, 11, 12]]


def test_the_dev_data_are_measured_after_each_epoch_or_as_asked_and_at_the_end():
    def measured(schedule: Schedule) -> list[int]:
        return [step for step in range(schedule.steps(9)) if schedule.measures_after(step, 9)]

    assert measured(Schedule(epochs=2, batch_size=4)) == [2, 5]
    assert measured(Schedule(epochs=2, batch_size=4, evaluate_every=4)) == [3, 5]


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_a_step_in_several_passes_is_the_step_in_one(tokenizer, micro_batch):
    whole, parts = fresh(tokenizer), fresh(tokenizer)
    schedule = replace(UNEVEN, batch_size=8, epochs=1)
    expected = log_table(train(whole, schedule))
    course = log_table(train(parts, replace(schedule, micro_batch=micro_batch)))
    assert course["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), rel=1e-6)
    assert course["gradient_norm"].to_numpy() == pytest.approx(expected["gradient_norm"].to_numpy(), rel=1e-5)
    for name, value in values(parts).items():
        torch.testing.assert_close(value, whole.module.get_parameter(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_a_step_is_taken_with_gradients_within_the_bound_and_the_log_has_their_norm_before(tokenizer, bound):
    taken = []

    def note(optimizer, *_):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        taken.append(torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients])).item())

    hook = register_optimizer_step_pre_hook(note)
    try:
        logged = log_table(train(fresh(tokenizer), replace(UNEVEN, max_gradient_norm=bound)))["gradient_norm"]
    finally:
        hook.remove()
    assert logged.between(1e-2, 1e2).all()
    assert taken == pytest.approx([min(bound, norm) for norm in logged], rel=1e-3)


def test_gradient_checkpointing_gives_the_same_values(tokenizer):
    plain, saving = fresh(tokenizer), fresh(tokenizer)
    train(plain, replace(UNEVEN, epochs=1))
    train(saving, replace(UNEVEN, epochs=1, gradient_checkpointing=True))
    assert same(values(plain), values(saving))
    assert not saving.module.is_gradient_checkpointing


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tokenizer, tmp_path, stop):
    scores = [0.5, 0.7, 0.7, 0.2]
    schedule = replace(UNEVEN, evaluate_every=2, epochs=3)
    lens = fresh(tokenizer)
    names = [name for name in values(lens) if "experts" in name or "gate" in name]
    expected = train(lens, schedule, names, dev=DevScore("dev_em", Scripted(*scores, 0.1)))
    broken = fresh(tokenizer)
    run = Checkpoints(tmp_path, {"schedule": repr(schedule)}, every=0 if stop == 2 else 1e9)
    cut = DevScore("dev_em", Scripted(*scores[:stop], KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(broken, schedule, names, dev=cut, checkpoints=run)
    again = fresh(tokenizer)
    course = train(again, schedule, names, dev=DevScore("dev_em", Scripted(*scores[stop:], 0.1)), checkpoints=run)
    assert same(values(lens), values(again))
    assert course.rows == expected.rows
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == list(expected.rows)
    assert sorted(file.name for file in tmp_path.iterdir()) == [LOG, NEWEST]
    finished = fresh(tokenizer)  # and once more: nothing is left to do
    assert train(finished, schedule, names, dev=DevScore("dev_em", Scripted()), checkpoints=run).rows == expected.rows
    assert same(values(lens), values(finished))


def test_ctrl_c_loses_no_whole_step(tokenizer, tmp_path):
    lens, broken, again = (fresh(tokenizer) for _ in range(3))
    expected = train(lens)
    run, calls = Checkpoints(tmp_path, {}, every=1e9), []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the fourth step
            raise KeyboardInterrupt

    with broken.module.lm_head.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        train(broken, checkpoints=run)
    assert run.load()[0].step == 3
    with again.module.lm_head.register_forward_hook(interrupt):
        assert train(again, checkpoints=run).rows == expected.rows
    assert len(calls) - 4 == expected.step - 3
    assert same(values(lens), values(again))


def test_the_best_state_on_dev_is_what_stays_and_patience_ends_the_run(tokenizer):
    short, long = fresh(tokenizer), fresh(tokenizer)
    schedule = replace(UNEVEN, evaluate_every=1, epochs=2)
    scores = {}

    def watched() -> float:
        scores[len(scores) + 1] = values(long)
        return [0.1, 0.6, 0.6, 0.5][len(scores) - 1]

    course = train(long, replace(schedule, patience=2), dev=DevScore("dev_em", watched))
    assert (course.step, course.best_step, course.best_score) == (4, 2, 0.6)
    assert same(values(long), scores[2])
    assert not same(scores[2], scores[4])
    train(short, schedule)  # without dev data the last state stays
    assert not same(values(short), values(long))


def test_another_run_in_the_same_folder_is_refused(tokenizer, tmp_path):
    lens = fresh(tokenizer)
    train(lens, replace(UNEVEN, epochs=1), checkpoints=Checkpoints(tmp_path, {"seed": 0}))
    with pytest.raises(MoELensError, match=r"another run: its seed is 0, here it is 1"):
        train(fresh(tokenizer), checkpoints=Checkpoints(tmp_path, {"seed": 1}))
    (tmp_path / NEWEST).write_bytes(b"torn")
    with pytest.raises(MoELensError, match=r"carries no digest.*; remove the .* to begin this training anew"):
        train(fresh(tokenizer), checkpoints=Checkpoints(tmp_path, {"seed": 0}))


def test_a_folder_that_cannot_be_written_or_is_too_small_is_told_before_training(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    lens = fresh(tokenizer)
    before = values(lens)
    with pytest.raises(MoELensError, match=r"cannot write to the folder .*choose another one"):
        train(lens, checkpoints=Checkpoints(tmp_path / "file" / "run", {}))
    with pytest.raises(MoELensError, match=r"need up to 1000000000\.0 GB"):
        Checkpoints(tmp_path / "run", {}).make_room(10**18)
    assert same(values(lens), before)


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(tokenizer, tmp_path):
    """The file size limit of a process stands in for the disk's end; both fail in the write."""
    resource = pytest.importorskip("resource")
    lens, run = fresh(tokenizer), Checkpoints(tmp_path, {}, every=0)
    course = train(lens, replace(UNEVEN, epochs=1), checkpoints=run)
    kept = (tmp_path / NEWEST).read_bytes()
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(MoELensError, match=f"cannot write .*the last good checkpoint is .*{NEWEST}.*make room"):
            run.save(course, values(lens))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    assert (tmp_path / NEWEST).read_bytes() == kept
    assert sorted(file.name for file in tmp_path.iterdir()) == [LOG, NEWEST]


def test_a_loss_that_leaves_the_numbers_names_the_step_the_examples_and_the_last_good_state(tokenizer, tmp_path):
    lens, run = fresh(tokenizer), Checkpoints(tmp_path, {}, every=1e9)
    schedule = replace(UNEVEN, evaluate_every=2)
    good = {}

    def poison() -> float:
        good.update(values(lens))
        lens.module.model.norm.weight.data[0] = torch.nan
        return 0.0

    with pytest.raises(MoELensError, match=r"loss became nan at step 3 of 6 \(examples .*land-\d.*holds the last good"):
        train(lens, schedule, dev=DevScore("dev_em", poison), checkpoints=run)
    progress, state = run.load()
    assert progress.step == 2
    for name in router_parameters(lens):
        assert torch.equal(state[name], good[name])


def test_torchs_random_numbers_stay_the_callers(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    lens = fresh(tokenizer)
    torch.manual_seed(5)
    train(lens, replace(UNEVEN, epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("setting", "value"), [("return_dict", False), ("output_router_logits", True)])
def test_what_a_config_wants_returned_changes_no_step(tokenizer, setting, value):
    plain, changed = fresh(tokenizer, "mixtral"), fresh(tokenizer, "mixtral")
    setattr(changed.module.config, setting, value)
    train(plain)
    train(changed)
    assert same(values(plain), values(changed))
    assert getattr(changed.module.config, setting) == value


def test_half_precision_float16_is_refused(tokenizer):
    lens = fresh(tokenizer)
    lens.module.half()
    with pytest.raises(MoELensError, match="bfloat16"):
        train(lens)


def test_the_log_likelihood_on_dev_is_the_models_own(tokenizer):
    lens = fresh(tokenizer)
    tuned = tune(lens, EXAMPLES, EXAMPLES[:4], TuneRouters(), replace(SCHEDULE, epochs=1), score="log_likelihood")
    tokens = sum(len(prompt.input_ids) - prompt.prompt_length for prompt in prompts(lens)[:4])
    expected = sum(lens.answer_log_probabilities(EXAMPLES[:4], progress=False)) / tokens
    assert tuned.candidates["dev_log_likelihood"].item() == pytest.approx(expected, rel=1e-5)


def test_a_model_spread_by_a_device_map_trains_to_the_same_values(tokenizer, tmp_path):
    """What is not trained may lie on the disk; on a machine with accelerators, parts lie on several of them."""
    whole = fresh(tokenizer)
    whole.module.save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map = parts | {"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "away"
    )
    spread = MoELens.from_pretrained(module, tokenizer)
    names = router_parameters(whole, [0, 1])
    expected, course = (train(lens, replace(UNEVEN, epochs=1), names) for lens in (whole, spread))
    assert course.rows == expected.rows
    for name in names:
        assert torch.equal(module.get_parameter(name), whole.module.get_parameter(name))
    with pytest.raises(MoELensError, match="moved out of memory by device_map"):
        train(spread, names=router_parameters(spread))


def test_tokens_go_where_the_model_is_now_not_where_a_device_map_had_put_it(tokenizer):
    lens = fresh(tokenizer)
    lens.module.hf_device_map = {"": "meta"}  # what stays when a model that was loaded by a device_map is moved
    batch = collate(prompts(lens)[:2], lens.tokenizer.pad_token_id)
    assert answer_loss(lens.module, batch).isfinite()


@pytest.mark.slow
def test_two_processes_agree_with_one_also_split_and_resumed(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    lens = fresh(tokenizer, num_hidden_layers=2)
    losses = log_table(train(lens, names=list(values(lens))))["loss"].to_numpy()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])  # for its conftest
    run = subprocess.run(
        [*command, TESTS / "two_processes.py", tmp_path],
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for way in ("ddp", "fsdp"):
        found, resumed = (load_file(tmp_path / name / "values.safetensors") for name in (way, f"{way}-resumed"))
        assert same(found, resumed)
        assert found.pop("losses").numpy() == pytest.approx(losses, rel=1e-6)
        for name, value in values(lens).items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=ROUNDING)
    copied, split = (load_file(tmp_path / way / "peaked.safetensors") for way in ("ddp", "fsdp"))
    for name, value in copied.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=ROUNDING)
    alone = fresh(tokenizer, num_hidden_layers=2)
    method = TuneExperts(ExpertSet.of({0: [1, 2, 5], 1: [4]}))
    tuned = tune(alone, EXAMPLES, EXAMPLES[:5], method, UNEVEN, max_new_tokens=2)
    for way in ("ddp", "fsdp"):
        delta = tmp_path / f"{way}-experts"
        opened = MoELens.from_pretrained(fresh(tokenizer, num_hidden_layers=2).module, tokenizer, delta=delta)
        for name, value in values(alone).items():
            torch.testing.assert_close(opened.module.get_parameter(name), value, rtol=0, atol=ROUNDING)
        assert read_facts(delta)["scores"] == tuned.candidates["dev_em"].tolist()


ROUTER = "--method router --learning-rate 5e-3"
#: Also the routers' stage before it, which is finished when the experts' is killed.
EXPERTS = "--method ceft --experts ce:2 --lora-rank 2 --router-rate 1e-2 --learning-rate 5e-3"


@pytest.mark.slow
@pytest.mark.parametrize("method", [ROUTER, pytest.param(EXPERTS, marks=pytest.mark.long)])
def test_a_killed_command_given_again_ends_with_the_same_bytes(tmp_path, method):
    def command(out: str) -> list[str]:
        options = f"{method} --model organism --data swap --limit 12 --epochs 2 --batch-size 2"
        fast = "--score log_likelihood --evaluate-every 3 --checkpoint-seconds 0 --max-new-tokens 1"
        return [sys.executable, "-m", "moe_lens.tune", *options.split(), *fast.split(), "--out", str(tmp_path / out)]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=300)
    log = tmp_path / "killed" / "training" / "rate-0.005" / LOG
    lengths = []
    for wanted in (2, 7):  # killed twice, at different places
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= wanted):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        lengths.append(len(log.read_text().splitlines()))
    assert lengths[0] < lengths[1] < 12
    subprocess.run(command("killed"), check=True, capture_output=True, timeout=300)
    for file in ("delta.safetensors", f"training/rate-0.005/{LOG}"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *("--method router --lora-rank 2", "--method router --objective dpo", "--method ceft --router-delta routers"),
        *(pytest.param(f"--method {own}", marks=pytest.mark.long) for own in ("ceft --experts 0:1,5;1:2", "esft")),
    ],
)
def test_a_command_on_two_processes_splits_the_model_and_writes_the_same_delta(tokenizer, tmp_path, method):
    fresh(tokenizer).module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"context": e.context, "question": e.question, "answer": e.answers[0]} for e in EXAMPLES]
    rows = [row | {"original_answer": f"no, {place}"} for place, row in enumerate(rows)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    options = "--model model --data data.json --dev data.json --epochs 2 --batch-size 4"
    rest = "--learning-rate 5e-3 --score log_likelihood --max-new-tokens 2 --merge"
    torchrun = "-m torch.distributed.run --nproc-per-node=2 --standalone"
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    runs = [("routers", "", "--method router")] if "routers" in method else []
    for out, launcher, own in (*runs, ("one", "", method), ("two", torchrun, f"{method} --shard")):
        line = f"{launcher} -m moe_lens.tune {options} {rest} {own} --out {out}"
        run = subprocess.run(
            [sys.executable, *line.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
    one, two = (load_file(tmp_path / out / "delta.safetensors") for out in ("one", "two"))
    assert list(one) == list(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=ROUNDING)
    merged = MoELens.from_pretrained(tmp_path / "two" / "merged").module
    opened = MoELens.from_pretrained(tmp_path / "model", delta=tmp_path / "two").module
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), opened.parameters(), strict=True))
