"""The house style of all figures: template, colours, and the few helpers every drawing function needs."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from types import MappingProxyType

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale, unlabel_rgb

from moe_lens.errors import MoELensError

# Okabe and Ito's palette, which stays apart under the common kinds of colour blindness.
BLACK, GREY = "#000000", "#7F7F7F"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

#: Colours for whatever has none of its own, in this order.
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
#: Marker shapes, so that a figure survives a black-and-white printer. Seven, so that with eight colours no pair of
#: colour and shape comes again before the fifty-seventh.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
#: What sets things of one colour apart: a bar's pattern, with the dash of a line.
PATTERNS = {"": "solid", "/": "dash", "x": "dot", ".": "dashdot"}
#: From nothing to much; and from below zero through zero to above.
SEQUENTIAL = ((0.0, "#FFFFFF"), (0.5, SKY), (1.0, "#004B75"))
DIVERGING = ((0.0, VERMILLION), (0.5, "#FFFFFF"), (1.0, BLUE))

# Printed across one column of a two-column page (7.7 cm), labels come out at 6.4 pt; across both, at 13 pt.
WIDTH = 680  # pixels
#: Of a line within WIDTH, also in the wide DejaVu Sans that a browser falls back to on a bare Linux machine.
TITLE_LETTERS, SUBTITLE_LETTERS = 54, 82
FONT_SIZE = 20
INK, FAINT = "#222222", "#E3E3E3"

#: plotly's settings for a figure on a page: no button that sends data away, pictures saved as vectors.
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    "toImageButtonOptions": {"format": "svg"},
}


@dataclass(frozen=True)
class Look:
    """How a figure draws one of the things that it tells apart. pattern: one of PATTERNS; "" is plain."""

    colour: str
    symbol: str
    pattern: str = ""

    @property
    def mark(self) -> dict[str, object]:
        """Of a scatter trace's marker."""
        return {"color": self.colour, "symbol": self.symbol + ("-open" if self.pattern else "")}

    @property
    def line(self) -> dict[str, object]:
        """Of a scatter trace's line."""
        return {"color": self.colour, "width": 2, "dash": PATTERNS[self.pattern]}

    @property
    def bar(self) -> dict[str, object]:
        """Of a bar trace's marker."""
        return {"color": self.colour, "pattern": {"shape": self.pattern, "size": 7, "solidity": 0.4}}


#: Every colour plain, then every colour in each pattern.
LOOKS = tuple(
    Look(colour, SYMBOLS[place % len(SYMBOLS)], pattern)
    for place, (pattern, colour) in enumerate((pattern, colour) for pattern in PATTERNS for colour in CYCLE)
)


def looks(
    names: Iterable[str], known: Mapping[str, Look] = MappingProxyType({}), *, repeat: bool = False
) -> dict[str, Look]:
    """The look of each name, in order: its known one, which is the same in every figure, or one that no known name has.

    repeat: where there are more names than looks these come again, in figures that name what the pointer is on.
    Otherwise MoELensError for so many.
    """
    taken = {(look.colour, look.pattern) for look in known.values()}
    spare = [look for look in LOOKS if (look.colour, look.pattern) not in taken]
    new = [name for name in dict.fromkeys(names) if name not in known]
    if len(new) > len(spare) and not repeat:
        raise MoELensError(f"a figure has looks for {len(spare)} names, not {len(new)}: {', '.join(new)}; draw fewer")
    found = dict(zip(new, cycle(spare), strict=False))
    return {name: known.get(name) or found[name] for name in dict.fromkeys(names)}


def ordered_looks(names: Sequence[str]) -> dict[str, Look]:
    """Looks of things that follow one another, from light to dark."""
    colours = sample_colorscale("Viridis", np.linspace(0.9, 0.0, len(names)).tolist())
    colours = ["#{:02x}{:02x}{:02x}".format(*map(round, unlabel_rgb(colour))) for colour in colours]
    return {
        name: Look(colour, SYMBOLS[place % len(SYMBOLS)])
        for place, (name, colour) in enumerate(zip(names, colours, strict=True))
    }


