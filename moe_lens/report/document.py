"""View: an interactive HTML page that works offline, as a file and in a notebook."""

import html
import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import plotly.graph_objects as go

from moe_lens.storage import write_bytes

Value = str | int | float | list["Value"] | dict[str, "Value"] | None


@dataclass(frozen=True)
class View:
    """A self-contained page. At the end of a notebook cell it shows itself; `save` writes it as a file.

    html: the whole document, with its data, style and code inside; it loads nothing.
    height: what it takes in a notebook, in pixels; more scrolls.
    still: what it shows first, as a figure that can be printed; None where there is none.
    """

    html: str = field(repr=False)
    height: int = 620
    still: go.Figure | None = field(default=None, repr=False)

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file, whole or not at all, and returns its path."""
        write_bytes(path, self.html.encode())
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that it and the notebook leave each other's style alone."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )


def view(title: str, note: str, *, script: str, data: Value, height: int = 620) -> View:
    """A page with a heading, a grey line below it, and what `script` (a file in views/) makes of `data`."""
    return View(
        _PAGE.format(
            title=html.escape(title),
            note=html.escape(note),
            style=asset("view.css"),
            data=_json(data),
            colours=asset("colours.js"),
            script=asset(script),
        ),
        height=height,
    )


def _json(data: Value) -> str:
    """JSON that no text in it can break out of: inside a script element only "<" could end it."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def asset(name: str) -> str:
    """A file of views/ that pages hold."""
    return (files("moe_lens.report.views") / name).read_text(encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{note}</p>
<main id="view" tabindex="0"></main>
<script id="data" type="application/json">{data}</script>
<script>
{colours}{script}</script>
</body>
</html>
"""
