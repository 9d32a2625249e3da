"""Tables and summaries on disk: sealed, the same bytes for the same input, with provenance, and never another run's."""

import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lens.errors import MoELensError
from moe_lens.storage import (
    SEAL,
    UNSEALED,
    as_json,
    digest_of,
    nameable,
    read_sealed,
    read_sealed_json,
    seal,
    write_bytes,
    write_sealed_json,
)

if TYPE_CHECKING:
    from moe_lens.data.example import Example

PACKAGES = ("moe_lens", "torch", "transformers", "nnsight", "numpy")
RUN_FILE = "run.json"
"""What tells in a run's folder how it is made."""
WRITTEN = (
    *("*.parquet", "*.safetensors", "*.pt", "*.html", "figure3.png", "tuning.png", "log.jsonl"),
    *("summary.json", "delta.json", "intervention.json", "cost.json", "dev.json"),
    *("parts/*", "sets/*", "judge/*", "merged/*", "tables/*.parquet", "atlas/*.js", "tensorboard/*/*", "wandb/*/*"),
)
"""What commands write into the folder of a run."""
PROVENANCE_KEY = b"moe_lens.provenance"
TABLE_REMEDY = "remove it, and the command that wrote it makes it again"


def write_table(table: pd.DataFrame, path: str | Path, provenance: dict[str, Any]) -> None:
    """The table as parquet, with its provenance as JSON in the file's metadata; the index is not stored."""
    columns = pa.Table.from_pandas(table, preserve_index=False)
    labels = {**columns.schema.metadata, PROVENANCE_KEY: as_json({**provenance, SEAL: UNSEALED}).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(columns.replace_schema_metadata(labels), sink)
    write_bytes(path, seal(sink.getvalue().to_pybytes()))


def read_table(path: str | Path) -> pd.DataFrame:
    """A table that `write_table` wrote; MoELensError if there is none, and for one that is damaged."""
    return _read(path)[0]


def read_provenance(path: str | Path) -> dict[str, Any]:
    """The provenance of a table that `write_table` wrote; MoELensError as from `read_table`."""
    return _read(path)[1]


def _read(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    if not nameable(path).exists():
        raise MoELensError(f"there is no table {path}")
    content = read_sealed(path, remedy=TABLE_REMEDY)
    try:
        found = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowInvalid) as error:
        raise MoELensError(f"cannot read {path} as a parquet table: {error}") from None
    told = json.loads((found.schema.metadata or {}).get(PROVENANCE_KEY, "{}"))
    return found.to_pandas(), {name: value for name, value in told.items() if name != SEAL}


def claim(folder: Path, made_by: dict[str, Any], *, writes: Sequence[str] = ()) -> None:
    """Makes a folder this run's: its provenance, whatever the command line, stands in run.json from now on.

    A run.json with nothing else beside or below it is of a run that came to nothing, and is replaced.
    writes: patterns of what this run writes beside `WRITTEN`. Raises MoELensError for a folder with another run's, with
    a run.json of something else, and with files that a command may write and of which no run.json tells: nothing of the
    user's is overwritten.
    """
    path = folder / RUN_FILE
    if path.exists():
        told = read_sealed_json(path, remedy="choose another folder")
        if any(file.is_file() and file != path for file in folder.rglob("*")):
            expect_same_run(folder, told, made_by)
            return
    foreign = [file for name in (*WRITTEN, *writes) for file in sorted(folder.glob(name)) if file.is_file()]
    if foreign:
        names = ", ".join(str(file.relative_to(folder)) for file in foreign[:3])
        raise MoELensError(
            f"{folder} holds {names} of another run, and no {RUN_FILE} that says of which, or something else of yours; "
            "choose another folder"
        )
    write_sealed_json(path, _facts(made_by))


def read_if_made_by(path: str | Path | None, provenance: dict[str, Any]) -> pd.DataFrame | None:
    """The table that `write_table` wrote under this provenance, whatever the command; None if there is none.

    Raises MoELensError for a table that was made otherwise, and would be lost.
    """
    if path is None or not Path(path).exists():
        return None
    table, found = _read(path)
    expect_same_run(path, found, provenance)
    return table


def _facts(made_by: dict[str, Any]) -> dict[str, Any]:
    """Provenance as it is read, without the command line."""
    read: dict[str, Any] = json.loads(as_json(made_by))
    return {name: value for name, value in read.items() if name != "command"}


def expect_same_run(path: str | Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """MoELensError unless what is there was made as what is wanted; it says in what they differ."""
    there, here = (_flat(_facts(made_by)) for made_by in (found, wanted))
    differing = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if differing:
        told = "; ".join(
            f"its {name} is {_brief(there, name)}, here it is {_brief(here, name)}" for name in differing[:3]
        )
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        remedy = "Choose another folder" if Path(path).is_dir() else f"Choose another folder, or remove {path}"
        raise MoELensError(f"{path} holds the results of another run: {told}{more}. {remedy}")


def _flat(facts: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The facts with those inside others by a name of their own, such as data.examples."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _brief(facts: dict[str, Any], name: str) -> str:
    """A fact, without the digits of digests that nobody reads."""
    text = str(facts.get(name))
    return text[:8] if re.fullmatch(r"[0-9a-f]{16,}", text) else f"{text[:100]}…" if len(text) > 100 else text


def kept(path: str | Path | None, made_by: dict[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table at `path`, made by the same, whatever the command; else what `make` gives, kept there now.

    path: None keeps nothing. Raises MoELensError for a table there that was made otherwise.
    """
    found = read_if_made_by(path, made_by)
    if found is None:
        found = make()
        if path is not None:
            write_table(found, path, made_by)
    return found


def write_json(path: str | Path, value: object) -> None:
    """The value as indented JSON; numpy scalars become numbers, and NaN or infinity raises ValueError."""
    write_bytes(path, (as_json(value, indent=2) + "\n").encode())


def provenance(
    *,
    model: str,
    delta: str | Path | None = None,
    data: "Sequence[Example] | None" = None,
    seed: int | None = None,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Where a result came from; the same run gives the same provenance, so there is no time in it.

    model: hub id, folder or name. delta: the file or folder of trained parameters put on it; its content, but for
    the command line that a folder tells, is hashed. data: the examples used, which are counted and hashed. facts:
    anything else that matters, such as revision, dtype and mode. Also recorded: Python's and the packages' versions
    and the command line. Of absolute paths only the last part is kept, so that runs compare across machines.
    """
    trained = None if delta is None else {"name": Path(delta).name, "sha256": _sha256_of_delta(Path(delta))}
    return {
        "model": portable(model),
        "delta": trained,
        "data": None if data is None else data_digest(data),
        "seed": seed,
        **(facts or {}),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "command": [Path(sys.argv[0]).stem, *map(portable, sys.argv[1:])],
    }


def data_digest(examples: "Sequence[Example | str]") -> dict[str, Any]:
    """What tells examples, or bare texts, from others: how many there are, and a hash over all that is in them."""
    digest = hashlib.sha256()
    for example in examples:
        told = example if isinstance(example, str) else asdict(example)
        digest.update(as_json(told).encode() + b"\n")
    return {"examples": len(examples), "sha256": digest.hexdigest()}


def _version(package: str) -> str | None:
    """The installed version; None for a package that is used without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def portable(argument: str) -> str:
    """A command-line argument with an absolute path, also after "=", cut down to the path's last part.

    Of an address only what tells the server: neither a name and password nor what comes after a "?".
    """
    argument = public_address(argument)
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def public_address(text: str) -> str:
    """An address, or an argument that ends in one, without what may be secret in it; any other text as it is."""
    found = re.fullmatch(r"(.*?\w://)(?:(.*)@)?([^?#]*).*", text, flags=re.DOTALL)
    if found is None:
        return text
    scheme, user, server = found.groups()
    if re.search("[?#]", user or ""):  # then what comes after the "@" may be a part of a query, not the server
        return f"{scheme}…"
    return scheme + server


def _sha256_of_delta(path: Path) -> str:
    """A hash over a file, or over the tensors and facts of a folder's delta checkpoint, whatever command made it."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("delta.*")) if path.is_dir() else [path]:
        if file.name == "delta.json" and path.is_dir():
            told = _facts(read_sealed_json(file, remedy=f"tune again into another folder than {path}"))
            digest.update(f"{file.name}:{as_json(told)}\n".encode())
        elif file.is_file():
            digest.update(f"{file.name}:{digest_of(file)}\n".encode())
    return digest.hexdigest()
