"""The doctor: what it says of a model is so, its exit code is the verdict, and it reads no weight it is not to."""

import json
import sys
from functools import partial

import pytest
import torch
from conftest import build_model
from remote_models import KINDS, remote_folder

from moe_lens import doctor
from moe_lens.checks import CHECKS, PROMPTS, run_checks
from moe_lens.checks.description import describe, numbers
from moe_lens.checks.each import PASSES
from moe_lens.checks.suite import FIRST_PASSES
from moe_lens.checks.survey import survey_families
from moe_lens.commands import console, examining
from moe_lens.lens.interventions import Zero
from moe_lens.lens.lens import MoELens
from moe_lens.tuning import TuneRouters, save_trained


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: its exit code, what it prints, what it says beside that."""

    def started(*arguments):
        monkeypatch.setattr(sys, "argv", ["doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            console.run(doctor.main)
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return started


def test_a_sound_model_passes_every_check(run):
    code, out, err = run("--model", "organism")
    assert code == 0
    assert all(f"{name} " in out for name in CHECKS)
    assert out.count("passed") == len(CHECKS)
    assert "16 routed, 4 per token; 0 shared" in out
    assert f"{FIRST_PASSES + sum(PASSES.values())} of them" in err


def test_a_failing_check_is_exit_code_1(run, monkeypatch):
    monkeypatch.setattr(Zero, "__call__", lambda self, layer, routing: routing)
    code, out, _ = run("--model", "organism", "--checks", "zero,logit_lens")
    assert code == 1
    assert (out.count("failed"), out.count("passed")) == (1, 1)


def test_a_model_whose_code_crashes_has_its_checks_failed(run, monkeypatch):
    def crash(module, *call, **named):
        raise TypeError("not today")

    monkeypatch.setattr("transformers.models.olmoe.modeling_olmoe.OlmoeModel.forward", crash)
    code, out, err = run("--model", "organism", "--checks", "zero")
    assert code == 1
    assert "failed" in out
    assert "the model's own forward pass ends in TypeError: not today" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "cannot load 'nowhere'"),
        (["--model", "organism", "--checks", "zero,foo"], "got foo"),
        (["--model", "organism", "--dtype", "int8"], "dtype must be one of"),
        (["--checks", "zero"], "either --model or --families"),
        (["--model", "organism", "--families"], "either --model or --families"),
        (["--model", "organism", "--markdown", "page.md"], "--markdown needs --families"),
        (["--model", "organism", "--text", ""], "text 0 has no tokens"),
        (["--model", "organism", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["--families", "--config-only"], "--config-only needs --model"),
        (["--families", "--text", "a", "--dtype", "float32", "--device", "cpu"], "--dtype, --device, --text needs"),
        (["--families", "--trust-remote-code"], "--trust-remote-code needs --model"),
        (["--families", "--delta", "run", "--template", "plain"], "--template, --delta needs --model"),
    ],
)
def test_bad_input_is_exit_code_2(run, arguments, said):
    code, _, err = run(*arguments)
    assert code == 2
    assert said in err


def test_json_holds_what_was_found_and_every_check(run):
    code, out, _ = run("--model", "organism", "--json", "--checks", "capture,zero", "--text", "a b", "--text", "c")
    told = json.loads(out)
    lens = MoELens.from_pretrained("organism")
    assert code == 0
    assert told["found"] == json.loads(json.dumps(describe(lens.module, lens.architecture)))
    assert [(row["check"], row["outcome"], row["error"]) for row in told["checks"]] == [
        ("capture", "passed", 0), ("zero", "passed", 0),
    ]  # fmt: skip
    assert told["made_by"]["prompts"] == ["a b", "c"]


def test_a_tuned_model_is_checked_and_named(run, tmp_path):
    lens = MoELens.from_pretrained("organism")
    with TuneRouters().attached(lens) as trained, torch.no_grad():
        lens.module.get_parameter(trained.names[0]).neg_()
    save_trained(lens.module, trained, tmp_path / "router", facts={})
    code, out, _ = run("--model", "organism", "--delta", tmp_path / "router", "--json", "--checks", "zero")
    told = json.loads(out)
    assert code == 0
    assert (told["made_by"]["model"], told["made_by"]["delta"]["name"]) == ("organism", "router")


def test_from_the_configuration_alone_without_weights(run, tmp_path):
    model = build_model("deepseek_v3", 320)
    model.config.save_pretrained(tmp_path)
    code, out, _ = run("--model", tmp_path, "--config-only", "--json")
    found = json.loads(out)["found"]
    assert code == 0
    assert (found["moe_layers"], found["experts"], found["top_k"], found["groups"]) == ([1, 2], 16, 3, [4, 2])
    assert (found["shared_experts"], found["selection_bias"]) == (2, "e_score_correction_bias")
    assert (found["scoring"]["score"], found["scoring"]["scale"]) == ("sigmoid", 2.5)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    code, _, err = run("--model", tmp_path)
    assert code == 2
    assert "tokenizer" in err or "cannot load" in err


@pytest.mark.filterwarnings("ignore:The attention mask API")
def test_a_models_own_code_is_run_only_if_asked_for(run, tmp_path, tokenizer):
    folder = remote_folder(tmp_path / "own", tokenizer, KINDS["choosing"])
    code, _, err = run("--model", folder, "--config-only")
    assert code == 2
    assert "--trust-remote-code" in err
    code, out, _ = run("--model", folder, "--trust-remote-code", "--json")
    outcomes = {row["check"]: row["outcome"] for row in json.loads(out)["checks"]}
    assert code == 0
    # Groups of two experts leave too few to reroute to, and its own attention code shows no rows.
    assert {name for name, outcome in outcomes.items() if outcome == "refused"} == {"reroute", "attention"}
    assert set(outcomes.values()) == {"passed", "refused"}


def test_the_forecast_counts_the_passes_that_are_made(tokenizer):
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer)
    lens.module.generation_config.eos_token_id = lens.module.config.eos_token_id = None
    lens.tokenizer.eos_token = None  # an early end would save some
    for name in CHECKS:
        made = []
        handle = lens.module.model.layers[0].register_forward_hook(lambda *call, made=made: made.append(1))
        run_checks(lens, PROMPTS, names=[name])
        handle.remove()
        assert len(made) == FIRST_PASSES + PASSES[name], name
    assert PASSES.keys() == CHECKS.keys()


def test_numbers_draw_runs_together():
    assert [numbers(x) for x in ([], [3], [0, 1], [0, 2, 3, 4, 7])] == ["none", "3", "0–1", "0, 2–4, 7"]


def test_finding_something_needs_no_weights_in_memory(monkeypatch, run):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    monkeypatch.setattr("moe_lens.lens.opened.load_model", None)
    assert run("--model", "organism:planted", "--config-only")[0] == 0


@pytest.fixture
def three_families(monkeypatch):
    few = partial(survey_families, ["doge", "llama4_text", "mixtral"])
    monkeypatch.setattr(examining, "survey_families", few)


def test_families_are_checked_and_the_page_is_written(run, three_families, tmp_path):
    code, out, _ = run("--families", "--markdown", tmp_path / "MODELS.md")
    assert code == 0
    assert "2 of 3 families are opened" in out
    assert "- `llama4_text`, expert outputs: gating weights scale the experts' inputs" in out
    page = (tmp_path / "MODELS.md").read_text(encoding="utf-8")
    for family, routing, refused in (
        ("mixtral", "softmax, renormalised", ()),
        ("llama4_text", "sigmoid; shared experts", ("top_k", "expert_outputs")),
        ("doge", "not opened", tuple(CHECKS)),
    ):
        marks = " | ".join("–" if name in refused else "✓" for name in CHECKS)
        assert f"| `{family}` | {routing} | {marks} |" in page
    assert "- `doge`, everything: " in page


def test_families_as_json_and_a_failure_among_them(run, three_families, monkeypatch):
    monkeypatch.setattr(Zero, "__call__", lambda self, layer, routing: routing)
    code, out, _ = run("--families", "--json", "--checks", "zero")
    told = json.loads(out)
    assert code == 1
    outcomes = {row["family"]: row["outcome"] for row in told["checks"]}
    assert outcomes == {"doge": "refused", "llama4_text": "failed", "mixtral": "failed"}
    assert set(told["found"]) == {"llama4_text", "mixtral"}


def test_a_checkpoint_without_a_weight_is_no_model_to_check(run, tmp_path, tokenizer):
    model = build_model("olmoe", len(tokenizer))
    del model.model.layers[1].mlp.gate.weight
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, out, err = run("--model", tmp_path)
    assert code == 2
    assert "passed" not in out
    assert "lacks weights of OlmoeForCausalLM: model.layers.1.mlp.gate.weight" in " ".join(err.split())


def test_numbers_that_are_not_finite_are_told_before_any_check(run, tmp_path, tokenizer):
    model = build_model("olmoe", len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, out, err = run("--model", tmp_path, "--checks", "logit_lens")
    assert code == 2
    assert "passed" not in out
    said = " ".join(err.split())
    assert "the model's numbers are not finite: first after layer 1" in said
    assert "NaN or infinity stands in model.layers.1.mlp.experts.down_proj" in said
