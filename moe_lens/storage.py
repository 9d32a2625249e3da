"""Files on disk: whole or not at all, and sealed, so that any bit that changes afterwards is told."""

import hashlib
import json
import mmap
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from moe_lens.errors import MoELensError

SEAL = "sha256_of_this_file"
"""The key of a file's digest in its JSON or its JSON header: of all its bytes, `UNSEALED` in the digest's place."""
UNSEALED = "0" * 64
DIGESTS_FILE = "digests.json"
_MARK = f'"{SEAL}"'.encode()  # a quote within a JSON text is escaped: only a key can look like this
_UNFINISHED = re.compile(r"\..*\.(?P<host>[^.]*)\.(?P<process>\d+)\.unfinished")
A_DAY = 86400.0
"""Seconds after which an unfinished file is left over, whoever wrote it."""


def seal(content: bytes) -> bytes:
    """The content with its digest in the place of the last `UNSEALED`."""
    place = _place(content.rfind(_MARK), content)
    return content[: place.start] + _digest(content, place).encode() + content[place.stop :]


def seal_file(path: Path, *, at_end: bool = False) -> None:
    """Puts the digest of a file in the place of its first `UNSEALED`; without reading it into memory.

    at_end: of its last, for a format that ends with what is said of it.
    """
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        place = _place(content.rfind(_MARK) if at_end else content.find(_MARK), content)
        content[place] = _digest(content, place).encode()
        content.flush()


def read_sealed(path: str | Path, *, remedy: str) -> bytes:
    """The content of a file that `seal` sealed; remedy: what to do where the file is not what was written.

    Raises MoELensError for a file that cannot be read, one without a digest, and one that has changed since.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a name with NUL in it is a ValueError
        raise MoELensError(f"cannot read {path}: {_why(error)}; {remedy}") from None
    _expect_seal(path, content, content.rfind(_MARK), remedy)
    return content


def check_sealed(path: Path, *, remedy: str, at_end: bool = False) -> None:
    """As `read_sealed`, of a file that `seal_file` sealed so, without reading it into memory."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _expect_seal(path, content, content.rfind(_MARK) if at_end else content.find(_MARK), remedy)
    except MoELensError:
        raise
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise MoELensError(f"cannot read {path}: {_why(error)}; {remedy}") from None


def write_sealed_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """The value as indented JSON that carries its own digest."""
    write_bytes(path, seal((as_json({**value, SEAL: UNSEALED}, indent=2) + "\n").encode()))


def read_sealed_json(path: str | Path, *, remedy: str) -> dict[str, Any]:
    """What `write_sealed_json` wrote; MoELensError, with the remedy, for anything else."""
    found: dict[str, Any] = json.loads(read_sealed(path, remedy=remedy))
    return {name: value for name, value in found.items() if name != SEAL}


def digest_of(path: Path, *, remedy: str | None = None) -> str:
    """The sha256 of a whole file; MoELensError, with the remedy, where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise MoELensError(f"cannot read {path}: {_why(error)}{f'; {remedy}' if remedy else ''}") from None


def write_digests(folder: Path) -> None:
    """Writes the digests of a folder's files beside them."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != DIGESTS_FILE)
    write_sealed_json(folder / DIGESTS_FILE, {file.name: digest_of(file) for file in files})


def check_digests(folder: Path, *, remedy: str) -> None:
    """MoELensError unless the files that `write_digests` found in a folder are as they were."""
    for name, digest in read_sealed_json(folder / DIGESTS_FILE, remedy=remedy).items():
        if digest_of(folder / name, remedy=remedy) != digest:
            raise MoELensError(f"{folder / name} is damaged: its content is not what was written there; {remedy}")


def as_json(value: object, indent: int | None = None) -> str:
    """The value as JSON; numpy scalars become numbers, and NaN or infinity raises ValueError."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=_number)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Makes the file hold `content`, whole or (if interrupted) not at all; missing folders are created.

    Raises MoELensError where it cannot be written, as on a full disk; what the file held before stays.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            file.write(content)
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> MoELensError:
    """What is to be told of a file that could not be written."""
    return MoELensError(f"cannot write {path}: {_why(error)}; make room or choose another place, and try again")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place beside `path` to write a file or folder to; once the block ends it is on the disk as `path`.

    After an exception `path` is as it was. What a killed process leaves, `try_folder` removes.
    """
    writer = f"{_host()}-{os.environ.get('RANK', 0)}.{os.getpid()}"  # machines that share a folder repeat numbers
    unfinished = path.with_name(f".{path.name}.{writer}.unfinished")
    try:
        yield unfinished
        if unfinished.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        _remove(unfinished)


def nameable(path: str | Path) -> Path:
    """The path; MoELensError for one that no file or folder can have, such as one too long or with NUL in it."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise MoELensError(f"expected a file or folder; got {str(path)!r:.80} ({_why(error)})") from None
    return Path(path)


def is_there(path: Path | str) -> bool:
    """Whether there is such a file or folder; of a text that can be no path, such as too long a name, there is none."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def try_folder(folder: Path) -> None:
    """MoELensError unless files can be written to `folder`, which may not be there yet and is left as it was.

    What dead processes left unfinished in it is removed. Of several processes that share the work the first does all
    this, or one would take the folder away while another tries it.
    """
    nameable(folder)
    if os.environ.get("RANK", "0") != "0":
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".writable.") as probe:
            probe.write(b"moe_lens")
            probe.flush()
    except (OSError, ValueError) as error:
        raise MoELensError(f"cannot write to the folder {folder}: {_why(error)}; choose another one") from None
    finally:
        with suppress(OSError):  # another process may use it by now
            for place in missing:
                place.rmdir()
    if not missing:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Removes what dead processes left unfinished in a folder and below."""
    for path in list(folder.rglob(".*.unfinished")):
        named = _UNFINISHED.fullmatch(path.name)
        if named is None:
            continue
        with suppress(FileNotFoundError):  # its process is done with it, or another one removed it
            here = named["host"].rpartition("-")[0] == _host()
            old = time.time() - path.stat().st_mtime > A_DAY
            if old or (here and not _lives(int(named["process"]))):
                _remove(path)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _place(mark: int, content: "bytes | mmap.mmap") -> slice:
    """Where the digest of a file lies that has its key at `mark`."""
    start = content.find(b'"', mark + len(_MARK)) + 1
    return slice(start, start + len(UNSEALED))


def _digest(content: "bytes | mmap.mmap", place: slice) -> str:
    """The sha256 of the content, with `UNSEALED` in that place."""
    with memoryview(content) as view:
        digest = hashlib.sha256(view[: place.start])
        digest.update(UNSEALED.encode())
        digest.update(view[place.stop :])
    return digest.hexdigest()


def _expect_seal(path: str | Path, content: "bytes | mmap.mmap", mark: int, remedy: str) -> None:
    if mark < 0:
        raise MoELensError(
            f"{path} carries no digest of its content: it is damaged, or not a file of this version of moe_lens; "
            f"{remedy}"
        )
    place = _place(mark, content)
    if content[place] != _digest(content, place).encode():
        raise MoELensError(f"{path} is damaged: its content is not what was written there; {remedy}")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")
