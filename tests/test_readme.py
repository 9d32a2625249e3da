"""The README keeps its word: its program runs as printed, and its commands, and those of docs/, know their options."""

import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from string import Template

import pandas as pd
import pytest

from moe_lens import Example, ExpertSet, lens, load_examples
from moe_lens.commands import console
from moe_lens.commands.groups import grouped
from moe_lens.lens.interventions import Placed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))]
OUTSIDE = {"M": "--model allenai/OLMoE-1B-7B-0924-Instruct", "OUT": "runs/olmoe"}
"""Of the shell's variables in docs/paper.md those that a table there gives."""


def commands(page: str) -> Iterator[tuple[str, ...]]:
    """The commands with arguments that a page prints, in blocks and in its text, as the shell hands them over."""
    page = re.sub(r"\\\n\s*", "", page)
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if language in ("", "bash") for line in block.splitlines()]
    variables = OUTSIDE | dict(re.findall(r'^(\w+)="?([^"\n]+)"?$', "\n".join(lines), re.MULTILINE))
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    for line in [*lines, *(" ".join(span.split()) for span in spans)]:
        while "$" in line and (whole := Template(line).safe_substitute(variables)) != line:
            line = whole
        found = re.match(r"(?:\w+=\S+ +)*python (-m moe_lens[\w.]*|analyses/[\w/]+\.py) (.+)", line)
        if found:
            yield found[1], *shlex.split(found[2], comments=True)


COMMANDS = sorted({command for page in PAGES for command in commands(page) if len(command) > 1})


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


def test_a_statistic_and_a_score_of_ones_own_run_as_printed(printed_by, tmp_path):
    page = (ROOT / "docs" / "your_own_parts.md").read_text(encoding="utf-8")
    [printed] = printed_by(0, page)
    experts = ExpertSet.from_json((tmp_path / "certain.json").read_text(encoding="utf-8"))
    assert str(experts) == printed
    assert [len(experts[layer]) for layer in range(4)] == [2, 2, 2, 2]
    scope: dict[str, Callable[..., float]] = {}
    exec(re.search(r"```python\n(# my_scores.*?)```", page, re.DOTALL)[1], scope)
    assert scope["words"]("in Paris", Example("0", "", "Where?", ("Paris France",))) == 0.5


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


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_understood_as_printed(command, monkeypatch, capsys):
    """Its options are there and take these values, and none that must be given lacks; what it does then is left out."""
    program, *arguments = command
    ran = []

    def without_what_it_does(main: Callable[..., None]) -> Callable[..., None]:
        return grouped(wraps(main)(lambda **values: ran.append(values)))

    monkeypatch.setattr(console, "grouped", without_what_it_does)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.syspath_prepend(ROOT / "analyses")
    with pytest.raises(SystemExit) as end:
        if program.startswith("-m "):
            runpy.run_module(program.removeprefix("-m "), run_name="__main__")
        else:
            monkeypatch.syspath_prepend((ROOT / program).parent)  # as Python itself does for a script
            runpy.run_path(str(ROOT / program), run_name="__main__")
    assert end.value.code == 0, capsys.readouterr().err
    assert len(ran) == (arguments != ["--help"])


def test_commands_are_read_whole():
    """Continued lines, comments, variables and what is quoted, in blocks and in the text."""
    page = """Say `python -m moe_lens.tune --data a` or:

```bash
P="--preset paper"
A=1 python -m moe_lens.find $P --data 'contrast(a;b):4' \\
    --out RUN  # so
python other.py
```
"""
    assert list(commands(page)) == [
        ("-m moe_lens.find", "--preset", "paper", "--data", "contrast(a;b):4", "--out", "RUN"),
        ("-m moe_lens.tune", "--data", "a"),
    ]


@pytest.mark.slow
def test_the_first_hour_runs_as_printed(tmp_path):
    """Its programs and commands, one after the other; the finding and the change that it promises come."""
    page = (ROOT / "docs" / "first_hour.md").read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        runs = [["-c", block]] if language else [shlex.split(line)[1:] for line in block.splitlines()]
        for arguments in runs:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
            )
            assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    table = pd.read_parquet(tmp_path / "RUN" / "masked" / "masking.parquet")
    chosen = table[table["family"] != "random"].query("task == 'novel' and size > 0").iloc[0]
    assert chosen["below_random_low"] > 0
    em = [
        pd.read_parquet(tmp_path / "RUN" / name / "summary.parquet").set_index("metric").at["em", "mean"]
        for name in ("answers", "tuned")
    ]
    assert em[0] == 0 < 0.2 < em[1]
    assert "<html" in (tmp_path / "RUN" / "report.html").read_text(encoding="utf-8")


def test_every_picture_and_file_it_points_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"`((?:analyses|docs)/[\w./]+)`", README)
    scripts = re.findall(r"python (analyses/[\w./]+)", README)
    assert scripts
    for target in targets + scripts:
        assert (ROOT / target).exists(), target
