"""A lens whose model runs on a server: what it sends and gets back, and what it refuses to send."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from nnsight.modeling.huggingface import _ID_CACHE
from remote_models import KINDS, remote_folder

from moe_lens import ExpertSet, ExpertUsage, MoELens, MoELensError
from moe_lens.data import Example
from moe_lens.lens import (
    CAPTURES,
    AddVector,
    Bias,
    Force,
    LogitBias,
    Patch,
    ProjectOut,
    Renormalize,
    Reroute,
    RouteAs,
    Rows,
    Run,
    Scale,
    SetTo,
    Steer,
    TopK,
    Zero,
)
from moe_lens.lens.record import Record

EXAMPLES = [Example(str(n), f"The cat {n} sat.", "Where is the dog?" * (1 + n), ("mat", "sun")[n:]) for n in range(2)]
TEXTS = [example.question for example in EXAMPLES]
SENT = [name for name, capture in CAPTURES.items() if not capture.no_remote]


def tensors(record: Record) -> dict[str, torch.Tensor]:
    """All that a record holds of the model, by a name for each tensor."""
    routing = {"after": record.routing, "before": record.routing_before}
    found = {
        f"{when} {layer} {part}": getattr(own, part)
        for when, layers in routing.items()
        for layer, own in layers.items()
        for part in ("logits", "indices", "weights")
    }
    for name in set(record.captured) - {"routing"}:
        found |= {f"{name} {layer}": value for layer, value in record.captured[name].items()}
    return found | ({} if record.logits is None else {"logits": record.logits})


def expect_same(here: MoELens, there: MoELens, captures: list[str], *changes: object) -> None:
    with here.intervene(*changes):
        [own] = here.records(EXAMPLES, capture=captures, positions={"context", "last"})
    with there.intervene(*changes):
        [sent] = there.records(EXAMPLES, capture=captures, positions={"context", "last"})
    mine, theirs = tensors(own), tensors(sent)
    assert set(mine) == set(theirs)
    again = {name for name in mine if name.startswith("expert_outputs")}  # come of a second call there
    torch.testing.assert_close([theirs[name] for name in again], [mine[name] for name in again])
    assert [name for name in mine.keys() - again if not torch.equal(mine[name], theirs[name])] == [], changes


def experts_of(lens: MoELens, *ids: int) -> ExpertSet:
    return ExpertSet.of(dict.fromkeys(lens.architecture.moe_layers, ids))


def stacks_of(lens: MoELens) -> list[tuple[object, ...]]:
    """Every kind of intervention that can be sent, several at once where they can act together."""
    experts, vector = experts_of(lens, 0, 2), torch.ones(lens.architecture.d_model)
    biases = {1: torch.arange(lens.architecture.n_experts).float()}
    return [
        (Zero(experts),),
        (Bias(experts, 3.0), Renormalize(experts, positions="context")),
        (Bias(experts, 3.0, weights="unbiased"), Scale(experts, 2.0)),
        (Reroute(experts),),
        (Force(experts, weights="sum"),),
        (Force(experts_of(lens, 1), positions="last"), LogitBias(biases)),
        (TopK(2), Steer(experts)),
        (SetTo({1: vector}, positions="last"), AddVector(2, vector), ProjectOut(vector, layers=(2,))),
    ]


@pytest.fixture(scope="module")
def here(whole):
    return MoELens.from_pretrained(whole)


@pytest.fixture(scope="module")
def rehearsed(whole):
    return MoELens.from_pretrained(whole, remote="local")


def test_what_is_sent_and_comes_back_is_what_a_model_here_gives(here, rehearsed):
    expect_same(here, rehearsed, SENT)
    expect_same(here, rehearsed, ["routing"], Reroute(experts_of(here, 1)), Scale(experts_of(here, 0, 2), 0.5))


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda lens: lens.records(TEXTS, capture=["attention"]), "gives no attention"),
        (lambda lens: lens.run_with_cache(TEXTS, capture=["attention"]), "gives no attention"),
        (lambda lens: lens.generate(TEXTS), "to generate"),
        (lambda lens: lens.project_on_vocab(torch.zeros(lens.architecture.d_model)), "to project"),
        (lambda lens: [*lens.gradients(EXAMPLES, lambda *_: None)], "to take gradients"),
        (lambda lens: lens.answer_log_probabilities_under(EXAMPLES, [Zero(experts_of(lens, 1))]), "to resume passes"),
    ],
)
def test_what_a_server_cannot_do_is_refused_before_anything_is_sent(rehearsed, work, reason, monkeypatch):
    monkeypatch.setattr(type(rehearsed.model), "trace", None)
    with pytest.raises(MoELensError, match=reason):
        work(rehearsed)


def test_a_lens_that_runs_its_model_here_is_not_sent_to_a_server(here):
    with pytest.raises(MoELensError, match="opened for one"), here.model.trace(TEXTS, remote="local"):
        here.router_logits[1].save()
    with (
        pytest.raises(MoELensError, match="opened for one"),
        here.intervene(TopK(2)),
        here.model.trace(TEXTS, remote="local"),
    ):
        here.model.output.logits.save()


def test_interventions_that_a_server_cannot_have_are_refused_before_the_block(here, rehearsed):
    refused = Rows((TopK(2), None)), Patch(Run(here, EXAMPLES)), RouteAs(here)
    for own in refused:
        with pytest.raises(MoELensError, match="cannot act in a model on a server"), rehearsed.intervene(own):
            pass


def test_a_model_of_a_server_is_opened_without_its_weights(whole, here, tokenizer, tmp_path):
    lens = MoELens.from_pretrained(whole, remote=True)
    assert {parameter.device.type for parameter in lens.module.parameters()} == {"meta"}
    assert lens.architecture == here.architecture
    assert "on a server (True)" in repr(lens)
    with pytest.raises(MoELensError, match="has its weights there"):
        MoELens.from_pretrained(whole, remote=True, device_map="cpu")
    folder = remote_folder(tmp_path / "listed", tokenizer, KINDS["choosing"])
    with pytest.raises(MoELensError, match="lists its experts one by one"):
        MoELens.from_pretrained(folder, remote=True, trust_remote_code=True)


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def served(request, tokenizer, tmp_path_factory):
    """A lens with a model's weights and one without them, of a server in a process that cannot import moe_lens."""
    folder = tmp_path_factory.mktemp("served") / request.param
    build_model(request.param, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    script = Path(__file__).parents[1] / "support" / "elsewhere.py"
    _ID_CACHE[str(folder)] = str(folder)  # else the hub is asked how it spells the name
    with subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            yield MoELens.from_pretrained(folder), MoELens.from_pretrained(folder, remote=address)
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_server_without_this_package_gives_bit_for_bit_what_a_model_here_gives(served):
    here, there = served
    expect_same(here, there, SENT)
    for stack in stacks_of(here):
        expect_same(here, there, ["routing", "residual", "logits"], *stack)


@pytest.mark.slow
def test_answers_and_statistics_of_a_server_are_those_of_a_model_here(served):
    here, there = served
    usage = [lens.measure(EXAMPLES, ExpertUsage(), progress=False)[0].table() for lens in served]
    assert usage[0].equals(usage[1])
    with here.intervene(Zero(experts_of(here, 1))), there.intervene(Zero(experts_of(here, 1))):
        answers = [lens.answer_log_probabilities(EXAMPLES, progress=False) for lens in served]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_traces_of_ones_own_read_a_servers_model_by_the_lens_and_are_under_its_interventions(served):
    found = []
    for lens in served:
        with torch.no_grad(), lens.intervene(Reroute(experts_of(lens, 1))):
            with lens.model.trace(TEXTS, remote=lens.remote):
                experts = lens.selected_experts[1].save()
                lens.gating_weights[1] = lens.gating_weights[1] / 2
                logits = lens.model.output.logits.save()
            with lens.model.generate(TEXTS, max_new_tokens=4, remote=lens.remote) as tracer:
                said = tracer.result.save()
        found.append((experts, logits, said))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))
    assert not (found[1][0] == 1).any()
