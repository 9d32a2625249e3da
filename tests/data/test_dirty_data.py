"""Dirty input: the outcome that docs/data.md states for each kind, and any text through loader, prompt and spans."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from byte_level_tokenizer import CHAT_TEMPLATE, byte_level_tokenizer, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import bpe, slow_bytes, unigram

from moe_lens.commands.options import SHOWN
from moe_lens.data import Example, encode, fit_length, read_examples
from moe_lens.data.lookup import SOURCES
from moe_lens.errors import MoELensError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
GOOD = {"id": "good", "context": "Paul landed.", "question": "Who landed?", "answer": "Paul"}
DIRTY = {"id": "dirty", "context": "In Bern.", "question": "Where?", "answer": "Bern"}
BYTES = byte_level_tokenizer(chat=False)


def rows_below(heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading of the page, by their first cell."""
    lines = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {first.strip("`"): others for first, *others in cells[2:]}


def lines(*changes: dict | bytes) -> bytes:
    """JSON lines: the good row, then a row for each change of the dirty one, or the bytes themselves."""
    rows = [change if isinstance(change, bytes) else json.dumps({**DIRTY, **change}).encode() for change in changes]
    return b"\n".join([json.dumps(GOOD).encode(), *rows])


def without(field: str) -> bytes:
    return json.dumps({name: value for name, value in DIRTY.items() if name != field}).encode()


def spans(example: Example) -> list[str]:
    encoded = encode(example, BYTES)
    return [text_of(BYTES, encoded.input_ids[span]).strip() for span in encoded.answer_spans]


def cut(example: Example) -> Example:
    """The example with as much of its context as fits 200 tokens."""
    [shorter] = fit_length([example], BYTES, max_length=200, too_long="truncate").examples
    return shorter


def holds(**fields: object) -> Callable[[Example], bool]:
    """That an example has these values."""
    return lambda example: all(getattr(example, name) == value for name, value in fields.items())


HEADER = b"id,context,question,answer\ngood,Paul landed.,Who landed?,Paul\n"
LONG = "word " * 20_000 + "in Bern."
ARABIC = "هنا باريس 👩‍🔬 end"
TABLE = "<Table> <Tr> <Td> Bern </Td> <Td colspan=2> 1939 </Td> </Tr> </Table>"
MARK = b"\xef\xbb\xbf"

#: By the row of the page: a file's name, what is in it, and what holds of the dirty row's example if it is kept.
CASES: dict[str, tuple[str, bytes, Callable[[Example], bool] | None]] = {
    "an empty or blank context": ("a.jsonl", lines({"context": " \n"}), lambda e: encode(e, BYTES).context is None),
    "no context column, or null in it": ("a.jsonl", lines({"context": None}), None),
    "an empty or blank question": ("a.jsonl", lines({"question": " \t"}), None),
    "an empty or blank answer": ("a.jsonl", lines({"answer": ["Bern", " "]}), None),
    "an empty list of answers": ("a.jsonl", lines({"answer": []}), None),
    "a number, a list or null where text belongs": ("a.jsonl", lines({"answer": 79}), None),
    "space around an answer": ("a.jsonl", lines({"answer": " Bern\n"}), holds(answers=("Bern",))),
    "an answer that is not in the context": (
        "a.jsonl",
        lines({"answer": "Rome"}),
        lambda e: spans(e) == [] and fit_length([e], BYTES).without_answer == ("dirty",),
    ),
    "an answer that is in the context several times": (
        "a.jsonl", lines({"context": "Bern, Bern, Berner"}), lambda e: spans(e) == ["Bern", "Bern"]
    ),
    "an answer that is only inside other words or numbers": (
        "a.jsonl",
        lines({"context": "Berner, 我在北京的家, कमी, 1,234", "answer": ["Bern", "北京", "कम", "234"]}),
        lambda e: spans(e) == ["北京"],
    ),
    "several names of what memory says": (
        "a.jsonl",
        lines({"original_answer": ["Bern", " Berne ", "Bern", ""]}),
        holds(original_answer="Bern", original_aliases=("Berne",)),
    ),
    "a blank original answer": ("a.jsonl", lines({"original_answer": " "}), holds(original_answer=None)),
    "options that are fewer than two or lack the answer": ("a.jsonl", lines({"options": ["Rome", "Oslo"]}), None),
    "other columns": ("a.jsonl", lines({"colour": [1]}), holds(context="In Bern.")),
    "no id": ("a.jsonl", lines(without("id")), holds(id="1")),
    "an empty id": ("a.csv", HEADER + b",In Bern.,Where?,Bern\n", holds(id="1")),
    "an id that repeats": ("a.jsonl", lines({"id": "good"}), None),
    "an id that is neither text nor number": ("a.jsonl", lines({"id": [1]}), None),
    "the same texts under two ids": ("a.jsonl", lines(GOOD | {"id": "dirty"}), holds(context="Paul landed.")),
    "a broken line of JSON lines": ("a.jsonl", lines(b'{"context": '), None),
    "a JSON line that is no object": ("a.jsonl", lines(b'["Bern"]'), None),
    "a broken .json file": ("a.json", b"[" + json.dumps(GOOD).encode() + b",\n{", None),
    "a CSV line with too few or too many cells": ("a.csv", HEADER + b"dirty,In Bern.,Where?\n", None),
    "a CSV quote that does not end": ("a.csv", HEADER + b'dirty,"In Bern.,Where?,Bern\n', None),
    "Windows line ends, blank lines": (
        "a.jsonl", lines({}).replace(b"\n", b"\r\n\r\n"), holds(answers=("Bern",))
    ),
    "a byte order mark": ("a.csv", MARK + HEADER + b"dirty,In Bern.,Where?,Bern\n", holds(answers=("Bern",))),
    "a JSON line that is not UTF-8": ("a.jsonl", lines(json.dumps(DIRTY).encode().replace(b"Bern", b"B\xe4rn")), None),
    "another file that is not UTF-8 (Latin-1, UTF-16)": ("a.csv", HEADER + "dirty,a,é,a".encode("latin-1"), None),
    "a NUL in a text": ("a.jsonl", lines({"context": "a\0b", "answer": "a\0b"}), lambda e: spans(e) == ["a\0b"]),
    "a bare NUL in a JSON line": ("a.jsonl", lines(json.dumps(DIRTY).encode().replace(b"Bern", b"B\0rn")), None),
    "half of a surrogate pair": ("a.jsonl", lines({"context": "\ud83d Bern"}), None),
    "a line separator (U+2028) in a text": (
        "a.jsonl", lines(json.dumps(DIRTY | {"context": "in\u2028Bern"}, ensure_ascii=False).encode()),
        holds(context="in\u2028Bern"),
    ),
    "right-to-left text and emoji": (
        "a.jsonl", lines({"context": ARABIC, "answer": ["باريس", "👩‍🔬"]}), lambda e: spans(e) == ["باريس", "👩‍🔬"]
    ),
    "HTML-ish tables": (
        "a.jsonl", lines({"context": TABLE, "answer": ["1939", "Bern"]}), lambda e: spans(e) == ["Bern", "1939"]
    ),
    "the text of a special token": (
        "a.jsonl", lines({"context": "<eos>Bern <pad>", "answer": ["Bern", "<pad>"]}),
        lambda e: spans(e) == ["Bern", "<pad>"],
    ),
    "a context of 100 kB": (
        "a.jsonl", lines({"context": LONG}),
        lambda e: spans(e) == spans(cut(e)) == ["Bern"] and len(encode(cut(e), BYTES).input_ids) <= 200,
    ),
    "JSON nested or a number longer than can be read": ("a.jsonl", lines(b'{"id": ' + b"1" * 5000 + b"}"), None),
    "an empty file": ("a.json", b" \n", None),
}  # fmt: skip


