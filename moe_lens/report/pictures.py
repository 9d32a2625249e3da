"""The figures of a run as pictures for papers: pdf, svg or png, with or without their titles."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import plotly.graph_objects as go

from moe_lens.errors import MoELensError
from moe_lens.report.contents import SECTIONS
from moe_lens.report.plots import style
from moe_lens.results import read_table
from moe_lens.storage import write_bytes

FORMATS = ("pdf", "svg", "png")
LACKING = (
    "pictures are drawn by kaleido with Chrome, and there is no {}: pip install 'moe_lens[image]' and Chrome, or save "
    "single figures from report.html with the camera button above each"
)


def checked(formats: str | None, *, no_title: bool) -> tuple[str, ...]:
    """The formats of --format; MoELensError for others, without kaleido, and for no title without any."""
    if formats is None:
        if no_title:
            raise MoELensError("--no-title is about the pictures of --format, such as --format pdf; give both")
        return ()
    named = tuple(name.strip() for name in formats.split(","))
    if unknown := [name for name in named if name not in FORMATS]:
        raise MoELensError(f"--format is, with commas, of {', '.join(FORMATS)}; got {', '.join(unknown)}")
    if find_spec("kaleido") is None:
        raise MoELensError(LACKING.format("kaleido"))
    return named


def write_pictures(folder: Path, formats: Sequence[str], *, titled: bool) -> Iterator[Path]:
    """Draws each table of `SECTIONS` below the folder to its figures/, and gives the files as they are written."""
    for pattern, section in SECTIONS.items():
        for path in sorted(folder.rglob(pattern)):
            figure = section.drawn(read_table(path), path.relative_to(folder).as_posix())
            if not isinstance(figure, go.Figure):
                continue
            shown = figure if titled else style.untitled(figure).update_layout(width=style.WIDTH)
            name = "-".join(path.relative_to(folder).with_suffix("").parts)
            for ending in formats:
                target = folder / "figures" / f"{name}.{ending}"
                write_bytes(target, _picture(shown, ending))
                yield target


def _picture(figure: go.Figure, ending: str) -> bytes:
    try:
        drawn: bytes = figure.to_image(format=ending, scale=2 if ending == "png" else 1)
    except RuntimeError as error:
        if "Chrome" not in str(error):
            raise
        raise MoELensError(LACKING.format("Chrome")) from None
    return drawn