def _template() -> go.layout.Template:
    """The plotly template of every figure."""
    axis = {
        "showline": True,
        "linecolor": INK,
        "ticks": "outside",
        "tickcolor": INK,
        "gridcolor": FAINT,
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": FONT_SIZE}},
    }
    layout = {
        "font": {"family": "Helvetica, Arial, sans-serif", "size": FONT_SIZE, "color": INK},
        "title": {
            "x": 0.0,
            "xref": "container",
            "xanchor": "left",
            "pad": {"l": 14, "t": 14},
            "yref": "container",
            "y": 1.0,
            "yanchor": "top",
            "font": {"size": 22},
            "subtitle": {"font": {"size": 15, "color": "#555555"}},
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": CYCLE,
        "margin": {"l": 70, "r": 24, "t": 96, "b": 60},
        "legend": {"orientation": "h", "x": 0.5, "xanchor": "center", "yanchor": "top", "font": {"size": 18}},
        "hoverlabel": {"align": "left", "font": {"size": 13}},
        "xaxis": axis,
        "yaxis": axis,
    }
    return go.layout.Template(layout=layout)


TEMPLATE = _template()


def dress(
    figure: go.Figure,
    *,
    title: str,
    subtitle: str,
    plot_height: int,
    below: int = 70,
    headings: bool = False,
) -> go.Figure:
    """Put the house style, a title that says what is seen and a grey second line on a figure; returns it.

    All in pixels: `plot_height` is the axes' height, `below` the room that tick and axis labels need under
    it before the legend begins; `headings` asks for room for the headings of panels.
    """
    names = [trace.name or "" for trace in figure.data if trace.showlegend is not False]
    legend_rows = _legend_rows(names)
    titles, lines = textwrap.wrap(title, TITLE_LETTERS), textwrap.wrap(subtitle, SUBTITLE_LETTERS)
    top = 33 + 29 * len(titles) + 20 * len(lines) + 30 * headings
    bottom = below + 30 * legend_rows
    figure.update_layout(
        template=TEMPLATE,
        meta={"title": title, "subtitle": subtitle, "top": 24 + 30 * headings},
        title={
            "text": "<br>".join(titles),
            "subtitle": {"text": "<br>".join(lines)},
            "pad": {"l": 14, "t": 14 + 15 * (len(titles) > 1)},  # plotly sets several lines 0.7 em too high
        },
        width=WIDTH,
        height=top + plot_height + bottom,
        margin={"t": top, "b": bottom},
        legend={"y": -below / plot_height},
    )
    figure.update_annotations(font_size=18)  # the headings of panels
    return figure


def _legend_rows(names: Sequence[str]) -> int:
    """In how many lines plotly sets these names below a figure: one, or columns as wide as the longest; 0 of none."""
    widths, room = [60 + 9 * len(name) for name in names], WIDTH - 100
    if sum(widths) <= room:
        return min(1, len(widths))
    return math.ceil(len(widths) / max(1, room // max(widths)))


def untitled(figure: go.Figure) -> go.Figure:
    """A copy of a dressed figure without its title and the room for it, as wide as where it stands."""
    bare = go.Figure(figure)
    top = bare.layout.meta["top"]
    bare.update_layout(height=bare.layout.height - bare.layout.margin.t + top, margin={"t": top}, width=None)
    bare.layout.title, bare.layout.meta = None, None
    return bare


def bars(table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """What the bars of a figure of these metrics mean, after `tables.over_seeds`."""
    if "seeds" not in table.columns:
        return "bars: 95 % intervals" if any(f"{metric}_low" in table for metric in metrics) else "one run"
    one = ", else 95 % intervals" if table["seeds"].min() == 1 else ""
    return f"mean of {table['seeds'].max()} seeds, bars: lowest to highest{one}"


def ranked(scores: pd.Series) -> list[str]:
    """Who has the highest score, who the next, and so on: "CEFT and FFT (0.93)"; more than three are counted.

    scores: by name; missing ones are left out.
    """
    printed = scores.dropna().sort_values(ascending=False, kind="stable").map("{:.2f}".format)
    return [
        f"{' and '.join(same.index) if len(same) <= 3 else f'{len(same)} alike'} ({value})"
        for value, same in printed.groupby(printed, sort=False)
    ]


def counts(numbers: pd.Series) -> str:
    """How many, as a number or from the fewest to the most."""
    low, high = numbers.min(), numbers.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def hover(table: pd.DataFrame) -> list[str]:
    """For each row its columns and values as lines, to be shown when the pointer rests on its mark."""
    rows = table.to_dict("records")
    return ["<br>".join(f"{name}: {number(value)}" for name, value in row.items()) for row in rows]


def number(value: object) -> str:
    """A value as people read it: floats to four significant digits, the rest as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def error_bars(table: pd.DataFrame, name: str) -> dict[str, object]:
    """Plotly's asymmetric error bars from the columns NAME, NAME_low and NAME_high."""
    return {
        "type": "data",
        "symmetric": False,
        "array": table[f"{name}_high"] - table[name],
        "arrayminus": table[name] - table[f"{name}_low"],
        "thickness": 1.6,
        "width": 4,
    }


def translucent(colour: str, opacity: float) -> str:
    """A #RRGGBB colour as rgba(...)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
