"""Groups of options: one parameter of a command, one option for each of their fields."""

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Annotated

import pytest
from typer import Option

import moe_lens
import moe_lens.doctor
import moe_lens.evaluate
import moe_lens.intervene
import moe_lens.tune
from moe_lens import MoELensError
from moe_lens.checks import CHECKS
from moe_lens.commands import console
from moe_lens.commands.groups import grouped
from moe_lens.commands.options import Opening, Reading
from moe_lens.commands.stages import ESFT_DEFAULT
from moe_lens.data.counterparts import COUNTERPARTS
from moe_lens.lens import MODES, SITES
from moe_lens.progress import is_quiet, progress_bar


@dataclass(frozen=True)
class Fruit:
    """A group with a field of each kind."""

    name: Annotated[str, Option(help="What it is called.")]
    count: Annotated[int, Option(min=1, help="How many there are.")] = 1
    ripe: Annotated[bool, Option("--ripe", help="It can be eaten.")] = False

    def __post_init__(self) -> None:
        if self.name == "stone":
            raise MoELensError("--name must be a fruit; got a stone")


def asked(main: Callable[..., None], line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["command", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        console.run(main)
    return stopped.value.code


def test_a_group_is_put_together_from_its_options(monkeypatch):
    taken = []

    def main(fruit: Fruit, where: str, reading: Reading = Reading(max_length=300)) -> None:
        taken.append((fruit, where, reading))

    assert asked(main, "here --name fig", monkeypatch) == 0
    assert asked(main, "here --name fig --count 3 --ripe --max-length 5 --skip-bad", monkeypatch) == 0
    read = Reading(max_length=300)
    assert taken == [
        (Fruit("fig"), "here", read),
        (Fruit("fig", 3, ripe=True), "here", replace(read, max_length=5, skip_bad=True)),
    ]


def test_a_default_gives_those_of_all_fields(monkeypatch, capsys):
    taken = []

    def main(fruit: Fruit = Fruit("fig", count=2)) -> None:
        taken.append(fruit)

    assert asked(main, "", monkeypatch) == 0
    assert asked(main, "--count 5", monkeypatch) == 0
    assert taken == [Fruit("fig", 2), Fruit("fig", 5)]
    assert asked(lambda fruit: None, "", monkeypatch) == 2


def test_options_that_must_be_given_come_first():
    def main(fruit: Fruit, opening: Opening, out: str) -> None: ...

    names = list(signature(grouped(main)).parameters)
    assert names[:4] == ["name", "model", "out", "count"]
    assert names[-2:] == ["quiet", "version"]


@pytest.mark.parametrize(
    ("line", "says"),
    [("--name stone", "error: --name must be a fruit"), ("--name fig --count 0", "'--count'"), ("", "'--name'")],
)
def test_what_a_group_refuses_ends_with_exit_code_2(line, says, monkeypatch, capsys):
    def main(fruit: Fruit) -> None:
        raise AssertionError("the command ran")

    assert asked(main, line, monkeypatch) == 2
    assert says in capsys.readouterr().err


def test_help_shows_the_fields_like_other_options(monkeypatch, capsys):
    def main(fruit: Fruit = Fruit("fig", count=7)) -> None:
        """Eat it."""

    assert asked(main, "--help", monkeypatch) == 0
    printed = capsys.readouterr().out
    for text in ("Eat it.", "--name", "What it is called.", "[default: fig]", "--count", "7", "--ripe", "--quiet"):
        assert text in printed


@pytest.mark.parametrize("columns", [80, 160])
def test_help_has_whole_names_and_values_however_wide_the_terminal(columns, monkeypatch, capsys):
    def main(
        gradient_checkpointing_of_layers: Annotated[str, Option(help="Such as question=q,answer=gold_answer_of_it.")],
    ) -> None:
        """Train.

        \b
            python -m one --option a_word_without_any_end_that_is_rather_long --another \\
                --and so_on
        """

    monkeypatch.setenv("COLUMNS", str(columns))
    assert asked(main, "--help", monkeypatch) == 0
    printed = capsys.readouterr().out
    for text in ("--gradient-checkpointing-of-layers", "question=q,answer=gold_answer_of_it", "rather_long --another"):
        assert text in printed


def test_the_names_of_the_options_are_the_commands_own():
    def main(opening: Opening, reading: Reading) -> None: ...

    assert set(signature(grouped(main)).parameters) == {
        *("model", "delta", "dtype", "device", "parallel", "trust_remote_code", "template"),
        *("demonstrations", "system_prompt", "chat_template_kwargs", "answer_after"),
        *("columns", "skip_bad", "max_length", "too_long", "quiet", "version"),
    }


def test_every_command_tells_its_version_whatever_else_it_needs(monkeypatch, capsys):
    def main(fruit: Fruit) -> None: ...

    assert asked(main, "--version", monkeypatch) == 0
    assert capsys.readouterr().out == f"moe_lens {moe_lens.__version__}\n"


def test_quiet_holds_for_the_command_alone(monkeypatch, capsys):
    def main() -> None:
        console.say("chatter")
        print("result", is_quiet(), progress_bar([1]).disable)

    assert asked(main, "--quiet", monkeypatch) == 0
    assert asked(main, "", monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["result True True", "chatter", "result False False"]
    assert captured.err == ""


@pytest.mark.parametrize("command", [moe_lens.doctor, moe_lens.evaluate, moe_lens.intervene, moe_lens.tune])
def test_lists_that_helps_write_out_are_complete(command):
    """Helps open no heavy room, so what they list is written down; here it is compared."""
    helps = {
        name: " ".join(info.help for info in parameter.annotation.__metadata__ if hasattr(info, "help"))
        for name, parameter in signature(grouped(command.main)).parameters.items()
        if hasattr(parameter.annotation, "__metadata__")
    }
    if "checks" in helps:
        assert helps["checks"] == f"With commas, of {', '.join(CHECKS)}; default all."
    elif "mode" in helps:
        assert [mode for mode in re.findall(r"[a-z]+", helps["mode"]) if mode in MODES] == list(MODES)
    else:
        assert f"for esft {ESFT_DEFAULT}." in helps["experts"]
    if "patch" in helps:
        assert list(dict.fromkeys(re.findall("|".join(SITES), helps["what"]))) == list(SITES)
        assert all(f"{name} (" in helps["patch"] or f"{name}," in helps["patch"] for name in COUNTERPARTS)


def test_a_warning_is_one_line(monkeypatch, capsys):
    def main() -> None:
        warnings.warn("it is late", stacklevel=1)

    usual = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: sys.stderr.write(
            warnings.formatwarning(message, category, filename, lineno, line)
        )
        assert asked(main, "", monkeypatch) == 0
    assert capsys.readouterr().err == "warning: it is late\n"
    assert warnings.formatwarning is usual
