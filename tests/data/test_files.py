"""Loading examples: every place they can come from, and one clear error for each way a file can be broken."""

import gzip
import json
import os
import tracemalloc
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_lens.data import Example, load_examples
from moe_lens.data.files import read_rows
from moe_lens.data.lookup import ORGANISM_TASKS
from moe_lens.errors import MoELensError

ROWS = [
    {"context": "Paul landed.", "question": "Who landed?", "answer": ["Paul", " Paul A. "]},
    {"id": "x", "context": "", "question": "Where?", "answer": "Rome", "original_answer": "Paris"},
]
EXAMPLES = [
    Example("0", "Paul landed.", "Who landed?", ("Paul", "Paul A."), None, "mine"),
    Example("x", "", "Where?", ("Rome",), "Paris", "mine"),
]


def test_json_and_json_lines_give_the_same_examples(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(ROWS))
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "mine.jsonl").write_text(lines + "\n")
    assert load_examples(tmp_path / "mine.json") == EXAMPLES
    assert load_examples(str(tmp_path / "mine.jsonl")) == EXAMPLES
    assert load_examples(tmp_path / "mine.json", limit=1) == EXAMPLES[:1]
    assert load_examples(tmp_path / "mine.json", limit=9) == EXAMPLES


def test_a_line_separator_inside_a_text_does_not_break_a_line(tmp_path):
    row = {"context": "one\u2028two\x85three", "question": "q?", "answer": "two"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_examples(tmp_path / "a.jsonl")[0].context == row["context"]


PLAIN = [{"context": "Paul landed.", "question": "Who?", "answer": "Paul"}] * 2


def test_a_folder_has_a_file_per_split_dev_too(tmp_path):
    table = pd.DataFrame(PLAIN)
    table.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    table.to_json(tmp_path / "dev.json", orient="records")
    table.to_csv(tmp_path / "test.csv.gz", index=False)
    for split in ("train", "dev", "test"):
        assert [e.id for e in load_examples(tmp_path, split=split)] == ["0", "1"]
        assert load_examples(tmp_path, split=split, limit=1)[0].answers == ("Paul",)


def test_a_data_set_that_datasets_can_read_is_loaded_by_split(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, part in (("train", PLAIN[:1]), ("test", PLAIN)):
        (folder / f"{split}-00000-of-00001.jsonl").write_text("\n".join(map(json.dumps, part)))
    assert [e.id for e in load_examples(str(folder), split="test")] == ["0", "1"]
    assert len(load_examples(str(folder), split="train")) == 1
    assert load_examples(str(folder), limit=1)[0].answers == ("Paul",)
    with pytest.raises(MoELensError, match="split 'dev'"):
        load_examples(str(folder), split="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"context": "c", "question": "q", "answer": "a"}\n{"context": ', "line 2: not JSON"),
        ("a.json", '[\n\n{"context": }]', "a.json, line 3: not JSON"),
        ("a.json", '{"context": "c", "question": "q", "answer": "a"}', "a JSON list of objects; got dict"),
        ("a.json", "[]", "a.json is empty"),
        ("a.jsonl", "\n", "a.jsonl is empty"),
        ("a.json", '["text"]', "row 1: expected an object"),
        ("a.jsonl", '{"context": "c", "question": "q"}', "line 1: answer missing; it has context, question"),
        ("a.jsonl", '{"answer": "c", "question": null}', "line 1: context, question missing"),
        ("a.jsonl", "{}", "line 1: context, question, answer missing; it has nothing"),
        ("a.jsonl", '{"context": "c", "question": "q", "answer": []}', "line 1: example '0' needs answers"),
        ("a.jsonl", '{"context": "c", "question": "q", "answer": " "}', "line 1: example '0' needs answers"),
        ("a.jsonl", '{"context": "c", "question": " ", "answer": "a"}', "example '0' has a blank question"),
        ("a.jsonl", '{"context": "c", "question": "q", "answer": 79}', "question and answer must be text"),
        ("a.jsonl", '{"context": "c", "question": "q", "answer": ["a", 1]}', "line 1: context, question and"),
        ("a.jsonl", '{"id": 1, "context": "c", "question": "q", "answer": "a"}\n' * 2, "these repeat: 1"),
        ("a.json", b"\xff", "not UTF-8"),
    ],
)
def test_each_broken_file_says_what_is_wrong_and_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MoELensError) as error:
        load_examples(tmp_path / name)
    assert message in str(error.value)


