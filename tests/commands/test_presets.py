"""Presets: what they set, that what the user gives wins, and that it is told."""

import json
import sys
from inspect import signature
from typing import get_args

import pytest

from moe_lens import MoELensError, evaluate, tune
from moe_lens.commands import console
from moe_lens.commands.groups import grouped
from moe_lens.commands.options import EvaluatePreset, epochs_for, steps_between
from moe_lens.commands.presets import PRESETS, Preset, preset_facts
from moe_lens.data.templates import template_named
from moe_lens.paper import script
from moe_lens.tuning import Schedule


def asked(line: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a command gets whose preset is that of evaluate."""
    found: dict[str, object] = {}

    def main(metrics: str = "all", max_new_tokens: int = 16, mode: str = "zero", template: str | None = None,
             decoding: str = "plain", seed: int = 0, preset: EvaluatePreset = None) -> None:  # fmt: skip
        found.update(locals(), tokens=max_new_tokens)

    monkeypatch.setattr(sys, "argv", ["command", *line.split()])
    with pytest.raises(SystemExit) as ended:
        console.run(main)
    if ended.value.code:
        raise ended.value
    return found


def test_a_preset_stands_for_what_is_not_given_and_says_so(monkeypatch, capsys):
    plain = asked("--seed 3", monkeypatch)
    assert (plain["tokens"], plain["mode"], plain["template"], plain["seed"]) == (16, "zero", None, 3)
    found = asked("--preset released --seed 3 --mode zero", monkeypatch)
    assert (found["tokens"], found["template"], found["metrics"]) == (32, "released", "em,f1")
    assert (found["mode"], found["seed"]) == ("zero", 3), "what is given wins, also where it is the default"
    said = capsys.readouterr().out
    assert "preset released, the authors' released code: --metrics em,f1" in said
    assert "--max-new-tokens 32" in said
    assert "given otherwise: --mode" in said
    assert "not reproduced: the model in 4 bits" in said
    asked("--preset paper --quiet", monkeypatch)
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        asked("--preset mine", monkeypatch)
    assert "--preset must be one of paper, released; got 'mine'" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_is_of_an_option_of_its_command(name, monkeypatch):
    mains = []
    monkeypatch.setattr(console, "run", lambda main, **_: mains.append(main))
    script.run(lambda study: None, item="table1", table="tasks", tasks="swap", about="")
    commands = {"tune": tune.main, "evaluate": evaluate.main, "script": mains[0]}
    preset = Preset.named(name)
    assert set(preset.sections) == set(commands)
    for section, main in commands.items():
        options = signature(grouped(main)).parameters
        for method in (None, "router", "ceft", "fft"):
            values = preset.options(section, method)
            assert set(values) <= set(options)
            for option, value in values.items():
                kinds = get_args(get_args(options[option].annotation)[0]) or get_args(options[option].annotation)[:1]
                assert type(value) in kinds or value in kinds, (section, option)
        assert preset.options(section, "fft") == preset.options(section)
    assert "lora_rank" not in preset.options("tune", "fft")


def test_a_presets_file_is_in_the_provenance():
    facts = preset_facts("paper", "tune")["preset"]
    assert facts["options"]["epochs"] == "1,nq-swap=3,confiqa-mc=3"
    assert facts["name"] == "paper"
    json.dumps(preset_facts("released", "script"))
    assert preset_facts(None, "tune") == {}


def test_epochs_may_depend_on_the_data():
    text = "1,nq-swap=3,confiqa-mc=2"
    assert [epochs_for(text, data) for data in ("squad", "nq-swap", "nq-swap@authors:x/y", "confiqa-mc:f.json")] == [
        1, 3, 3, 2,
    ]  # fmt: skip
    assert epochs_for("4", "nq-swap") == 4
    for wrong in ("0", "1,2", "nq-swap=0", "many", ""):
        with pytest.raises(MoELensError, match="--epochs is a number of at least 1"):
            epochs_for(wrong, "squad")
    with pytest.raises(MoELensError, match="--epochs says nothing of squad; give a number for all others, such as 1,"):
        epochs_for("nq-swap=3", "squad")


def test_dev_data_can_be_measured_at_shares_of_a_training():
    schedule = Schedule(epochs=3, batch_size=4, evaluate_every=0.1)  # 75 steps, of which every eighth
    measured = [step + 1 for step in range(75) if schedule.measures_after(step, 100)]
    assert measured == [8, 16, 24, 32, 40, 48, 56, 64, 72, 75]
    assert (steps_between(0.1), steps_between(20.0), steps_between(None)) == (0.1, 20, None)
    with pytest.raises(MoELensError, match=r"whole number of steps, or below 1 a share of all; got 2\.5"):
        steps_between(2.5)


def test_the_released_template_puts_the_texts_on_lines_of_their_own():
    released = template_named("released")
    assert released.with_context.endswith("question.\n\nContext:\n{context}\n\nQuestion:\n{question}")
    assert released.closed_book.endswith("question.\n\nQuestion:\n{question}")
