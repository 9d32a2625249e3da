"""Reading rows from files: JSON, JSON lines, CSV, TSV and parquet, the text ones also gzipped."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import MoELensError

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""What a file of rows is called; the text ones may also end in .gz."""

Records = Iterator[tuple[str, object]]
"""Rows, each with its place for errors ("FILE, line 3"); an error stands for a row that could not be read."""


def ending(path: str | Path) -> str | None:
    """Which of `ENDINGS` a name has, .gz aside; None for any other name."""
    name = str(path).lower().removesuffix(".gz")
    return next((known for known in ENDINGS if name.endswith(known)), None)


def read_rows(path: str | Path) -> Records:
    """The rows of a file, each with its place, read as its name says.

    A .json file is a list, or an object with the list under "data"; a .jsonl file has one value per line, blank
    lines aside. Text is UTF-8, with or without a byte order mark. The first line of .csv and .tsv names the columns.
    A line that is not JSON, or that has too few or too many cells, comes as the MoELensError that says so.
    Raises MoELensError for a file that cannot be read at all.
    """
    kind = ending(path)
    if kind is None:
        raise MoELensError(f"{path}: expected a file that ends in {', '.join(ENDINGS)} (or .gz after it)")
    if kind == ".parquet":
        return _parquet_rows(Path(path))
    text = read_text(path)
    if kind == ".json":
        return _json_rows(Path(path), text)
    if kind == ".jsonl":
        return _json_lines(Path(path), text)
    return csv_rows(Path(path), text, delimiter="," if kind == ".csv" else "\t")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, unzipped, without its byte order mark."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if str(path).lower().endswith(".gz") else data
        return data.decode("utf-8-sig")
    except (OSError, EOFError) as error:  # a broken .gz is an OSError too
        raise MoELensError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise MoELensError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} in line {line}; "
            "convert it, for example with iconv"
        ) from None


def csv_rows(path: Path, text: str, *, delimiter: str, columns: Sequence[str] | None = None) -> Records:
    """The rows of CSV text; `columns` names them where the first line does not."""
    csv.field_size_limit(2**31 - 1)  # contexts are longer than the default allows
    reader = csv.DictReader(io.StringIO(text, newline=""), columns, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                row = MoELensError(f"expected {len(reader.fieldnames)} cells, one for each column")
            yield place, row
    except csv.Error as error:
        raise MoELensError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _json_rows(path: Path, text: str) -> Records:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MoELensError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise MoELensError(f"{path}: expected a JSON list of objects; got {type(rows).__name__}")
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path, text: str) -> Records:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: texts may hold U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                row = MoELensError(f"not JSON ({error})")
            yield f"{path}, line {number}", row


def _parquet_rows(path: Path) -> Records:
    try:
        table = pq.ParquetFile(path)
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise MoELensError(f"cannot read {path}: {error}") from None
