"""What the command lines share: exit codes, tables on the terminal, and saved figures."""

import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import cleandoc
from itertools import pairwise
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from moe_lens.commands.groups import grouped
from moe_lens.errors import MoELensError
from moe_lens.interruption import INTERRUPTED
from moe_lens.progress import is_quiet

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import torch

Number = TypeVar("Number", int, float)
DTYPES = ("float32", "bfloat16", "float16")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Environment variables by which torchrun tells a process which of several it is."""
OF_CTRL_C = 130
"""The exit code that typer gives an interrupted command."""
COUNTS = {"n", "missing", "size", "examples", "tokens", "seed", "layer", "expert", "step"}
"""Columns whose numbers count or name something, and have no decimals."""
WIDE = 110
"""Characters of a terminal from which on help is a table."""
LONG = 24
"""Characters of a cell that is wrapped where a table is too wide."""
RANDOM = re.compile(r"random~(\d+x\d+(?:\+\d+x\d+)*)(?:#(\d+))?")


def run(main: Callable[..., None], *, shares: bool = False) -> None:
    """Runs a command line, as `grouped` makes it; bad input ends with its message and exit code 2, no traceback.

    Ctrl-C ends it with a line that says how to go on, and exit code 130, and so does SIGTERM, by which a scheduler ends
    a job; not where processes share the work, which could wait for each other then. shares: whether those that a
    launcher started do; else the first does it alone.
    """
    if not shares:
        first_alone()
    _refuse_no_text(sys.argv)
    _refuse_no_folder(sys.argv)
    command = grouped(main)
    command.__doc__ = flowing(main.__doc__ or "")
    usual, warnings.formatwarning = warnings.formatwarning, _warning
    app = typer.Typer(add_completion=False, rich_markup_mode=_markup())
    app.command()(command)
    try:
        with _ended_as_by_ctrl_c():
            app()
    except MoELensError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == OF_CTRL_C:
            print(INTERRUPTED, file=sys.stderr)
        raise
    finally:
        warnings.formatwarning = usual


def _markup() -> Literal["rich"] | None:
    """How typer lays out help: in a table, or as plain lines where that would cut names and values for want of room."""
    return "rich" if shutil.get_terminal_size().columns >= WIDE else None


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Inside the block SIGTERM interrupts this process as Ctrl-C does, unless it shares work with others."""
    if any(name in os.environ for name in LAUNCHED) or threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def first_alone() -> None:
    """Ends this process unless it is the first of those that a launcher started, which goes on as if it were alone."""
    if not _speaks():
        raise SystemExit(0)
    for name in LAUNCHED:
        os.environ.pop(name, None)


def _refuse_no_text(line: Sequence[str]) -> None:
    """Ends the process where an argument has bytes that are no UTF-8, which no table or page could name."""
    for argument in line:
        try:
            argument.encode()
        except UnicodeEncodeError:
            print(f"error: arguments are UTF-8 text; got {argument!r}: rename what it names", file=sys.stderr)
            raise SystemExit(2) from None


def _refuse_no_folder(line: Sequence[str]) -> None:
    """Ends the process where --out names nothing, which a path would take for the current folder."""
    if "--out=" in line or any(pair == ("--out", "") for pair in pairwise(line)):
        print("error: --out names a folder; got an empty text (for the current one, give .)", file=sys.stderr)
        raise SystemExit(2)


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as a command says it: where in the code it comes from helps nobody there."""
    return f"warning: {message}\n"


def flowing(text: str) -> str:
    """A docstring whose paragraphs are one line each, which any terminal can wrap; those after \\b stay as they are."""
    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else part.replace("\n", " ") for part in paragraphs)


def _speaks() -> bool:
    """Whether this is the first of the processes that share the work."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: str) -> None:
    """Prints the lines, unless all is quiet; of several processes that share the work, only the first does."""
    if _speaks() and not is_quiet():
        for line in lines:
            print(line, flush=True)


def note(line: str) -> None:
    """Prints a line beside the results, to stderr, unless all is quiet; only the first process does."""
    if _speaks() and not is_quiet():
        print(line, file=sys.stderr, flush=True)


def check_dtype(name: str | None) -> None:
    """MoELensError unless this is the name of a dtype that models are loaded in, or None."""
    if name is not None and name not in DTYPES:
        raise MoELensError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}")


def dtype_named(name: str | None) -> "torch.dtype | None":
    """The torch dtype of a name such as "bfloat16"; None stays None."""
    import torch

    check_dtype(name)
    return None if name is None else getattr(torch, name)


