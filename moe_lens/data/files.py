"""Reading rows from files: JSON, JSON lines, CSV, TSV and parquet, the text ones also gzipped."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    if kind == ".jsonl":
        return _json_lines(Path(path), _bytes(path))
    text = read_text(path)
    if kind == ".json":
        return _json_rows(Path(path), text)
    return csv_rows(Path(path), text, delimiter="," if kind == ".csv" else "\t")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, unzipped, without its byte order mark."""
    data = _bytes(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MoELensError(f"{path}, line {line}: {_not_text(error)}") from None


def csv_rows(path: Path, text: str, *, delimiter: str, columns: Sequence[str] | None = None) -> Records:
    """The rows of CSV text; `columns` names them where the first line does not."""
    csv.field_size_limit(2**31 - 1)  # contexts are longer than the default allows
    reader = csv.DictReader(io.StringIO(text, newline=""), columns, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                yield place, MoELensError(f"expected {len(reader.fieldnames or ())} cells, one for each column")
            else:
                yield place, row
    except csv.Error as error:
        raise MoELensError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _bytes(path: str | Path) -> bytes:
    """What is in a file, unzipped, without UTF-8's byte order mark."""
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if str(path).lower().endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:  # a broken .gz is one of these
        raise MoELensError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return data.removeprefix(codecs.BOM_UTF8)


def _not_text(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte {error.object[error.start]:#04x}); convert the file, for example with iconv"


def _json_rows(path: Path, text: str) -> Records:
    if not text.strip():
        return iter(())
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise MoELensError(f"{path}, line {error.lineno}: not JSON ({error})") from None
    except (ValueError, RecursionError) as error:
        raise MoELensError(f"{path}: not JSON that can be read ({error})") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise MoELensError(f"{path}: expected a JSON list of objects; got {type(rows).__name__}")
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path, data: bytes) -> Records:
    for number, line in enumerate(data.split(b"\n"), start=1):  # not splitlines: texts may hold U+2028
        if line.strip():
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                row = MoELensError(_not_text(error))
            except (ValueError, RecursionError) as error:
                row = MoELensError(f"not JSON ({error})")
            yield f"{path}, line {number}", row


def _parquet_rows(path: Path) -> Records:
    import pyarrow as pa  # slow to import, and only these rows need it
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise MoELensError(f"cannot read {path}: {error}") from None