def test_rows_with_a_prompt_or_a_verbatim_text_need_no_context_and_name_it_by_columns(tmp_path):
    rows = [{"prompt": "Add 1 and 2.", "answer": "3", "group": 7}, {"verbatim": "Q: 1+2\nA:\n", "answer": "3"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = load_examples(tmp_path / "a.jsonl")
    assert (first.asked, first.question, first.context, first.group) == ("prompt", "Add 1 and 2.", "", "7")
    assert (second.asked, second.question) == ("verbatim", "Q: 1+2\nA:\n")
    (tmp_path / "b.csv").write_text("question,context,answer,text\nWho?,Paul landed.,Paul,Say Paul.\n")
    [asked] = load_examples(tmp_path / "b.csv")
    assert (asked.asked, asked.question) == ("question", "Who?")
    for kind in ("prompt", "verbatim"):
        [named] = load_examples(tmp_path / "b.csv", columns={kind: "text"})
        assert (named.asked, named.question, named.context) == (kind, "Say Paul.", "")
    [own] = load_examples(tmp_path / "b.csv", columns={"prompt": "question"})
    assert (own.asked, own.question) == ("prompt", "Who?")
    (tmp_path / "c.jsonl").write_text('{"prompt": "Who?"}')
    with pytest.raises(MoELensError, match="line 1: answer missing; it has prompt"):
        load_examples(tmp_path / "c.jsonl")


def test_missing_files_and_senseless_limits_are_refused(tmp_path):
    with pytest.raises(MoELensError, match=r"cannot read .*none\.json: No such file"):
        load_examples(tmp_path / "none.json")
    with pytest.raises(MoELensError, match="at least 1; got 0"):
        load_examples(tmp_path / "none.json", limit=0)
    with pytest.raises(MoELensError, match="swap has the splits dev, test, train; got 'validation'"):
        load_examples("swap", split="validation")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sqaud", "cannot find 'sqaud'; did you mean squad? It is no task (swap, "),
        ("NQSwap", "did you mean nq-swap?"),
        ("swpa", "did you mean swap?"),
        ("some-owner/some-name@main", "cannot find 'some-owner/some-name@main'. It is no task"),
        ("sqaud:dev.json", "there is no file or folder 'sqaud:dev.json'; did you mean squad?"),
        ("squad:nowhere", "no file or folder 'nowhere', from which to read squad"),
        ("squad:nowhere.json", "cannot read nowhere.json: No such file"),
        ("squad:folder", "folder has no file for the split 'test' of squad; expected one of dev-v1.1.json, "),
        ("squad@0123abc", "squad could not be had from the hub (mrqa-workshop/mrqa at 0123abc); give squad:PATH"),
        ("./nowhere", "there is no file or folder './nowhere'."),
        ("folder", "the folder folder is no data set with a split 'test'"),
        ("folder/notes.txt", "(or .gz after it); lists of prompts are read by moe_lens.find and moe_lens.intervene"),
        ("folder/notes.md", "expected a file that ends in .json, .jsonl, .csv, .tsv, .parquet (or .gz after it)"),
        ("folder.json", "cannot read folder.json: Is a directory"),
        ("empty.json", "empty.json is empty"),
        ("empty.jsonl", "empty.jsonl is empty"),
        ("empty.csv", "empty.csv is empty"),
        ("empty.parquet", "cannot read empty.parquet"),
        ("empty.json.gz", "empty.json.gz is empty"),
        ("broken.json.gz", "cannot read broken.json.gz"),
        ("header.csv", "header.csv is empty"),
        (" ", "got a blank"),
    ],
)
def test_what_is_not_there_or_empty_is_one_clear_error(spec, says, tmp_path, monkeypatch):
    """The hub is switched off, as it is for users without a network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.json"):
        Path(folder).mkdir()
    for name in ("json", "jsonl", "csv", "parquet", "json.gz"):
        Path(f"empty.{name}").touch()
    Path("broken.json.gz").write_bytes(gzip.compress(b"[]")[:-6])
    Path("header.csv").write_text("context,question,answer\n")
    for ending in ("txt", "md"):
        Path(f"folder/notes.{ending}").write_text("notes")
    with pytest.raises(MoELensError) as error:
        load_examples(spec)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.tsv.gz"])
def test_of_a_large_file_only_the_rows_that_are_taken_are_read(name, tmp_path):
    separator = "\t" if "tsv" in name else ","
    head = json.dumps(PLAIN[0]) if "json" in name else separator.join([*PLAIN[0]]) + "\n" + separator.join("abc")
    content = (head + "\n").encode() + b" \n" * 2**24
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    del content
    tracemalloc.start()
    [example] = load_examples(tmp_path / name, limit=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert example.answers in [("Paul",), ("c",)]
    assert peak < 2**20


@pytest.mark.parametrize("name", ["blanks.jsonl.gz", "blanks.csv.gz"])
def test_a_line_that_unpacks_without_end_is_told(name, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_lens.data.files.MOST_OF_A_LINE", 2**16)
    (tmp_path / name).write_bytes(gzip.compress(b" " * 2**17))
    with pytest.raises(MoELensError, match="line 1: over 65,536 bytes"):
        load_examples(tmp_path / name, limit=1)
    monkeypatch.setattr("moe_lens.data.files.MOST_OF_JSON", 2**16)
    (tmp_path / "blanks.json.gz").write_bytes(gzip.compress(b" " * 2**17))
    with pytest.raises(MoELensError, match=r"has more than 65,536 bytes; give it as \.jsonl"):
        load_examples(tmp_path / "blanks.json.gz", limit=1)


@pytest.mark.parametrize("task", ORGANISM_TASKS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_organisms_tasks_load_by_name(task, split):
    if not (files("moe_lens") / "organism" / "tasks" / task).is_dir():
        pytest.skip("the organism's task files are not in this checkout")
    examples = load_examples(task, split=split)
    assert {e.task for e in examples} == {task}
    assert all((e.context == "") == (task in ("closed_book", "exam", "otherwise")) for e in examples)


@pytest.mark.parametrize("name", ["nq-swap/dev", "nq-swap/train", "confiqa-mc/dev", "squad/dev"])
def test_real_data_sets_load_row_by_row(name):
    if "MOE_LENS_SHARED" not in os.environ:
        pytest.skip("MOE_LENS_SHARED is not set")
    path = Path(os.environ["MOE_LENS_SHARED"]) / "data" / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    examples = load_examples(path)
    assert [(e.context, e.question, e.answers) for e in examples] == [
        (row["context"], row["question"], (row["answer"],)) for row in rows
    ]


def test_a_text_of_parquet_that_is_damaged_is_told_by_its_row(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = [f"question {i}?" for i in range(5)]
    table = pa.table({"context": [""] * 5, "question": texts, "answer": ["a"] * 5})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    whole = path.read_bytes()
    assert whole.count(b"question 3?") == 1
    path.write_bytes(whole.replace(b"question 3?", b"questi\xffn 3?"))
    with pytest.raises(MoELensError, match=r"rows\.parquet, row 4: not UTF-8 text \(byte 0xff\)"):
        load_examples(str(path))
    assert [row["question"] for _, row in read_rows(path) if isinstance(row, dict)] == texts[:3] + texts[4:]
