"""Results on disk: the same bytes for the same input, whole files only, provenance that travels along."""

import hashlib
import json
import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import save_delta
from moe_lens.results import (
    claim,
    kept,
    provenance,
    public_address,
    read_provenance,
    read_table,
    write_json,
    write_table,
)
from moe_lens.storage import write_bytes

TABLE = pd.DataFrame({"layer": [0, 1], "score": [0.5, 0.25], "mode": ["zero", "é"], "gain": [None, 1.5]})


def test_tables_and_their_provenance_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "folder" / "a.parquet"
    write_table(TABLE, path, {"seed": 3, "model": "Zürich"})
    pd.testing.assert_frame_equal(read_table(path), TABLE)
    assert read_provenance(path) == {"seed": 3, "model": "Zürich"}


def test_same_input_gives_the_same_bytes_and_other_input_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_table(TABLE, tmp_path / f"{name}.parquet", provenance(model="m", seed=seed))
    a, b, c = ((tmp_path / f"{name}.parquet").read_bytes() for name in "abc")
    assert a == b != c


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_written_is_named_and_what_is_there_stays(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MoELensError, match=r"cannot write .*file/a.json: .*; make room or choose another place"):
        write_json(tmp_path / "file" / "a.json", {})
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(MoELensError, match=r"cannot write .*folder: Is a directory"):
        write_json(tmp_path / "folder", {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "inside"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_disk_that_ends_within_a_file_is_an_error_and_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.json"
    write_json(path, {"old": True})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(MoELensError, match=r"cannot write .*a.json: File too large"):
            write_bytes(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads(path.read_text()) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_json_takes_numpy_numbers_and_refuses_what_json_cannot_say(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"n": np.int64(3), "em": np.float32(0.5), "ok": np.bool_(True), "name": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"n": 3, "em": 0.5, "ok": True, "name": "é"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"em": math.nan})
    with pytest.raises(TypeError, match="ndarray"):
        write_json(path, {"em": np.zeros(2)})


def test_files_that_are_no_tables_of_ours_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("text")
    TABLE.to_parquet(tmp_path / "foreign.parquet")
    for read in (read_table, read_provenance):
        for name, says in (("a", "a.parquet carries no digest"), ("foreign", "no digest"), ("missing", "is no table")):
            with pytest.raises(MoELensError, match=says):
                read(tmp_path / f"{name}.parquet")


def test_provenance_says_what_was_run_without_absolute_paths(monkeypatch, tmp_path):
    command = ["/lib/moe_lens/intervene.py", "--model", "organism", "--out=/home/me/run", "/d/x.json", "a/b"]
    command += ["--judge", "http://me:se=c@ret/@host:8/v1?key=secret", "--judge=https://token@host/v1"]
    monkeypatch.setattr(sys, "argv", command)
    found = provenance(model="/models/olmoe", seed=7, facts={"dtype": "float32"})
    assert found["command"] == [
        "intervene",
        "--model",
        "organism",
        "--out=run",
        "x.json",
        "a/b",
        "--judge",
        "http://host:8/v1",
        "--judge=https://host/v1",
    ]
    assert (found["model"], found["seed"], found["dtype"]) == ("olmoe", 7, "float32")
    assert (found["delta"], found["data"]) == (None, None)
    assert set(found["versions"]) == {"python", "moe_lens", "torch", "transformers", "nnsight", "numpy"}
    assert found["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("--judge=https://host/v1?mail=me@hush", "--judge=https://…"),
        ("http://me:hu?sh@host/v1", "http://…"),
        ("http://me:hush@host/v1#hush", "http://host/v1"),
        ("no address?", "no address?"),
    ],
)
def test_of_an_address_nothing_is_told_that_may_be_secret(address, told):
    assert public_address(address) == told


def test_provenance_keeps_a_hub_id_whole():
    assert provenance(model="allenai/OLMoE-1B-7B-0924")["model"] == "allenai/OLMoE-1B-7B-0924"


def test_data_is_hashed_by_content_and_order():
    one, two = Example("0", "c", "q?", ("a",)), Example("1", "c", "q?", ("a",))

    def hashed(*examples):
        return provenance(model="m", data=examples)["data"]

    assert hashed(one, two) == hashed(Example("0", "c", "q?", ("a",)), two)
    assert hashed(one, two)["examples"] == 2
    assert len({hashed(*rows)["sha256"] for rows in ([one, two], [two, one], [one])}) == 3


def test_trained_parameters_are_hashed_by_content_wherever_they_lie(tmp_path):
    for name, content in (("x/run", b"1"), ("y/run", b"1"), ("z/run", b"2")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "delta.safetensors").write_bytes(content)
    x, y, z = (provenance(model="m", delta=tmp_path / name / "run")["delta"] for name in "xyz")
    assert x == y != z
    assert x["name"] == "run"
    whole = provenance(model="m", delta=tmp_path / "x/run/delta.safetensors")["delta"]
    line = f"delta.safetensors:{hashlib.sha256(b'1').hexdigest()}\n"
    assert whole == {"name": "delta.safetensors", "sha256": hashlib.sha256(line.encode()).hexdigest()}


def test_the_command_that_trained_a_delta_does_not_tell_it_from_another(tmp_path):
    layer = torch.nn.Linear(2, 2)
    for name, facts in (("x", {}), ("y", {"command": ["tune", "--limit=8"]}), ("z", {"seed": 2})):
        told = {"seed": 1, "command": ["tune", "--limit", "8"]} | facts
        save_delta(layer, ["weight"], tmp_path / name / "run", facts=told, fingerprint="of the base")
    x, y, z = (provenance(model="m", delta=tmp_path / name / "run")["delta"] for name in "xyz")
    assert x == y != z


def test_a_folder_is_one_runs_until_it_is_removed(tmp_path):
    made_by = provenance(model="organism", data=[Example("a", "c", "q", ("a",))], facts={"mode": "zero"})
    claim(tmp_path / "run", made_by)
    claim(tmp_path / "run", made_by | {"mode": "reroute"})  # nothing is lost yet
    write_table(TABLE, tmp_path / "run" / "parts" / "a.parquet", made_by)
    claim(tmp_path / "run", made_by | {"mode": "reroute", "command": ["another", "line"]})
    for other, named in (({"model": "else"}, "model"), ({"data": {"examples": 2}}, "data.examples"), ({}, "mode")):
        with pytest.raises(MoELensError, match=f"holds the results of another run: .*its {named} is"):
            claim(tmp_path / "run", made_by | other)


def test_a_folder_with_results_of_which_nothing_tells_is_refused(tmp_path):
    write_table(TABLE, tmp_path / "answers.parquet", {})
    with pytest.raises(MoELensError, match=r"holds answers\.parquet of another run, and no run\.json"):
        claim(tmp_path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["answers.parquet"]


@pytest.mark.parametrize(
    "name", ["summary.json", "figure3.html", "tuning.png", "parts/mine.parquet", "merged/config.json"]
)
def test_a_users_own_files_of_names_that_commands_write_are_not_lost(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(MoELensError, match=f"holds {re.escape(name)} .*choose another folder$"):
        claim(tmp_path, {})
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]


@pytest.mark.parametrize("beside", [(), ("notes.txt",)])
def test_a_run_file_of_something_else_is_not_lost_and_no_folder_is_to_be_removed(tmp_path, beside):
    for name in ("run.json", *beside):
        (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(MoELensError, match=r"run\.json.*choose another folder$"):
        claim(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == '{"mine": 1}'


def test_a_folder_with_notes_may_become_a_runs(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, {"mode": "zero"})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_table_is_made_once_and_one_that_is_made_otherwise_is_not_lost(tmp_path, monkeypatch):
    path, made = tmp_path / "a.parquet", []

    def make() -> pd.DataFrame:
        made.append(len(made))
        return TABLE.assign(layer=len(made))

    by = provenance(model="m", facts={"rate": 1e-3, "seeds": (0, 1)})
    first = kept(path, by, make)
    monkeypatch.setattr(sys, "argv", ["another", "command"])
    again = kept(path, provenance(model="m", facts={"rate": 1e-3, "seeds": (0, 1)}), make)
    pd.testing.assert_frame_equal(again, first)
    with pytest.raises(MoELensError, match=r"another run: its rate is 0\.001, here it is 0\.0001"):
        kept(path, by | {"rate": 1e-4}, make)
    pd.testing.assert_frame_equal(read_table(path), first)
    assert made == [0]


def test_without_a_path_a_table_is_made_each_time_and_kept_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    for _ in range(2):
        assert kept(None, {}, lambda: made.append(1) or TABLE) is TABLE
    assert len(made) == 2
    assert not list(tmp_path.iterdir())
