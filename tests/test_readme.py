"""The README keeps its word: its program runs as printed, and its commands know the options they are given."""

import re
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`?python -m (moe_lens[\w.]*)((?: [^`\n]*)?)", README)


def test_the_program_runs_as_printed(tmp_path):
    [program] = re.findall(r"<!-- program -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    run = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    most_used, plain, masked = run.stdout.strip().splitlines()
    assert most_used.startswith("most used: 0:")
    assert plain.removeprefix("answers:").strip() != masked.removeprefix("masked:").strip()


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_every_command_has_the_options_it_is_shown_with(module, arguments):
    known = {f"--{name.replace('_', '-')}" for name in signature(import_module(module).main).parameters}
    assert set(re.findall(r"--[\w-]+", arguments)) <= known


def test_every_picture_and_file_it_points_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"`((?:analyses|docs)/[\w./]+)`", README)
    scripts = re.findall(r"python (analyses/[\w./]+)", README)
    assert scripts
    for target in targets + scripts:
        assert (Path(__file__).parents[1] / target).exists(), target
