"""Every command takes prompts without a context, and whole texts, by the names of their columns; thoughts too."""

import json
import sys
from pathlib import Path

import pytest
from conftest import CORPUS, build_model

from moe_lens import MoELens, evaluate, find, intervene, tune
from moe_lens.commands import console
from moe_lens.results import read_provenance, read_table

ROWS = [
    {"ask": f"{text} Go on.", "context": "not read", "gold": gold}
    for text, gold in zip(CORPUS, ("so: one", "so: two", "no mark"), strict=True)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer) -> Path:
    """A folder with a tiny model, and its data as a file for each split."""
    folder = tmp_path_factory.mktemp("home")
    build_model("olmoe", len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "dev", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture
def run(home, monkeypatch):
    """A command in this process, on that model and data; without a browser, which takes seconds."""
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    monkeypatch.chdir(home)

    def started(command, options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["command", *f"--model model --data data {options}".split()])
        with pytest.raises(SystemExit) as ended:
            console.run(command.main)
        assert not ended.value.code

    return started


@pytest.mark.parametrize("kind", ["prompt", "verbatim"])
def test_every_command_takes_prompts_as_they_are_by_the_name_of_their_column(run, home, kind, tmp_path):
    columns = f"--columns {kind}=ask,answer=gold --max-new-tokens 3 --answer-after so:"
    run(evaluate, f"{columns} --mask reap:1 --positions thought --out {tmp_path}/answers")
    answers = read_table(tmp_path / "answers" / "answers.parquet")
    plain = answers[answers["intervention"] == "none"]["prediction"].tolist()
    texts = [row["ask"] for row in ROWS]
    lens = MoELens.from_pretrained(str(home / "model"))
    assert plain == [said.strip() for said in lens.generate(texts, max_new_tokens=3, progress=False)]
    assert read_provenance(tmp_path / "answers" / "answers.parquet")["template"]["answer_after"] == "so:"
    tuning = "--method router --epochs 1 --learning-rate 2e-2 --score log_likelihood"
    run(tune, f"{columns} {tuning} --out {tmp_path}/router")
    chosen = "--experts ce-last:1 --control random:2"
    run(intervene, f"{columns} --delta {tmp_path}/router {chosen} --positions answer --out {tmp_path}/masks")
    assert {"none", "ce-last:1"} <= set(read_table(tmp_path / "masks" / "answers.parquet")["intervention"])
    run(find, f"{columns} --score reap --size 1 --parts 2 --control random:2 --out {tmp_path}/found")
    assert read_table(tmp_path / "found" / "scores.parquet")["score"].tolist() == ["reap:1"]
