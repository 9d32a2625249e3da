"""The README keeps its word: its program runs as printed, and its commands, and those of docs/, know their options."""

import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

from moe_lens import lens, load_examples
from moe_lens.lens.interventions import Placed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = sorted(set(re.findall(r"python (-m moe_lens[\w.]*|analyses/[\w/]+\.py)([^`;|\n]*)", README + DOCS)))


@pytest.fixture
def printed_by(tmp_path, monkeypatch, capsys):
    """The lines that the program of that number in a page prints, run as the main program in a folder of its own."""

    def run(number: int, text: str = README) -> list[str]:
        programs = re.findall(r"<!-- program -->\n```python\n(.*?)```", text, flags=re.DOTALL)
        file = tmp_path / "program.py"
        file.write_text(programs[number], encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(file)])
        capsys.readouterr()
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out.strip().splitlines()

    return run


def test_the_first_program_runs_as_printed(printed_by):
    most_used, plain, masked, *facts = printed_by(0)
    assert most_used.startswith("most used: 0:")
    assert plain.removeprefix("answers:").strip() != masked.removeprefix("masked:").strip()
    assert [line.startswith("the context says") for line in facts] == [True] * 3


def test_the_second_program_trains_and_opens_what_it_kept(printed_by, tmp_path):
    *_, rate_and_score, answers = printed_by(1)
    assert float(rate_and_score.split()[-1]) > 0.5  # of 0.02 before
    assert answers.startswith("answers:")
    assert (tmp_path / "RUN" / "chosen" / "delta.json").is_file()


def test_the_intervention_of_ones_own_runs_as_printed_and_is_a_dose(printed_by):
    page = (ROOT / "docs" / "interventions.md").read_text(encoding="utf-8")
    plain, weak, strong = (line.partition(":")[2].split() for line in printed_by(1, page))
    changed = [sum(a != b for a, b in zip(plain, found, strict=False)) for found in (weak, strong)]
    assert changed[0] == 0 < changed[1]


def test_the_worked_example_of_reasoning_gives_rows_whose_answer_comes_after_its_mark(printed_by, tmp_path):
    page = (ROOT / "docs" / "your_own_ability.md").read_text(encoding="utf-8")
    assert printed_by(0, page) == []
    examples = load_examples(tmp_path / "RUN" / "reasoning", split="test")
    assert examples[0].answers == ("Tormorburg #### Tazaa",)
    assert len(examples) > 300
    for example in examples:
        between, _, answer = example.answers[0].partition(" #### ")
        assert example.context.count(between) >= 2, "the fact in between joins two"
        assert answer in example.context


def test_the_patching_map_runs_as_printed_and_ends_at_the_source(printed_by, tmp_path):
    page = (ROOT / "docs" / "interventions.md").read_text(encoding="utf-8")
    *_, before, asked, last = printed_by(0, page)
    assert before.startswith("layer 2, last: ")
    assert asked.startswith("layer 3, question: 0.00")
    assert last.startswith("layer 3, last: 1.00")
    assert (tmp_path / "patching.html").is_file()


def test_the_page_of_interventions_names_every_kind_and_only_those():
    page = (ROOT / "docs" / "interventions.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    kinds = {name for name in lens.__all__ if inspect.isclass(kind := getattr(lens, name)) and issubclass(kind, Placed)}
    assert named == kinds


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_every_command_has_the_options_it_is_shown_with(program, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(ROOT / "analyses")
    with pytest.raises(SystemExit):
        if program.startswith("-m "):
            runpy.run_module(program.removeprefix("-m "), run_name="__main__")
        else:
            monkeypatch.syspath_prepend((ROOT / program).parent)  # as Python itself does for a script
            runpy.run_path(str(ROOT / program), run_name="__main__")
    assert set(re.findall(r"--[a-z][\w-]+", arguments)) <= set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))


def test_every_picture_and_file_it_points_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"`((?:analyses|docs)/[\w./]+)`", README)
    scripts = re.findall(r"python (analyses/[\w./]+)", README)
    assert scripts
    for target in targets + scripts:
        assert (ROOT / target).exists(), target
