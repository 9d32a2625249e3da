"""Finding what a specification of data names: a task of the organism, a named data set, a file, or `datasets`' own."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from moe_lens.data import authors
from moe_lens.data.dataset import Record, Source
from moe_lens.data.files import ENDINGS, Records, ending, read_rows
from moe_lens.data.sources import confiqa, counterfact, gigaword, hotpotqa, memotrap, mmlu, mrqa, nq_swap, squad
from moe_lens.errors import MoELensError
from moe_lens.storage import is_there, nameable

ORGANISM_TASKS = ("swap", "novel", "consistent", "hops", "closed_book", "summary", "exam", "otherwise")
SOURCES = {
    source.name: source
    for source in (
        squad.SOURCE,
        mrqa.NQ,
        hotpotqa.SOURCE,
        nq_swap.SOURCE,
        *confiqa.SOURCES,
        counterfact.SOURCE,
        memotrap.SOURCE,
        gigaword.SOURCE,
        mmlu.SOURCE,
        mmlu.TEXT,
    )
}


@dataclass(frozen=True)
class Found:
    """The records that hold a split.

    task: what examples made of them are of. source: the named data set, None for other data.
    parts: the sizes of the parts that the records have to be cut into, empty where they are the split itself.
    public: finds the records that what memory says is joined from; None where the records themselves may say it.
    """

    records: Records
    task: str
    source: Source | None = None
    parts: Mapping[str, int] | None = None
    public: "Callable[[], Found] | None" = None


def names_in(text: str) -> tuple[str, ...]:
    """The data that an option names, several with commas; a path with commas in it that is there is one.

    MoELensError for a blank name, and for one that is there twice.
    """
    names = (text,) if is_there(text) else tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise MoELensError(f"expected names of tasks or data with commas between them; got {text!r}")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise MoELensError(f"expected each data set once; {repeated[0]!r} is named twice")
    return names


def find(spec: str, split: str, *, streaming: bool) -> Found:
    """What `load_examples` is given; streaming: from the hub, read no more than is asked for.

    Raises MoELensError that says what there is where nothing is found, and what is nearest to a misspelt name.
    """
    if not spec.strip():
        raise MoELensError("expected the name of a task or data set, a file or a folder; got a blank")
    if spec in ORGANISM_TASKS:
        return Found(_task(spec, split), spec)
    nameable(spec)
    head, _, path = spec.partition(":")
    name, _, revision = head.partition("@")
    if name in SOURCES:
        source = SOURCES[name]
        if revision == authors.NAME:
            return _of_authors(source, path, split)
        if revision and path:
            raise MoELensError(
                f"{name}@{revision} is a revision on the hub, and {path!r} lies here; give {name}@{revision}, "
                f"{name}:{path}, or {name}@{authors.NAME}:{path} for the paper's own splits"
            )
        return _local(source, path, split) if path else _published(source, split, revision, streaming=streaming)
    if Path(spec).is_file() or (ending(spec) is not None and not path):
        return Found(read_rows(spec), Path(spec).name.removesuffix(".gz").removesuffix(ending(spec) or ""))
    if Path(spec).is_dir():
        if (file := _first_file(spec, *_own_names(split))) is not None:  # `datasets` calls dev.json "validation"
            return Found(read_rows(Path(spec, file)), Path(spec).name)
        records = _datasets(spec, split, f"the folder {spec} is no data set with a split {split!r}")
        return Found(records, Path(spec).name)
    if path or spec[0] in "./~":
        raise MoELensError(f"there is no file or folder {spec!r}{_meant(name)}")
    return Found(_hub(spec, split, streaming=streaming), Path(spec).name)


def _task(name: str, split: str) -> Records:
    folder = files("moe_lens") / "organism" / "tasks" / name
    splits = sorted(file.name.removesuffix(".json") for file in folder.iterdir())
    if split not in splits:
        raise MoELensError(f"{name} has the splits {', '.join(splits)}; got {split!r}")
    return read_rows(Path(str(folder / f"{split}.json")))


def _local(source: Source, path: str, split: str) -> Found:
    """A named data set from a file, which is taken whole, or from the folder of its splits."""
    if Path(path).is_file() or (ending(path) is not None and not Path(path).exists()):
        return Found(source.read(Path(path)), source.name, source)
    if not Path(path).is_dir():
        raise MoELensError(f"there is no file or folder {path!r}, from which to read {source.name}")
    home = source.home(split)
    published = source.files.get(home, ())
    if (file := _first_file(path, *_own_names(split), *published)) is not None:
        parts = source.carved.get(home) if file in published else None
        return Found(source.read(Path(path, file)), source.name, source, parts)
    names = ", ".join([*published, *(f"{split}{end}" for end in ENDINGS)])
    raise MoELensError(f"{path} has no file for the split {split!r} of {source.name}; expected one of {names}")


def _of_authors(source: Source, path: str, split: str) -> Found:
    """A split of the paper's authors, with the public records that know what memory says."""
    folder = authors.folder_of(source, path)
    records = authors.split_rows(folder, source, split)

    def public() -> Found:
        file = authors.public_file(source, folder)
        if file is not None:
            return Found(source.read(file), source.name, source)
        names = ", ".join(name for files in source.files.values() for name in files) or f"{authors.PUBLIC}.jsonl"
        lacking = (
            f"the authors' splits do not say what memory says, which is joined from the public {source.name}; put its "
            f"{names} into {folder}, or give {source.name}:{folder} to do without"
        )
        if source.hub is None:
            raise MoELensError(lacking)
        try:
            return _published(source, next(iter(source.hub.splits)), "", streaming=False)
        except MoELensError as error:
            raise MoELensError(f"{lacking}: {error}") from error

    return Found(records, source.name, source, public=public if source.says_memory else None)