def outcome(file: Path) -> str:
    """What happens to a file of a good row and a dirty one."""
    try:
        read_examples(file)
    except MoELensError as error:
        strict = str(error)
    else:
        return "kept"
    try:
        loaded = read_examples(file, skip_bad=True)
    except MoELensError:
        return "refused"
    assert [example.id for example in loaded.examples] == ["good"]
    assert loaded.bad == (strict,)
    assert re.match(r".*a\.\w+, line [23]: .", strict), "the place is not said"
    return "bad row"


def test_the_page_has_a_row_for_each_case():
    assert list(rows_below("Dirty input")) == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_dirty_input_has_the_outcome_that_is_written(case, tmp_path):
    name, content, kept = CASES[case]
    (tmp_path / name).write_bytes(content)
    [said] = rows_below("Dirty input")[case]
    stated = re.match(r"\*\*(.+?)\*\*", said)[1]
    assert outcome(tmp_path / name) == stated
    assert (kept is not None) == (stated == "kept")
    if kept is not None:
        [good, example] = read_examples(tmp_path / name).examples
        assert good.answers == ("Paul",)
        assert kept(example)
    if "with its line" in said:
        with pytest.raises(MoELensError, match=r"a\.\w+, line [234]: "):
            read_examples(tmp_path / name)


def test_the_page_says_how_many_bad_rows_are_printed():
    assert f"the first\n{SHOWN} are printed" in PAGE


def test_the_page_says_of_each_data_set_what_its_source_does():
    table = rows_below("Data sets")
    assert list(table) == list(SOURCES)
    for name, source in SOURCES.items():
        hub, files, parts, _ = table[name]
        assert re.findall(r"`(.+?)`", hub) == ([source.hub.id, source.hub.revision] if source.hub else [])
        assert re.findall(r"`(.+?)`", files) == [file for group in source.files.values() for file in group]
        cut_out = {part: size for sizes in source.carved.values() for part, size in sizes.items()}
        assert {part: int(size) for part, size in re.findall(r"`(\w+)` (\d+)", parts)} == cut_out
        assert re.findall(r"of `(\w+)`", parts) == list(source.carved)


