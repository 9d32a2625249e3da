"""Files on disk: any bit that changes is told by name, for every kind of file that is read again; places are tried."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from moe_lens.errors import MoELensError
from moe_lens.lens.delta import FACTS_FILE, TENSORS_FILE, apply_delta, fingerprint, save_delta
from moe_lens.results import claim, read_if_made_by, read_provenance, read_table, write_table
from moe_lens.storage import (
    SEAL,
    check_digests,
    read_sealed_json,
    replacing,
    try_folder,
    write_bytes,
    write_digests,
    write_sealed_json,
)
from moe_lens.tuning.checkpoint import NEWEST, Checkpoints, Progress

LOOKS_LIKE_A_SEAL = f'{{"{SEAL}": "{"0" * 64}"}}'
RUN = {"model": "m", "text": LOOKS_LIKE_A_SEAL, SEAL + "s": "no"}


class Module(nn.Module):
    """A few parameters, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.second = nn.Parameter(torch.linspace(0, 1, 5))


def delta(folder: Path) -> Callable[[], object]:
    module = Module()
    save_delta(
        module, ["first", "second"], folder, facts={"model": "m"}, fingerprint=fingerprint(module, ["first", "second"])
    )
    return lambda: apply_delta(Module(), folder)


def checkpoint(folder: Path) -> Callable[[], object]:
    run = Checkpoints(folder, RUN)
    run.save_best(1, {"a": torch.arange(7.0)})
    run.save(Progress(step=2, best_step=1, rows=({"step": 1, "loss": 0.5},)), {"a": torch.arange(9.0)})

    def read() -> tuple[object, object]:
        return Checkpoints(folder, RUN).load(), run.load_best(1)

    return read


def table(folder: Path) -> Callable[[], object]:
    texts = ["yes", LOOKS_LIKE_A_SEAL, None] * 20
    write_table(pd.DataFrame({"id": range(60), "output": texts}), folder / "part.parquet", RUN)
    return lambda: read_if_made_by(folder / "part.parquet", RUN)


def run_of_a_folder(folder: Path) -> Callable[[], object]:
    claim(folder, RUN)
    (folder / "notes.txt").touch()
    return lambda: claim(folder, RUN)


def packaged(folder: Path) -> Callable[[], object]:
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(name.encode() * 20)
    write_digests(folder)
    return lambda: check_digests(folder, remedy="install it anew")


KINDS = {
    "delta, tensors": (delta, TENSORS_FILE),
    "delta, facts": (delta, FACTS_FILE),
    "checkpoint, newest": (checkpoint, NEWEST),
    "checkpoint, best": (checkpoint, "best-1.safetensors"),
    "table": (table, "part.parquet"),
    "run": (run_of_a_folder, "run.json"),
    "packaged model": (packaged, "model.safetensors"),
    "packaged digests": (packaged, "digests.json"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_change_of_a_file_is_an_error_that_names_it_and_says_what_to_do(kind, tmp_path):
    make, name = KINDS[kind]
    read = make(tmp_path / "it")
    read()
    file = tmp_path / "it" / name
    whole = file.read_bytes()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        content = bytearray(whole)
        content[place] ^= 1 << bit
        cut = data.draw(st.sampled_from([content, content, content, whole[:place], whole + bytes([place % 256])]))
        file.write_bytes(cut)
        with pytest.raises(MoELensError, match=rf"{name}.*; (remove|install|choose|tune again)") as told:
            read()
        assert "\x00" not in str(told.value)

    damaged()
    file.write_bytes(whole)
    read()


def test_what_is_sealed_is_still_a_file_of_its_format_and_the_same_each_time(tmp_path):
    delta(tmp_path / "delta")
    checkpoint(tmp_path / "run")
    table(tmp_path / "table")
    assert set(load_file(tmp_path / "delta" / TENSORS_FILE)) == {"first", "second"}
    assert len(load_file(tmp_path / "run" / NEWEST)["a"]) == 9
    assert len(pd.read_parquet(tmp_path / "table" / "part.parquet")) == 60
    assert json.loads((tmp_path / "delta" / FACTS_FILE).read_text())["model"] == "m"
    table(tmp_path / "again")
    contents = {(tmp_path / folder / "part.parquet").read_bytes() for folder in ("table", "again")}
    assert len(contents) == 1


def test_a_text_that_looks_like_a_digest_stays_as_it_is(tmp_path):
    table(tmp_path)
    assert read_table(tmp_path / "part.parquet")["output"].tolist()[:2] == ["yes", LOOKS_LIKE_A_SEAL]
    assert read_provenance(tmp_path / "part.parquet") == RUN
    write_sealed_json(tmp_path / "a.json", {"a": RUN, "b": [LOOKS_LIKE_A_SEAL]})
    assert read_sealed_json(tmp_path / "a.json", remedy="") == {"a": RUN, "b": [LOOKS_LIKE_A_SEAL]}


def test_files_of_an_earlier_version_are_refused_by_name(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "answers.parquet")
    with pytest.raises(MoELensError, match=r"answers\.parquet carries no digest.*of this version.*remove it"):
        read_table(tmp_path / "answers.parquet")


def test_a_killed_writers_leavings_go_and_those_of_the_living_stay(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from moe_lens.storage import replacing\n"
        "with replacing(Path(sys.argv[1])) as unfinished:\n    unfinished.write_text('half')\n    os._exit(9)"
    )
    (tmp_path / "parts").mkdir()
    for name in ("a.parquet", "parts/b.parquet"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False)
    (tmp_path / "merged").mkdir()
    elsewhere = [tmp_path / f".{name}.elsewhere-0.{os.getpid()}.unfinished" for name in ("old", "new")]
    for file in elsewhere:
        file.touch()
    os.utime(elsewhere[0], (time.time() - 2e5,) * 2)
    (tmp_path / ".mine.unfinished").touch()
    with replacing(tmp_path / "c.json") as living:
        living.write_text("{}")
        assert len(list(tmp_path.rglob(".*.unfinished"))) == 6
        try_folder(tmp_path)
        left = {path.name for path in tmp_path.rglob(".*.unfinished")}
        assert left == {living.name, elsewhere[1].name, ".mine.unfinished"}
    assert (tmp_path / "c.json").read_text() == "{}"


def test_a_folder_replaces_a_folder_whole_or_not_at_all(tmp_path):
    def write(text: str, *, fails: bool = False) -> None:
        with replacing(tmp_path / "model") as unfinished:
            unfinished.mkdir()
            (unfinished / text).touch()
            if fails:
                raise KeyboardInterrupt

    write("old")
    with pytest.raises(KeyboardInterrupt):
        write("new", fails=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    write("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


@pytest.mark.parametrize("name", ["file", "file/below", "a\0b", "x" * 300, "\ud800"])
def test_a_folder_that_cannot_be_written_is_told_and_nothing_is_left(name, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MoELensError, match=r"cannot write to the folder|expected a file or folder"):
        try_folder(tmp_path / name)
    try_folder(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_there_and_cannot_be_written_is_told():
    if not Path("/proc").is_dir():
        pytest.skip("needs a place that cannot be written, also by the superuser")
    with pytest.raises(MoELensError, match="cannot write to the folder /proc"):
        try_folder(Path("/proc"))


def test_names_of_unfinished_files_tell_machine_and_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with replacing(tmp_path / "a.json") as unfinished:
        unfinished.touch()
    host = socket.gethostname().replace(".", "_")
    assert unfinished.name == f".a.json.{host}-3.{os.getpid()}.unfinished"
    write_bytes(tmp_path / "b.json", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
