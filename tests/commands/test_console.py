"""What commands print."""

import math

import pandas as pd

from moe_lens.commands import console


def test_a_table_shows_numbers_of_every_size(capsys):
    values = [0.0, 0.0003, -0.00041, 0.12345, 1500.0, 2009216.0, math.nan]
    console.show(pd.DataFrame({"learning_rate": values, "name": list("abcdefg"), "k": range(7)}), title="Rates")
    printed = capsys.readouterr().out
    assert "Rates" in printed
    assert "learning rate" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0.000", "0.0003", "-0.00041", "0.123", "1500.000", "2,009,216", "–"]
    assert rows[3][1:] == ["d", "3"]
