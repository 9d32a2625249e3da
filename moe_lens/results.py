"""Tables and summaries on disk: whole or not at all, the same bytes for the same input, with provenance."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import MoELensError

if TYPE_CHECKING:
    from moe_lens.data.example import Example

PACKAGES = ("moe_lens", "torch", "transformers", "nnsight", "numpy")
_PROVENANCE_KEY = b"moe_lens.provenance"


def write_table(table: pd.DataFrame, path: str | Path, provenance: dict[str, Any]) -> None:
    """The table as parquet, with its provenance as JSON in the file's metadata; the index is not stored."""
    columns = pa.Table.from_pandas(table, preserve_index=False)
    labels = {**columns.schema.metadata, _PROVENANCE_KEY: _json(provenance).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(columns.replace_schema_metadata(labels), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def read_table(path: str | Path) -> pd.DataFrame:
    """A table that `write_table` wrote; MoELensError if there is none."""
    _expect_file(path)
    try:
        return pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowInvalid) as error:
        raise MoELensError(f"cannot read {path} as a parquet table: {error}") from None


def read_provenance(path: str | Path) -> dict[str, Any]:
    """The provenance of a table that `write_table` wrote; MoELensError if it has none."""
    _expect_file(path)
    try:
        labels = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise MoELensError(f"cannot read {path} as a parquet table: {error}") from None
    if _PROVENANCE_KEY not in labels:
        raise MoELensError(f"{path} carries no provenance; expected a table that write_table wrote")
    found: dict[str, Any] = json.loads(labels[_PROVENANCE_KEY])
    return found


def refuse_another_run(path: str | Path, provenance: dict[str, Any]) -> None:
    """MoELensError if the table there is of another model, delta or data than `provenance`, and would be lost."""
    if not Path(path).exists():
        return
    wanted, found = json.loads(_json(provenance)), read_provenance(path)
    differing = [name for name in ("model", "delta", "data") if wanted.get(name) != found.get(name)]
    if differing:
        told = "; ".join(
            f"its {name} is {_brief(found.get(name))}, here it is {_brief(wanted.get(name))}" for name in differing
        )
        raise MoELensError(f"{path} holds the results of another run: {told}. Choose another folder, or remove it")


def _expect_file(path: str | Path) -> None:
    if not Path(path).exists():
        raise MoELensError(f"there is no table {path}")


def _brief(fact: Any) -> str:
    """What provenance says of a model, a delta or data, without the digits of digests that nobody reads."""
    if not isinstance(fact, dict):
        return str(fact)
    return ", ".join(f"{name} {value[:8] if name == 'sha256' else value}" for name, value in fact.items())


def read_if_made_by(path: str | Path | None, provenance: dict[str, Any]) -> pd.DataFrame | None:
    """The table that `write_table` wrote under this provenance, whatever the command; None if there is none."""
    if path is None or not Path(path).exists():
        return None
    wanted, found = (
        {key: value for key, value in made_by.items() if key != "command"}
        for made_by in (json.loads(_json(provenance)), read_provenance(path))
    )
    return read_table(path) if wanted == found else None


def kept(path: str | Path | None, made_by: dict[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table at `path` if it was made by the same, whatever the command; else what `make` gives, kept there now.

    path: None keeps nothing.
    """
    found = read_if_made_by(path, made_by)
    if found is None:
        found = make()
        if path is not None:
            write_table(found, path, made_by)
    return found


def write_json(path: str | Path, value: object) -> None:
    """The value as indented JSON; numpy scalars become numbers, and NaN or infinity raises ValueError."""
    write_bytes(path, (_json(value, indent=2) + "\n").encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Makes the file hold `content`, whole or (if interrupted) not at all; missing folders are created.

    Raises MoELensError where it cannot be written, as on a full disk; what the file held before stays.
    """
    path = Path(path)
    writer = f"{os.environ.get('RANK', 0)}.{os.getpid()}"  # processes of several machines may share a number
    unfinished = path.with_name(f".{path.name}.{writer}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        told = f"cannot write {path}: {error.strerror}; make room or choose another place, and try again"
        raise MoELensError(told) from error


def provenance(
    *,
    model: str,
    delta: str | Path | None = None,
    data: "Sequence[Example] | None" = None,
    seed: int | None = None,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Where a result came from; the same run gives the same provenance, so there is no time in it.

    model: hub id, folder or name. delta: the file or folder of trained parameters put on it; its content is
    hashed. data: the examples used, which are counted and hashed. facts: anything else that matters, such as
    revision, dtype and mode. Also recorded: Python's and the packages' versions and the command line. Of
    absolute paths only the last part is kept, so that runs compare across machines.
    """
    trained = None if delta is None else {"name": Path(delta).name, "sha256": _sha256_of_files(Path(delta))}
    return {
        "model": portable(model),
        "delta": trained,
        "data": None if data is None else data_digest(data),
        "seed": seed,
        **(facts or {}),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "command": [Path(sys.argv[0]).stem, *map(portable, sys.argv[1:])],
    }


def data_digest(examples: "Sequence[Example]") -> dict[str, Any]:
    """What tells examples from others: how many there are, and a hash over all that is in them."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(_json(asdict(example)).encode() + b"\n")
    return {"examples": len(examples), "sha256": digest.hexdigest()}


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=_number)


def _number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")


def _version(package: str) -> str | None:
    """The installed version; None for a package that is used without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def portable(argument: str) -> str:
    """A command-line argument with an absolute path, also after "=", cut down to the path's last part."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def _sha256_of_files(path: Path) -> str:
    """A hash over the names and contents of a file, or of the files of a folder's delta checkpoint."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("delta.*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                digest.update(f"{file.name}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
