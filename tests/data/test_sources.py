"""Named data sets: each original format gives the examples it holds, from a file, a folder or a hub-like folder."""

import csv
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from moe_lens.data import Example, load_examples, read_examples
from moe_lens.data.dataset import carve
from moe_lens.data.lookup import SOURCES
from moe_lens.data.sources.gigaword import QUESTION
from moe_lens.errors import MoELensError

ARTICLE = {
    "title": "Moon",
    "paragraphs": [
        {
            "context": "Paul landed.",
            "qas": [
                {"id": "a", "question": "Who landed?", "answers": [{"text": "Paul", "answer_start": 0}] * 2},
                {"id": "b", "question": "What did he do?", "answers": [{"text": "landed ", "answer_start": 5}]},
            ],
        }
    ],
}
MRQA = {
    "id": "",
    "context": "<P> Paul Landed . </P>",
    "qas": [
        {
            "qid": "q",
            "question": "who landed",
            "answers": ["paul"],
            "detected_answers": [{"text": "paul", "char_spans": [[4, 7]], "token_spans": [[1, 1]]}],
        }
    ],
}
MRQA_FLAT = {
    "subset": "SQuAD",
    "context": MRQA["context"],
    "qid": "q",
    "question": "who landed",
    "answers": ["paul"],
    "detected_answers": {"text": ["paul"], "char_spans": [{"start": [4], "end": [7]}]},
}
MRQA_EXAMPLE = Example("q", "<P> Paul Landed . </P>", "who landed", ("paul", "Paul"))
HOTPOT = {"_id": "h", "question": "Same?", "answer": "yes", "context": [["A", ["One.", " Two."]], ["B", ["Three."]]]}
HOTPOT_FLAT = {
    "id": "h",
    "question": "Same?",
    "answer": "yes",
    "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
}
HOTPOT_EXAMPLE = Example("h", "A: One. Two.\nB: Three.", "Same?", ("yes",))
SWAPPED = {"uid": "s", "query": "who", "context": "Ann sang.", "gold_answers": [{"text": "Ann"}], "is_substitute": True}
SWAPPED_FLAT = {
    "question": "who",
    "org_context": "Bob sang.",
    "org_answer": ["Bob", "Bobby"],
    "sub_context": "Ann sang.",
    "sub_answer": ["Ann"],
}
SWAP = Example("s", "Ann sang.", "who", ("Ann",))
CONFLICT = {
    "question": "q?",
    "cf_context": "It is B.",
    "cf_answer": "B",
    "cf_alias": ["Bee", "B"],
    "orig_answer": "A",
    "orig_alias": ["Ay", "A"],
}
CONFLICTING = Example("0", "It is B.", "q?", ("B", "Bee"), "A", original_aliases=("Ay",))
EDIT = {"subject": "Ann", "prompt": "{} speaks", "target_new": {"str": "Thai"}, "target_true": {"str": "Welsh"}}
TRAP = {"prompt": 'End it with "x": No', "classes": "[' x.', \" man's.\"]", "answer_index": "0"}
TRAPPED = Example("0", "", 'End it with "x": No', ("x.",), "man's.", options=("x.", "man's."))
EXAM = {"question": "2+2?", "choices": ["1", "2", "3", " 4"], "answer": 3, "subject": "arithmetic"}
EXAMINED = Example("0", "", "2+2?", ("4",), options=("1", "2", "3", "4"), group="arithmetic")

