"""`python -m moe_lens`: what there is to run."""

import subprocess
import sys

import pytest

import moe_lens
from moe_lens.__main__ import commands, main

NAMES = [
    *("atlas", "compare", "demo", "doctor", "evaluate", "find", "intervene", "measure", "report", "tune"),
    *("organism.measure", "organism.pretrain", "organism.split"),
]


def test_every_command_is_listed_with_one_sentence(capsys):
    assert set(NAMES) <= set(commands())
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == printed
    lines = {line.split()[2]: line for line in printed.splitlines() if line.startswith("  python -m")}
    for name, sentence in commands().items():
        assert sentence
        assert lines[f"moe_lens.{name}"].endswith(sentence)
    assert "--help" in printed


def test_the_listing_needs_no_heavy_package():
    script = "import sys; from moe_lens.__main__ import main; main([]); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert {"torch", "pandas", "typer"}.isdisjoint(printed.splitlines()[-1].split())


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moe_lens {moe_lens.__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tune", "--out", "here"], "got 'tune --out here'; python -m moe_lens.tune --help says"),
        (["evalute"], "python -m moe_lens.evaluate --help says"),
        (["nothing"], "got 'nothing'; python -m moe_lens lists them"),
        (["--version", "x"], "got '--version x'"),
    ],
)
def test_other_words_end_with_exit_code_2(words, says, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
