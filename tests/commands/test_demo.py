"""The demonstration, from the shipped model to its page."""

import sys

import pytest

from moe_lens import demo
from moe_lens.commands import console
from moe_lens.results import read_table


@pytest.mark.slow
def test_the_demonstration_leaves_a_page_with_everything_on_it(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    options = f"--out {out} --epochs 1 --limit 24 --n-random 2"
    monkeypatch.setattr(sys, "argv", ["demo", *options.split()])
    with pytest.raises(SystemExit) as ended:
        console.run(demo.main)
    assert not ended.value.code
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("Answers", "Which experts are used", "Do they cause it", "Training"):
        assert f"<h2>{heading}</h2>" in page
    assert str(out / "report.html") in capsys.readouterr().out
    rows = read_table(out / "masking.parquet").set_index("intervention")
    assert {"none", "ce:4", "oe:4", "planted", "random:4"} <= set(rows.index)
    tasks = read_table(out / "tasks.parquet").set_index(["variant", "task"])
    assert tasks.loc[("router-tuned", "swap"), "em"] > tasks.loc[("base", "swap"), "em"]
