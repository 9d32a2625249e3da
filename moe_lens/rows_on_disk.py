"""Tables that are too large for memory: written and read part by part, and sealed as others are."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import MoELensError
from moe_lens.results import PROVENANCE_KEY, TABLE_REMEDY
from moe_lens.storage import SEAL, UNSEALED, as_json, cannot_write, check_sealed, replacing, seal_file

ROWS = 1 << 18
"""That are read at once."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Inside the block, what keeps a file from being written is a MoELensError."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


class RowWriter:
    """Takes tables of the same columns, one after another, as the parts of one in a file; see `growing_table`."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self._path, self._made_by = path, made_by
        self._writer: pq.ParquetWriter | None = None

    def add(self, rows: pd.DataFrame) -> None:
        """Writes the rows, of which there may be none, as a group of their own."""
        part = pa.Table.from_pandas(rows, preserve_index=False)
        with _writing(self._path):
            if self._writer is None:
                labels = {PROVENANCE_KEY: as_json({**self._made_by, SEAL: UNSEALED}).encode()}
                self._writer = pq.ParquetWriter(self._path, part.schema.with_metadata(labels))
            self._writer.write_table(part.cast(self._writer.schema), row_group_size=max(1, len(rows)))

    def close(self) -> None:
        """Ends the file; without any table there is none."""
        if self._writer is not None:
            with _writing(self._path):
                self._writer.close()


@contextmanager
def growing_table(path: Path, made_by: Mapping[str, Any]) -> Iterator[RowWriter]:
    """Inside the block a table grows on the disk; it is `path`, whole and sealed, once the block ends.

    `read_table` reads it, where it fits, as `pandas.read_parquet` does. After an exception `path` is as it was.
    Raises MoELensError where it cannot be written, as on a full disk.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        writer = RowWriter(unfinished, made_by)
        try:
            yield writer
        finally:
            writer.close()
        with _writing(path):
            seal_file(unfinished, at_end=True)


def parts_of(path: Path) -> Iterator[pd.DataFrame]:
    """The rows of a table on the disk, so many at a time; MoELensError for one that is damaged."""
    check_sealed(path, remedy=TABLE_REMEDY, at_end=True)
    with pq.ParquetFile(path) as file:
        for part in file.iter_batches(batch_size=ROWS):
            yield part.to_pandas()


def tables_of(path: Path) -> Iterator[pd.DataFrame]:
    """The tables that were added to one on the disk, one by one; MoELensError for one that is damaged."""
    check_sealed(path, remedy=TABLE_REMEDY, at_end=True)
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group).to_pandas()


def provenance_of(path: Path) -> dict[str, Any]:
    """A table's provenance, without reading its rows; MoELensError for a file that is no table."""
    try:
        told = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise MoELensError(f"cannot read {path} as a parquet table: {error}; {TABLE_REMEDY}") from None
    return {name: value for name, value in json.loads(told.get(PROVENANCE_KEY, "{}")).items() if name != SEAL}
