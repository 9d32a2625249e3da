"""Reading rows from files: JSON, JSON lines, CSV, TSV and parquet, the text ones also gzipped."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from moe_lens.errors import MoELensError

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""What a file of rows is called; the text ones may also end in .gz."""

MOST_OF_A_LINE, MOST_OF_JSON = 2**26, 2**30
"""The longest line and the largest .json file that are read, in bytes, unzipped: what unpacks to more is no text."""

Records = Iterator[tuple[str, object]]
"""Rows, each with its place for errors ("FILE, line 3"); an error stands for a row that could not be read."""


def ending(path: str | Path) -> str | None:
    """Which of `ENDINGS` a name has, .gz aside; None for any other name."""
    name = str(path).lower().removesuffix(".gz")
    return next((known for known in ENDINGS if name.endswith(known)), None)


def read_rows(path: str | Path) -> Records:
    """The rows of a file, each with its place, read as its name says.

    A .json file is a list, or an object with the list under "data", and is read as a whole; a .jsonl file has one value
    per line, blank lines aside. All but .json are read only as far as rows are taken. Text is UTF-8, with or without a
    byte order mark. The first line of .csv and .tsv names the columns.
    A line that is not JSON, or that has too few or too many cells, comes as the MoELensError that says so.
    Raises MoELensError for a file that cannot be read at all.
    """
    kind, is_list = ending(path), str(path).endswith(".txt")
    if kind is None:
        raise MoELensError(
            f"{path}: expected a file that ends in {', '.join(ENDINGS)} (or .gz after it)"
            + ("; lists of prompts are read by moe_lens.find and moe_lens.intervene" if is_list else "")
        )
    if kind == ".parquet":
        return _parquet_rows(Path(path))
    if kind == ".jsonl":
        return _json_lines(Path(path))
    if kind == ".json":
        return _json_rows(Path(path))
    return csv_rows(Path(path), delimiter="," if kind == ".csv" else "\t")


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, unzipped, without its byte order mark; only those asked for are read.

    Raises MoELensError for a file that cannot be read, a line that is no UTF-8, and one that is too long.
    """
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise MoELensError(f"{path}, line {number}: {_not_text(error)}") from None


def csv_rows(path: Path, *, delimiter: str, columns: Sequence[str] | None = None) -> Records:
    """The rows of a CSV file; `columns` names them where the first line does not."""
    csv.field_size_limit(MOST_OF_A_LINE)  # contexts are longer than the default allows
    lines = (part for line in text_lines(path) for part in io.StringIO(line, newline=""))  # those that end in \r too
    reader = csv.DictReader(lines, columns, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                yield place, MoELensError(f"expected {len(reader.fieldnames or ())} cells, one for each column")
            else:
                yield place, row
    except csv.Error as error:
        raise MoELensError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file, unzipped as it is read; inside the block what is wrong with it is a MoELensError."""
    try:
        zipped = str(path).lower().endswith(".gz")
        with cast(BinaryIO, gzip.open(path)) if zipped else Path(path).open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            yield file
    except MoELensError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # a broken .gz, or a name with NUL in it
        raise MoELensError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _lines(path: str | Path) -> Iterator[bytes]:
    with _opened(path) as file:
        number = 1
        while line := file.readline(MOST_OF_A_LINE + 1):
            if len(line) > MOST_OF_A_LINE:
                raise MoELensError(f"{path}, line {number}: over {MOST_OF_A_LINE:,} bytes; expected a row a line")
            yield line
            number += 1


def _not_text(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte {error.object[error.start]:#04x}); convert the file, for example with iconv"


def _json_rows(path: Path) -> Records:
    with _opened(path) as file:
        data = file.read(MOST_OF_JSON + 1)
    if len(data) > MOST_OF_JSON:
        raise MoELensError(f"{path} has more than {MOST_OF_JSON:,} bytes; give it as .jsonl, read row by row")
    if not data.strip():
        return iter(())
    try:
        rows = json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MoELensError(f"{path}, line {line}: {_not_text(error)}") from None
    except json.JSONDecodeError as error:
        raise MoELensError(f"{path}, line {error.lineno}: not JSON ({error})") from None
    except (ValueError, RecursionError) as error:
        raise MoELensError(f"{path}: not JSON that can be read ({error})") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise MoELensError(f"{path}: expected a JSON list of objects; got {type(rows).__name__}")
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path) -> Records:
    for number, line in enumerate(_lines(path), start=1):  # which end in \n alone: texts may hold U+2028
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

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            for row in _batch_rows(batch):
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise MoELensError(f"cannot read {path}: {error}") from None


def _batch_rows(batch: Any) -> list[object]:
    """The rows of a batch of parquet; a MoELensError for each whose texts or dates are damaged."""
    try:
        return cast(list[object], batch.to_pylist())
    except UnicodeDecodeError as error:
        damage = MoELensError(_not_text(error))
    except (ValueError, OverflowError) as error:
        damage = MoELensError(f"not values that can be read ({error})")
    if len(batch) == 1:
        return [damage]
    return [row for place in range(len(batch)) for row in _batch_rows(batch.slice(place, 1))]