CHAT = unigram()
CHAT.chat_template = CHAT_TEMPLATE
TOKENIZERS = {"byte-level": BYTES, "unigram": unigram(), "unigram, chat": CHAT, "bpe": bpe(), "slow": slow_bytes()}
ODD = st.sampled_from(
    ["\0", "\u202e", "שלום", "هنا", "👩‍🔬", "é", "e\u0301", "\u2028", "\ufeff", "<Td>", "</s>", "{", '"', "\r\n"]
)
TEXT = st.lists(ODD | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5).map("".join)
SPEAKING = TEXT.map(str.strip).filter(bool)
ROW = st.fixed_dictionaries(
    {"before": TEXT, "answer": SPEAKING, "after": TEXT, "question": SPEAKING, "other": st.lists(SPEAKING, max_size=2)}
)


def written(rows: list[dict], ending: str) -> bytes:
    """A file of these rows."""
    if ending == "parquet":
        return pd.DataFrame(rows).to_parquet()
    if ending == "csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"answer": row["answer"][0]} for row in rows)
        return out.getvalue().encode()
    dumped = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(rows)]
    return ("[" + ",".join(dumped) + "]" if ending == "json" else "\n".join(dumped)).encode()


def composed(text: str) -> str:
    """An answer is there in whatever normal form."""
    return unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=30)
@given(rows=st.lists(ROW, min_size=1, max_size=4), ending=st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_whatever_the_text_its_spans_decode_to_it_from_any_file(kind, rows, ending, tmp_path_factory):
    tokenizer = TOKENIZERS[kind]
    if kind == "slow":  # it loses the space around </s>: refused, see below
        rows = json.loads(json.dumps(rows).replace("</s>", "</t>"))
    exact = kind in ("byte-level", "slow")  # the others write a space after a special token in the text
    plain = composed if exact else lambda text: composed(text.replace(" ", ""))
    rows = [
        {
            "context": f"{row['before']}({row['answer']}){row['after']}",
            "question": row["question"],
            "answer": [row["answer"], *row["other"]],
        }
        for row in rows
    ]
    file = tmp_path_factory.mktemp("any") / f"a.{ending}"
    file.write_bytes(written(rows, ending))
    examples = read_examples(file).examples
    assert [(e.context, e.question) for e in examples] == [(row["context"], row["question"]) for row in rows]
    for example in examples:
        encoded = encode(example, tokenizer)
        found = [plain(text_of(tokenizer, encoded.input_ids[span])) for span in encoded.answer_spans]
        answers = [plain(answer) for answer in example.answers]
        assert all(any(answer in text for answer in answers) for text in found), "a span without an answer"
        assert any(answers[0] in text for text in found), "an answer that is there has no span"
        assert plain(example.context.strip()) in plain(text_of(tokenizer, encoded.input_ids[encoded.context]))
        absent = Example("e", example.context, "q", (f"{example.context.strip()}\ue123",))
        assert encode(absent, tokenizer).answer_spans == (), "a span for what is not there"
    fitted = fit_length(examples, tokenizer)
    assert (len(fitted.examples), fitted.dropped, fitted.without_answer) == (len(rows), (), ())


@settings(deadline=None, max_examples=60)
@given(rubbish=st.lists(st.binary(min_size=1, max_size=12).filter(lambda line: b"\n" not in line and line.strip())))
def test_lines_of_rubbish_are_counted_and_cost_no_other_line(rubbish, tmp_path_factory):
    good = [json.dumps(GOOD | {"id": str(number)}).encode() for number in range(len(rubbish) + 1)]
    mixed = [line for pair in zip(good, [*rubbish, b""], strict=True) for line in pair]
    file = tmp_path_factory.mktemp("rubbish") / "a.jsonl"
    file.write_bytes(b"\n".join(mixed))
    loaded = read_examples(file, skip_bad=True)
    assert [example.id for example in loaded.examples] == [str(number) for number in range(len(good))]
    places = [f"{file}, line {2 * number}: " for number in range(1, len(rubbish) + 1)]
    assert [bad[: len(place)] for bad, place in zip(loaded.bad, places, strict=True)] == places


def test_every_row_counts_once_and_a_row_without_an_id_is_called_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"id": "good"}, {"id": "good"}, b"{", without("id")))
    loaded = read_examples(tmp_path / "a.jsonl", skip_bad=True)
    assert [example.id for example in loaded.examples] == ["good", "4"]
    assert (loaded.rows, len(loaded.bad)) == (5, 3)


def test_what_a_tokenizer_cannot_encode_exactly_is_named_or_left_out_never_guessed():
    lossy = Example("lossy", "In </s> Bern.", "Where?", ("Bern",))  # a slow tokenizer drops the spaces around </s>
    fine = Example("fine", "In Bern.", "Where?", ("Bern",))
    with pytest.raises(MoELensError, match=r"example 'lossy' cannot be encoded: spans need a fast tokenizer"):
        fit_length([fine, lossy], slow_bytes())
    fitted = fit_length([fine, lossy], slow_bytes(), skip_bad=True)
    assert fitted.examples == (fine,)
    assert [reason.split(":")[0] for reason in fitted.bad] == ["example 'lossy' cannot be encoded"]
    with pytest.raises(MoELensError, match="no example is left; example 'lossy'"):
        fit_length([lossy], slow_bytes(), skip_bad=True)
