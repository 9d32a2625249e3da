"""A run directory as one HTML page that works offline: figures, their numbers, and where those came from."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype
from plotly.offline import get_plotlyjs

from moe_lens.errors import MoELensError
from moe_lens.report.contents import SECTIONS
from moe_lens.report.document import View, asset
from moe_lens.report.glossary import words_in
from moe_lens.report.plots import style
from moe_lens.report.section import Section
from moe_lens.results import read_provenance, read_table
from moe_lens.storage import nameable, try_folder, write_bytes

PAGE = "report.html"
MOST_ROWS = 400  # of a table, on the page
LONGEST = 400  # of a table's texts there, in characters


def build_report(folder: str | Path, *, title: str) -> Path:
    """Writes report.html into a run directory and returns its path.

    The page shows every table of `SECTIONS` that lies in the directory or below it: a figure as wide as the page, the
    numbers, and at the foot what its words mean and its provenance. plotly.js is inside, so the page
    needs no network. The same tables give the same bytes; an interrupted call leaves no half a page.

    Raises:
        MoELensError: there is no such directory, it holds no known table, or a table cannot be read or drawn.
    """
    folder = nameable(folder)
    if not folder.is_dir():
        raise MoELensError(f"expected a run directory; {folder} is {'a file' if folder.exists() else 'not there'}")
    try_folder(folder)
    found = [
        (path, replace(section, heading=f"{section.heading}: {path.stem}") if "*" in name else section)
        for name, section in SECTIONS.items()
        for path in sorted(folder.rglob(name))
    ]
    if not found:
        raise MoELensError(f"{folder} holds no table to report; known are {', '.join(SECTIONS)}")
    sections, sources, contents = [], [], []
    for place, (path, section) in enumerate(found):
        name = path.relative_to(folder).as_posix()
        sections.append(_section(name, read_table(path), section, place=place))
        sources.append(_source(name, read_provenance(path)))
        contents.append(f'<li><a href="#part-{place}">{html.escape(_heading(name, section))}</a></li>')
    page = _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        plotly=get_plotlyjs(),
        contents="\n".join(contents),
        sections="\n".join(sections),
        words=_words(sections),
        sources="\n".join(sources),
        room=f"const WIDTH = {style.WIDTH};\n{asset('narrow.js')}",
    )
    target = folder / PAGE
    write_bytes(target, page.encode())
    return target


def _section(name: str, table: pd.DataFrame, section: Section, *, place: int) -> str:
    """One table's part of the page."""
    return (
        f'<section id="part-{place}"><h2>{html.escape(_heading(name, section))}</h2>'
        f"<p>{html.escape(section.sentence)}</p>"
        f"{_drawing(name, table, section, place=place)}{_numbers(name, table)}</section>"
    )


def _heading(name: str, section: Section) -> str:
    """What stands above a table's part: also its folder, where that is not the page's."""
    parent = Path(name).parent.as_posix()
    return section.heading if parent == "." else f"{section.heading}: {parent}"


def _drawing(name: str, table: pd.DataFrame, section: Section, *, place: int) -> str:
    """The table's figure in HTML without plotly.js, empty where it has none."""
    figure = section.drawn(table, name)
    if figure is None:
        return ""
    if isinstance(figure, View):
        return f'<div class="figure">{figure._repr_html_()}</div>'
    told = figure.layout.meta or {"title": "", "subtitle": ""}
    words = f'<h3>{html.escape(told["title"])}</h3><p class="beside">{html.escape(told["subtitle"])}</p>'
    plot = style.untitled(figure).to_html(
        full_html=False, include_plotlyjs=False, div_id=f"figure-{place}", config=style.CONFIG, default_width="100%"
    )
    return f'{words}<div class="figure">{plot}</div>'


def _words(sections: list[str]) -> str:
    """What the words of the page's headings, sentences and tables mean; figures' code is no text."""
    text = re.sub(r"<script.*?</script>|<[^>]*>", " ", "\n".join(sections), flags=re.DOTALL)
    known = words_in(html.unescape(text))
    terms = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(told)}</dd>" for word, told in known.items())
    return f"<section><h2>What the words mean</h2><dl>{terms}</dl></section>" if known else ""


def _numbers(name: str, table: pd.DataFrame) -> str:
    """The table in HTML, as far as a page can hold it; numbers stand to the right."""
    kinds = ['class="number"' if is_numeric_dtype(table[column]) else "" for column in table.columns]
    head = _row("th", kinds, [str(column) for column in table.columns])
    shown = table.head(MOST_ROWS).itertuples(index=False, name=None)
    rows = "".join(_row("td", kinds, [_cell(it) for it in row]) for row in shown)
    part = f"The first {MOST_ROWS} of" if len(table) > MOST_ROWS else "All"
    return (
        f"<details open><summary>{part} {len(table)} rows of <code>{html.escape(name)}</code></summary>"
        f'<div class="numbers"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div></details>'
    )


def _cell(value: object) -> str:
    """A table's value as the page has it: a missing one as a dash, of a long text its beginning."""
    text = "–" if pd.isna(value) else style.number(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _row(tag: str, kinds: list[str], texts: list[str]) -> str:
    """One row of an HTML table."""
    cells = (f"<{tag} {kind}>{html.escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _source(name: str, provenance: dict[str, Any]) -> str:
    """One table's provenance for the foot of the page."""
    text = json.dumps(provenance, indent=2, ensure_ascii=False)
    name, text = html.escape(name), html.escape(text)
    return f"<details><summary><code>{name}</code></summary><pre>{text}</pre></details>"


_STYLE = """
body { font: 17px/1.5 Helvetica, Arial, sans-serif; color: #222; max-width: 760px }
body { margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.7em; line-height: 1.2 } h2 { font-size: 1.25em; margin-top: 2.5em }
h3 { font-size: 1.1em; margin-bottom: .2em } .beside { color: #555; margin-top: 0; font-size: .9em }
dt { font-weight: bold; float: left; clear: left; margin-right: .6em } dd { margin: 0 0 .3em 1.5em }
.figure { overflow-x: auto } code, pre { font-size: .85em } pre { overflow-x: auto }
summary { cursor: pointer; color: #555 }
.numbers { max-height: 15em; overflow: auto; margin-top: .5em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: .8em; white-space: nowrap; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: white; box-shadow: inset 0 -1px #222 }
th, td { padding: .25em .8em .25em 0; text-align: left } .number { text-align: right }
footer { margin: 3em 0; border-top: 1px solid #ccc }
@media print { .numbers { max-height: none } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<h1>{title}</h1>
<details><summary>Contents</summary><ul>
{contents}
</ul></details>
{sections}
{words}
<footer><h2>Where the numbers came from</h2>
{sources}
</footer>
<script>{room}</script>
</body>
</html>
"""