CASES = {
    "squad, official": (
        "squad",
        {"version": "1.1", "data": [ARTICLE]},
        [
            Example("a", "Paul landed.", "Who landed?", ("Paul",)),
            Example("b", "Paul landed.", "What did he do?", ("landed",)),
        ],
    ),
    "squad, hub": (
        "squad",
        [{"id": "a", "title": "", "context": "c d", "question": "q?", "answers": {"text": ["d"], "answer_start": [2]}}],
        [Example("a", "c d", "q?", ("d",))],
    ),
    "squad, mrqa": ("squad", [{"header": {"dataset": "SQuAD"}}, MRQA], [MRQA_EXAMPLE]),
    "nq": ("nq", [{"header": {"dataset": "NQ"}}, MRQA], [MRQA_EXAMPLE]),
    "nq, hub": ("nq", [MRQA_FLAT], [MRQA_EXAMPLE]),
    "hotpotqa": ("hotpotqa", [HOTPOT], [HOTPOT_EXAMPLE]),
    "hotpotqa, hub": ("hotpotqa", [HOTPOT_FLAT], [HOTPOT_EXAMPLE]),
    "hotpotqa, mrqa": ("hotpotqa", [MRQA], [MRQA_EXAMPLE]),
    "nq-swap": ("nq-swap", [SWAPPED], [SWAP]),
    "nq-swap, full": (
        "nq-swap",
        [{**SWAPPED, "original_example": {**SWAPPED, "gold_answers": [{"text": "Bob"}, {"text": "Rob"}]}}],
        [replace(SWAP, original_answer="Bob", original_aliases=("Rob",))],
    ),
    "nq-swap, hub": (
        "nq-swap",
        [SWAPPED_FLAT],
        [replace(SWAP, id="0", original_answer="Bob", original_aliases=("Bobby",))],
    ),
    "confiqa-qa": ("confiqa-qa", [CONFLICT], [CONFLICTING]),
    "confiqa-mr": ("confiqa-mr", [CONFLICT], [CONFLICTING]),
    "confiqa-mc": ("confiqa-mc", [CONFLICT], [CONFLICTING]),
    "counterfact": (
        "counterfact",
        [{"case_id": 7, "requested_rewrite": EDIT}],
        [Example("7", "Ann speaks Thai.", "Ann speaks", ("Thai",), "Welsh")],
    ),
    "counterfact, hub": (
        "counterfact",
        [{"prompt": "Ann speaks", "target_true": " Welsh", "target_false": " Thai", "subject": "Ann"}],
        [Example("0", "Ann speaks Thai.", "Ann speaks", ("Thai",), "Welsh")],
    ),
    "memotrap": ("memotrap", [TRAP], [TRAPPED]),
    "memotrap, list": ("memotrap", [{**TRAP, "classes": [" x.", " man's."], "answer_index": 0}], [TRAPPED]),
    "gigaword": (
        "gigaword",
        [{"document": "police arrested five on monday .", "summary": "police arrest five"}],
        [Example("0", "police arrested five on monday .", QUESTION, ("police arrest five",))],
    ),
    "mmlu-text": ("mmlu-text", [EXAM], [EXAMINED]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_original_format_gives_its_examples(case, tmp_path):
    name, content, expected = CASES[case]
    (tmp_path / "file.json").write_text(json.dumps(content), encoding="utf-8")
    expected = [replace(example, task=name) for example in expected]
    assert load_examples(f"{name}:{tmp_path / 'file.json'}") == expected
    if isinstance(content, list):
        lines = "\n".join(map(json.dumps, content))
        (tmp_path / "file.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        assert load_examples(f"{name}:{tmp_path / 'file.jsonl.gz'}") == expected


BAD_ONES = [("a", ["Paul"]), ("b", []), ("c", ["Paul"]), ("a", ["Paul"]), ("d", ["Paul"])]  # b has no answer, a repeats
WHO = [{"id": name, "qid": name, "question": "Who?", "answers": answers} for name, answers in BAD_ONES]
RECORDS = {
    "nq": {"context": "Paul landed.", "qas": WHO},
    "squad": {
        "paragraphs": [
            {
                "context": "Paul landed.",
                "qas": [asked | {"answers": [{"text": answer} for answer in asked["answers"]]} for asked in WHO],
            }
        ]
    },
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_question_of_a_record_costs_no_other_question(name, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(RECORDS[name]))
    loaded = read_examples(f"{name}:{file}", skip_bad=True)
    assert [example.id for example in loaded.examples] == ["a", "c", "d"]
    assert loaded.rows == 5
    [blank, repeated] = loaded.bad
    assert blank.startswith(f"{file}, line 1: example 'b' needs answers")
    assert repeated.endswith("these repeat: a")
    limited = read_examples(f"{name}:{file}", skip_bad=True, limit=2)
    assert (limited.examples, limited.rows, limited.bad) == (loaded.examples[:2], 3, loaded.bad[:1])


@pytest.mark.parametrize("name", SOURCES)
def test_a_record_of_another_kind_is_refused_with_its_place_and_what_it_has(name, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"colour": 3}')
    with pytest.raises(MoELensError, match=r"a\.jsonl, line 1: .*colour"):
        load_examples(f"{name}:{tmp_path / 'a.jsonl'}")


@pytest.mark.parametrize("name", SOURCES)
def test_every_named_data_set_takes_files_with_plain_columns(name, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"context": "c", "question": "q", "answer": "a"}')
    assert load_examples(f"{name}:{tmp_path / 'a.jsonl'}") == [Example("0", "c", "q", ("a",), task=name)]


def test_the_authors_csv_files_are_read(tmp_path):
    with (tmp_path / "1-proverb-ending.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(TRAP))
        writer.writeheader()
        writer.writerow(TRAP)
    assert load_examples(f"memotrap:{tmp_path}/1-proverb-ending.csv") == [replace(TRAPPED, task="memotrap")]
    (tmp_path / "anatomy_test.csv").write_text('2+2?,1,2,3, 4,D\n"a, b?",w,x,y,z,A\n')
    first, second = load_examples(f"mmlu-text:{tmp_path}/anatomy_test.csv")
    assert first == replace(EXAMINED, task="mmlu-text", group="anatomy_test")
    assert (second.question, second.answers) == ("a, b?", ("w",))


def test_mmlus_folders_give_its_usual_form_five_answered_questions_of_the_subject_before_each(mmlu_folder):
    examples = load_examples(f"mmlu:{mmlu_folder}")
    assert [example.group for example in examples] == ["high_school_physics"] * 2 + ["law"] * 3
    assert {(example.asked, example.options) for example in examples} == {("verbatim", ("A", "B", "C", "D"))}
    assert [example.answers for example in examples] == [("C",), ("A",), ("B",), ("D",), ("A",)]
    head, *shown, asked = examples[1].question.split("\n\n")
    assert head == "The following are multiple choice questions (with answers) about high school physics."
    assert shown[0] == "high_school_physics dev 0?\nA. w0\nB. x, 0\nC. y0\nD. z0\nAnswer: A"
    assert [text[-1] for text in shown] == list("ABCDA")
    assert asked == "high_school_physics test 1?\nA. w1\nB. x, 1\nC. y1\nD. z1\nAnswer:"
    file = mmlu_folder / "test" / "law_test.csv"
    assert [one.question for one in load_examples(f"mmlu:{file}")] == [one.question for one in examples[2:]]
    assert [one.group for one in load_examples(f"mmlu:{mmlu_folder}", split="dev")] == ["law"]
    file.write_text(" ,a,b,c,d,A\n")
    with pytest.raises(MoELensError, match=r"law_test\.csv, line 1: a record has a blank question"):
        load_examples(f"mmlu:{file}")
    file.write_text("1?,a,b,c,d,A\n")
    (mmlu_folder / "dev" / "law_dev.csv").write_text("1?,a,b,c,d,A\n")
    with pytest.raises(MoELensError, match="shows 5 answered dev questions of the subject 'law', and 1 are at hand"):
        load_examples(f"mmlu:{file}")


def test_mmlu_from_the_hub_shows_the_dev_questions_of_each_subject(tmp_path, monkeypatch):
    """A folder stands for the hub: `datasets` reads both alike."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    for split, count in (("test", 2), ("dev", 6), ("validation", 1)):
        rows = [
            {"question": f"{subject} {split} {i}?", "choices": list("wxyz"), "answer": i % 4, "subject": subject}
            for i in range(count)
            for subject in ("law", "art_history")
        ]
        pd.DataFrame(rows).to_parquet(tmp_path / "hub" / f"{split}.parquet")
    named = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("test", "dev", "validation"))
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{named}---\n"
    (tmp_path / "hub" / "README.md").write_text(card)  # else dev and validation would be one
    mmlu = SOURCES["mmlu"]
    monkeypatch.setitem(SOURCES, "mmlu", replace(mmlu, hub=replace(mmlu.hub, id=str(tmp_path / "hub"), config=None)))
    first, second, *_ = load_examples("mmlu")
    assert (first.group, second.group) == ("law", "art_history")
    assert "about art history.\n\nart_history dev 0?\nA. w" in second.question
    assert second.question.count("Answer:") == 6
    assert "law" not in second.question
    with pytest.raises(MoELensError, match="mmlu has the splits dev, test; got 'train'"):
        load_examples("mmlu", split="train")


def test_gigawords_two_files_are_read_line_by_line(tmp_path):
    (tmp_path / "train.article.txt").write_text("one two .\nthree four .\n")
    (tmp_path / "train.title.txt").write_text("one\nthree\n")
    examples = load_examples(f"gigaword:{tmp_path}/train.article.txt")
    assert [(e.context, e.answers) for e in examples] == [("one two .", ("one",)), ("three four .", ("three",))]
    (tmp_path / "train.title.txt").write_text("one\n")
    with pytest.raises(MoELensError, match=r"has more lines than train\.title\.txt, which ends before line 2"):
        load_examples(f"gigaword:{tmp_path}/train.article.txt")


@pytest.mark.parametrize(("name", "file", "sizes"), [
    ("gigaword", "train.jsonl", {"pool": {"train": 3, "dev": 2, "test": 1}}),  # called like a split, yet cut
    ("squad", "train/SQuAD.jsonl.gz", {"train": {"dev": 2, "test": 1}}),
])  # fmt: skip
def test_parts_are_cut_out_of_a_published_file_whatever_it_is_called(name, file, sizes, tmp_path, monkeypatch):
    rows = [{"context": "c", "question": f"q{number}?", "answer": "a"} for number in range(6)]
    source = replace(SOURCES[name], carved=sizes, read=lambda path: (("a row", row) for row in rows))
    monkeypatch.setitem(SOURCES, name, source)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    parts = {split: load_examples(f"{name}:{tmp_path}", split=split) for split in ("train", "dev", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 3, "dev": 2, "test": 1}


def test_a_folder_has_splits_and_the_papers_sizes(tmp_path):
    records = [CONFLICT | {"question": f"q{number}?"} for number in range(6000)]
    (tmp_path / "ConFiQA-MC.json").write_text(json.dumps(records))
    parts = {split: load_examples(f"confiqa-mc:{tmp_path}", split=split) for split in ("train", "dev", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 4000, "dev": 500, "test": 1500}
    assert len({e.question for part in parts.values() for e in part}) == 6000
    assert load_examples(f"confiqa-mc:{tmp_path}", split="dev", limit=3) == parts["dev"][:3]
    (tmp_path / "dev.json").write_text(json.dumps(records[:2]))
    assert len(load_examples(f"confiqa-mc:{tmp_path}", split="dev")) == 2  # SPLIT.json is that split
    with pytest.raises(MoELensError, match=r"for the split 'test' of squad; expected .*dev-v1\.1\.json.*test\.json"):
        load_examples(f"squad:{tmp_path}")


def test_parts_are_drawn_by_id_whatever_the_order():
    examples = [Example(str(number), "", "q", ("a",)) for number in range(50)]
    sizes = {"dev": 10, "test": 5}
    parts = {split: {e.id for e in carve(examples, sizes, split)} for split in ("train", "dev", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 35, "dev": 10, "test": 5}
    assert set.union(*parts.values()) == {e.id for e in examples}
    assert {e.id for e in carve(examples[::-1], sizes, "dev")} == parts["dev"]
    assert [e.id for e in carve(examples, {}, "train")] == [e.id for e in examples]
    with pytest.raises(MoELensError, match="50 examples are too few"):
        carve(examples, {"dev": 51}, "dev")


def test_a_named_data_set_comes_from_the_hub_by_subset_split_and_part(tmp_path, monkeypatch):
    """A folder stands for the hub: `datasets` reads both alike."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [MRQA_FLAT | {"qid": f"{subset}{i}", "subset": subset} for i in range(8) for subset in ("SQuAD", "HotpotQA")]
    (tmp_path / "mrqa").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "mrqa" / "train.parquet")
    pd.DataFrame(rows[:4]).to_parquet(tmp_path / "mrqa" / "validation.parquet")
    squad = SOURCES["squad"]
    local = replace(squad, hub=replace(squad.hub, id=str(tmp_path / "mrqa")), carved={"train": {"dev": 3}})
    monkeypatch.setitem(SOURCES, "squad", local)
    assert [e.id for e in load_examples("squad")] == ["SQuAD0", "SQuAD1"]
    assert load_examples("squad", limit=1) == [replace(MRQA_EXAMPLE, id="SQuAD0", task="squad")]
    dev, train = (load_examples("squad", split=split) for split in ("dev", "train"))
    assert (len(dev), len(train)) == (3, 5)
    with pytest.raises(MoELensError, match="squad has the splits train, test, dev; got 'validation'"):
        load_examples("squad", split="validation")


def test_what_cannot_be_pinned_on_the_hub_asks_for_a_path():
    for name in ("gigaword", "confiqa-mc"):
        with pytest.raises(MoELensError, match=f"give {name}:PATH"):
            load_examples(name)


def test_hub_revisions_are_whole_commits():
    hubs = [source.hub for source in SOURCES.values() if source.hub is not None]
    assert all(len(hub.revision) == 40 and int(hub.revision, 16) for hub in hubs)


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [("nq-swap", "train", 3000), ("nq-swap", "dev", 746), ("confiqa-mc", "dev", 500), ("squad", "dev", 4330)],
)
def test_real_files_load_by_name_and_split(name, split, count):
    if "MOE_LENS_SHARED" not in os.environ:
        pytest.skip("MOE_LENS_SHARED is not set")
    folder = Path(os.environ["MOE_LENS_SHARED"]) / "data" / name
    examples = load_examples(f"{name}:{folder}", split=split)
    assert len(examples) == count
    assert {example.task for example in examples} == {name}


AUTHORS = [
    {"context": "Ann  sang.", "question": "who", "answer": "Ann"},
    {"context": "Cid sang.", "question": "Who ", "answer": "Cid"},
    {"context": "x", "question": "asked nowhere else", "answer": "x"},
]
PUBLIC = [
    SWAPPED_FLAT | {"org_answer": ["Rob"], "sub_context": "Ann danced."},
    SWAPPED_FLAT,
]


@pytest.fixture
def of_authors(tmp_path) -> Path:
    """A folder as the authors' repository has it, with the public data set beside one of its splits."""
    for split, rows in {"train": AUTHORS[:1], "dev": AUTHORS[:2], "test": AUTHORS}.items():
        (tmp_path / "nq-swap").mkdir(exist_ok=True)
        (tmp_path / "nq-swap" / f"{split}.json").write_text(json.dumps(rows))
    (tmp_path / "nq-swap" / "public.jsonl").write_text("\n".join(map(json.dumps, PUBLIC)))
    return tmp_path


def test_the_authors_splits_are_joined_with_what_memory_says_by_question_and_where_it_can_be_by_context(of_authors):
    with pytest.warns(UserWarning, match="of 1 of 3 examples the public nq-swap does not tell what memory says"):
        examples = load_examples(f"nq-swap@authors:{of_authors}", split="test")
    assert [(one.id, one.answers) for one in examples] == [("0", ("Ann",)), ("1", ("Cid",)), ("2", ("x",))]
    assert [one.memory for one in examples] == [("Bob", "Bobby"), ("Rob", "Bob", "Bobby"), ()]
    assert {one.task for one in examples} == {"nq-swap"}
    own = f"nq-swap@authors:{of_authors / 'nq-swap'}"
    assert load_examples(own, split="dev") == examples[:2]
    assert load_examples(own, split="test", limit=1) == examples[:1]
    assert [one.memory for one in load_examples(f"nq-swap:{of_authors / 'nq-swap'}", split="dev")] == [(), ()]


def test_without_the_public_data_the_authors_splits_come_from_the_hub_or_say_what_is_missing(
    of_authors, monkeypatch, tmp_path
):
    (of_authors / "nq-swap" / "public.jsonl").unlink()
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pd.DataFrame(PUBLIC).to_parquet(tmp_path / "hub" / "validation.parquet")
    source = SOURCES["nq-swap"]
    hub = replace(source.hub, id=str(tmp_path / "hub"), splits={"train": "validation"})
    monkeypatch.setitem(SOURCES, "nq-swap", replace(source, hub=hub))
    [example] = load_examples(f"nq-swap@authors:{of_authors}", split="train")
    assert example.memory == ("Bob", "Bobby")
    (of_authors / "nq-swap").rename(of_authors / "confiqa-mc")
    with pytest.raises(MoELensError, match=r"joined from the public confiqa-mc; put its ConFiQA-MC\.json into"):
        load_examples(f"confiqa-mc@authors:{of_authors}", split="train")
    (of_authors / "confiqa-mc" / "ConFiQA-MC.json").write_text(json.dumps([CONFLICT]))
    with pytest.raises(MoELensError, match="none of the 1 questions of confiqa-mc@authors"):
        load_examples(f"confiqa-mc@authors:{of_authors}", split="train")
    with pytest.raises(MoELensError, match=r"has no dev2\.json, the authors' file of the split 'dev2'"):
        load_examples(f"confiqa-mc@authors:{of_authors}", split="dev2")
    with pytest.raises(MoELensError, match="takes the folder of its train, dev and test files; got ''"):
        load_examples("squad@authors")


def test_a_revision_of_what_lies_here_is_refused_so_that_a_slip_of_authors_loads_nothing_else(of_authors):
    with pytest.raises(MoELensError, match=r"nq-swap@author is a revision on the hub, and .* lies here"):
        load_examples(f"nq-swap@author:{of_authors}", split="train")


def test_the_authors_real_splits_load_by_their_name():
    """Of the sizes of Table 6. SQuAD's say nothing of memory, and nothing is joined to them."""
    if "MOE_LENS_SHARED" not in os.environ:
        pytest.skip("MOE_LENS_SHARED is not set")
    folder = Path(os.environ["MOE_LENS_SHARED"]) / "data"
    examples = load_examples(f"squad@authors:{folder}", split="dev")
    assert (len(examples), examples[0].original_answer) == (4330, None)
