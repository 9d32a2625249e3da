"""What commands print."""

import math
import re

import pandas as pd

from moe_lens.commands import console


def printed(capsys, table: pd.DataFrame, title: str = "Title") -> list[list[str]]:
    """The cells that `show` prints, row by row below the heading."""
    console.show(table, title=title)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in lines if line[:1] in "│┃"]


def test_a_table_shows_numbers_of_every_size(capsys):
    values = [0.0, 0.0003, -0.00041, 0.12345, 1500.0, 2009216.0, math.nan]
    console.show(pd.DataFrame({"learning_rate": values, "name": list("abcdefg"), "k": range(7)}), title="Rates")
    text = capsys.readouterr().out
    assert "Rates" in text
    assert "learning rate" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0.000", "0.0003", "-0.00041", "0.123", "1500.000", "2,009,216", "–"]
    assert rows[3][1:] == ["d", "3"]


def test_counts_are_printed_whole_and_scores_are_not(capsys):
    table = pd.DataFrame({"size": [4.0, math.nan], "n": [40, 7], "em": [1.0, 0.0]})
    assert printed(capsys, table)[1:] == [["4", "40", "1.000"], ["–", "7", "0.000"]]
    assert printed(capsys, pd.DataFrame({"size": [1.5, 2.0]}))[1:] == [["1.500"], ["2.000"]]


def test_what_says_nothing_is_left_out(capsys):
    table = pd.DataFrame({"task": ["novel", None], "memory": [None, None], "f1": [0.5, math.nan]})
    assert printed(capsys, table) == [["task", "f1"], ["novel", "0.500"]]
    long = pd.DataFrame({"metric": ["em", "memory"], "n": [40, 0], "mean": [0.5, math.nan]})
    assert printed(capsys, long) == [["metric", "n", "mean"], ["em", "40", "0.500"]]
    assert printed(capsys, long[1:]) == [["metric", "n", "mean"], ["memory", "0", "–"]]
    assert printed(capsys, long[:0]) == [["metric", "n", "mean"]]


def test_random_sets_are_named_for_people(capsys):
    names = ["random:2", "random~0x2+1x1", "random~0x2+1x2+3x1#4"]
    assert printed(capsys, pd.DataFrame({"intervention": names}))[1:] == [
        ["random:2"],
        ["random, 2 in layer 0 and 1 in layer 1"],
        ["random, 2 in layers 0, 1 and 1 in layer 3, set 4"],
    ]


def test_a_title_keeps_its_line_and_brackets_stay(capsys):
    console.show(pd.DataFrame({"detail": ["[/bold] :smile:"]}), title="A title longer than its table [b]")
    text = capsys.readouterr().out
    assert text.startswith("A title longer than its table [b]\n")
    assert "[/bold] :smile:" in text


def test_a_narrow_terminal_cuts_no_cell_and_no_heading(capsys, monkeypatch):
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    columns = {f"below_random_{name}": [0.125, -0.25] for name in ("low", "high", "p", "rank", "mean", "other")}
    names = ["contrast(novel;swap):4", "attribution-integrated-from_question(answer):4"]
    console.show(pd.DataFrame({"score": names, **columns}), title="Title")
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("-0.250") == len(columns)
    assert text.count(names[0]) == text.count(names[1][-10:]) == 2, "each part begins with the first column"
