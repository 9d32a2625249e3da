"""The progress bar in a log, in a terminal, and where it is silenced."""

import io
import sys
import time

import pytest

from moe_lens import progress
from moe_lens.progress import progress_bar, quietly


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(capsys, monkeypatch) -> pytest.CaptureFixture:
    monkeypatch.setattr(progress, "EVERY", 0.1)
    return capsys


def test_a_log_gets_a_plain_line_now_and_then(log):
    started = time.monotonic()
    for step in (bar := progress_bar(range(100), desc="training", unit="step")):
        time.sleep(0.005)
        bar.set_postfix(loss=f"{step:.1f}")
    written = log.readouterr().err
    lines = written.splitlines()
    assert 2 <= len(lines) <= (time.monotonic() - started) / 0.1
    assert written.endswith("\n")
    assert not {"\r", "\x1b", "█"} & set(written)
    assert all(line.startswith("training: ") and "/100 [" in line and "loss=" in line for line in lines)


def test_what_is_quick_leaves_nothing_in_a_log(log):
    with progress_bar(total=100, initial=50) as bar:
        for _ in range(50):
            bar.update()
        bar.set_description("done")
        assert bar.n == 100
    assert list(progress_bar("abc")) == ["a", "b", "c"]
    assert log.readouterr().err == ""


def test_a_line_is_written_without_disturbing_a_log(log):
    with progress_bar(total=2) as bar:
        progress.write("measured")
        bar.update()
    assert log.readouterr() == ("measured\n", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress_bar(range(3), desc="families", unit="family"))
    assert "\rfamilies: 100%" in sys.stderr.getvalue()


@pytest.mark.parametrize("name", ["TQDM_DISABLE", "MOE_LENS_QUIET"])
def test_the_environment_silences_bars(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv(name, "1")
    assert list(progress_bar("abc")) == ["a", "b", "c"]
    progress.write("measured")
    assert sys.stderr.getvalue() == ""
    assert capsys.readouterr().out == ("" if name == "MOE_LENS_QUIET" else "measured\n")


def test_quiet_ends_with_its_block(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "yes")
    with quietly():
        assert progress.is_quiet()
    assert not progress.is_quiet()
    assert progress_bar([1]).disable