def numbers(text: str, kind: Callable[[str], Number], *, what: str) -> list[Number]:
    """The numbers of a comma-separated option, in their order."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise MoELensError(f"{what} must be numbers separated by commas; got {text!r}") from None


def rates(text: str, *, what: str) -> list[float]:
    """The learning rates of an option; MoELensError unless each is a finite number above 0."""
    found = numbers(text, float, what=what)
    if not all(0 < rate < inf for rate in found):
        raise MoELensError(f"{what} must be finite and above 0; got {text!r}")
    if max(found) > 1:
        note(f"note: {what} {max(found):g} moves each weight by about that much at every step")
    return found


def show(table: "pd.DataFrame", columns: Sequence[str] | None = None, *, title: str) -> None:
    """Prints a table: counts whole, other numbers with three decimals, very small and very large ones readably.

    What is missing is a dash; rows and columns without anything are left out, and memory where nobody knows of any.
    Columns for which the terminal is too narrow stand in tables below, beside the first column again. Of several
    processes only the first prints.
    """
    from pandas.api.types import is_numeric_dtype

    if not _speaks():
        return
    told = _telling(table if columns is None else table[list(columns)])
    texts = {name: _cells(told[name]) for name in told}
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    console.print(title, style="bold")
    widths = {name: _width(name, cells) for name, cells in texts.items()}
    for part in _parts(widths, console.width):
        shown, roomy = Table(), sum(max(len(name), widths[name]) + 3 for name in part) < console.width
        for name in part:
            justify: Literal["left", "right"] = "right" if is_numeric_dtype(told[name]) else "left"
            width = None if roomy or any(len(cell) > LONG for cell in texts[name]) else widths[name]
            shown.add_column(
                name.replace("_", " "), justify=justify, width=width, min_width=widths[name], overflow="fold"
            )
        for row in zip(*(texts[name] for name in part), strict=True):
            shown.add_row(*row)
        console.print(shown)


def _width(name: str, cells: Sequence[str]) -> int:
    """The characters that a column needs, whose heading is wrapped between words and whose long cells anywhere."""
    return max(map(len, [*name.split("_"), *(cell[:LONG] for cell in cells)]))


def _parts(widths: Mapping[str, int], width: int) -> list[list[str]]:
    """The columns of tables that are no wider than this, if one column can be, each with the first column."""
    parts: list[list[str]] = []
    for name in widths:
        if not parts or sum(widths[own] + 3 for own in [*parts[-1], name]) + 1 > width:
            parts.append([*list(widths)[:1]] if parts else [])
        parts[-1].append(name)
    return parts


def save_figure(figure: "go.Figure", path: Path, *formats: str) -> list[Path]:
    """Writes a plotly figure as a page that works offline and, where kaleido finds a browser, as pictures beside it.

    formats: those of the pictures, a PNG by default. Returns the files written.
    """
    from moe_lens.report.plots import style
    from moe_lens.storage import write_bytes

    page = figure.to_html(include_plotlyjs=True, full_html=True, div_id=path.stem, config=style.CONFIG)
    write_bytes(path, page.encode())
    return [path, *save_pictures(figure, path, *(formats or ("png",)))]


def save_pictures(figure: "go.Figure", path: Path, *formats: str) -> list[Path]:
    """Writes a plotly figure beside `path` in these formats, such as "png" and "svg", where kaleido finds a browser.

    Returns the files written; those of an earlier figure are gone in any case.
    """
    from plotly.io import write_images

    from moe_lens.storage import write_bytes

    pictures = [path.with_suffix(f".{name}") for name in formats]
    for picture in pictures:
        picture.unlink(missing_ok=True)
    if find_spec("kaleido") is None:
        return []
    with TemporaryDirectory() as folder:
        drawn = [Path(folder, picture.name) for picture in pictures]
        try:  # all at once: each call starts a browser
            write_images([figure] * len(drawn), drawn, scale=[2 if name == "png" else 1 for name in formats])
        except RuntimeError as error:
            if "Chrome" not in str(error):
                raise
            return []  # kaleido is there, but no browser
        for picture, one in zip(pictures, drawn, strict=True):
            write_bytes(picture, one.read_bytes())
    return pictures


def _telling(table: "pd.DataFrame") -> "pd.DataFrame":
    """The rows and columns that say something; those of a table that says nothing at all stay."""
    told = table
    if {"metric", "n"} <= set(table):
        told = table[(table["metric"] != "memory") | (table["n"] != 0)]
    told = told.dropna(how="all")
    return told.dropna(axis="columns", how="all") if len(told) else table


def _cells(column: "pd.Series") -> list[str]:
    """The values of a column as they are printed."""
    from pandas.api.types import is_numeric_dtype

    if column.name in COUNTS and is_numeric_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return [_cell(value, missing) for value, missing in zip(column.tolist(), column.isna(), strict=True)]


def _cell(value: object, missing: bool) -> str:
    if missing:
        return "–"
    if isinstance(value, str):
        return RANDOM.sub(_random_in_words, value)
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _random_in_words(name: re.Match[str]) -> str:
    """The name of random sets with unlike layers, such as random~0x2+1x1, for people."""
    layers: dict[str, list[str]] = {}
    for part in name[1].split("+"):
        layer, _, size = part.partition("x")
        layers.setdefault(size, []).append(layer)
    told = [f"{size} in layer{'s' * (len(of) > 1)} {', '.join(of)}" for size, of in layers.items()]
    return f"random, {' and '.join(told)}{f', set {name[2]}' if name[2] else ''}"
