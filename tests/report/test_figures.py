"""Every script of a figure or table runs from end to end on the organism, and draws its table again without a model."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lens.report.contents import SECTIONS
from moe_lens.report.page import build_report
from moe_lens.results import read_provenance, read_table

ANALYSES = Path(__file__).parents[2] / "analyses"
SCRIPTS = sorted([*ANALYSES.glob("figure*.py"), *ANALYSES.glob("table*.py")])
TINY = "--limit 6 --learning-rate 2e-2 --out run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the scripts run, one after another, sharing their work."""
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The base URL of a judge on loopback."""
    pytest.importorskip("openai")
    log = tmp_path_factory.mktemp("judge") / "asked.txt"
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "judge_server.py"), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


def command(monkeypatch, script: Path, options: str) -> int:
    """The exit code of a script, run in this process; no browser is found, so that it writes pages only."""
    monkeypatch.syspath_prepend(str(ANALYSES))
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/browser")
    monkeypatch.setattr(sys, "argv", [str(script), *options.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    return stopped.value.code or 0


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_saves_its_table_and_draws_it_again_without_a_model(script, folder, request, monkeypatch):
    monkeypatch.chdir(folder)
    if "judge" in script.stem:
        monkeypatch.setenv("MOE_LENS_JUDGE", request.getfixturevalue("judge"))
        monkeypatch.setenv("MOE_LENS_JUDGE_MODEL", "grader")
    assert command(monkeypatch, script, TINY) == 0
    item = script.stem.partition("_")[0]
    [table] = [path for path in Path("run", item).glob("*.parquet") if path.name in SECTIONS]
    assert len(read_table(table))
    assert read_provenance(table)["limit"] == 6
    page, written = table.with_name(f"{item}.html"), table.stat().st_mtime_ns
    page.unlink()
    assert command(monkeypatch, script, "--draw-only --model nowhere --out run") == 0
    assert page.stat().st_size > 10_000
    assert table.stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_gallery_shows_what_the_scripts_made(folder, monkeypatch):
    """Of those that have run before in this process, and at least one, which trains."""
    monkeypatch.chdir(folder)
    assert command(monkeypatch, ANALYSES / "figure6_attention_gain.py", TINY) == 0
    made = sorted(path.name for kind in ("figure*", "table*") for path in folder.glob(f"run/{kind}"))
    page = build_report(folder / "run", title="All").read_text(encoding="utf-8")
    assert all(f": {item}<" in page for item in made)


def test_the_judges_table_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOE_LENS_JUDGE", raising=False)
    assert command(monkeypatch, ANALYSES / "table8_judge.py", TINY) == 2
    assert "MOE_LENS_JUDGE" in capsys.readouterr().err