def _own_names(split: str) -> list[str]:
    """What the file of a split is called in a folder of the user's own."""
    return [f"{split}{end}{zipped}" for end in ENDINGS for zipped in ("", ".gz")]


def _first_file(folder: str, *names: str) -> str | None:
    """The first of these names, of files or folders of them, that the folder has; None without one."""
    return next((name for name in names if Path(folder, name).exists()), None)


def _published(source: Source, split: str, revision: str, *, streaming: bool) -> Found:
    """A named data set from the hub, at the pinned revision or another one."""
    hub, home = source.hub, source.home(split)
    if hub is None:
        raise MoELensError(f"{source.name} is not on the hub in a form that can be pinned; give {source.name}:PATH")
    if home not in hub.splits:
        known = [*hub.splits, *(part for parts in source.carved.values() for part in parts)]
        raise MoELensError(f"{source.name} has the splits {', '.join(known)}; got {split!r}")
    parts = source.carved.get(home)
    at = revision or hub.revision
    failure = (
        f"{source.name} could not be had from the hub ({hub.id} at {at}); give {source.name}:PATH to read its files, "
        f"or {source.name}@REVISION for another revision"
    )
    records = _datasets(hub.id, hub.splits[home], failure, hub.config, at, streaming=streaming and not parts)
    own = ((place, record) for place, record in records if hub.keep(record))
    if hub.shots is None:
        return Found(own, source.name, source, parts)
    shots: dict[object, list[Record]] = {}
    for _, shot in _datasets(hub.id, hub.shots, failure, hub.config, at, streaming=streaming):
        shots.setdefault(shot.get("subject"), []).append(shot)
    shown = ((place, {**record, "shots": shots.get(record.get("subject"), [])}) for place, record in own)
    return Found(shown, source.name, source, parts)


def _hub(spec: str, split: str, *, streaming: bool) -> Records:
    """The records of any data set of the hub: ID, ID@REVISION or ID/CONFIG@REVISION."""
    name, _, revision = spec.partition("@")
    owner, _, rest = name.partition("/")
    rest, _, config = rest.partition("/")
    known = f"no task ({', '.join(ORGANISM_TASKS)}), no named data set ({', '.join(SOURCES)}), no file or folder"
    failure = f"cannot find {spec!r}{_meant(name)} It is {known}, and not on the hub with a split {split!r}"
    name = f"{owner}/{rest}" if rest else owner
    return _datasets(name, split, failure, config or None, revision or None, streaming=streaming)


def _datasets(
    name: str,
    split: str,
    failure: str,
    config: str | None = None,
    revision: str | None = None,
    *,
    streaming: bool = False,
) -> Iterator[tuple[str, Record]]:
    """The records that the package `datasets` loads; `failure` begins the error where it cannot."""
    import datasets  # takes seconds to import, and only these records need it

    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError) as error:
        raise MoELensError(f"{failure}: {error}") from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(table, start=1))


def _meant(name: str) -> str:
    """After what was not found: the name that may have been meant, if one is near."""
    near = get_close_matches(name.lower(), [*ORGANISM_TASKS, *SOURCES], n=1)
    return f"; did you mean {near[0]}?" if near else "."
