"""A prompt coloured by what a tuned model attends to more, in one layer, as a figure to print (Figures 7 and 14)."""

import html

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots import style

LINE, HEIGHT = 64, 26
"""How many letters a line has, and how many pixels it is high."""
FONT = {"family": "DejaVu Sans Mono, Menlo, Consolas, monospace", "size": 14}
BREAK = "\N{RETURN SYMBOL}"


def attention_still(base: pd.DataFrame, tuned: pd.DataFrame, *, title: str, note: str) -> go.Figure:
    """The layer in which attention to the answer (where the prompt holds none, to the context) gains most.

    base, tuned: what `attention_of_tokens` gives of the same prompt in two models, their rows in the same order.
    """
    gains = tuned.assign(gain=tuned["attention"] - base["attention"])
    aim = "answer" if (gains["part"] == "answer").any() else "context"
    layer = int(gains["gain"].where(gains["part"] == aim, 0).groupby(gains["layer"]).sum().idxmax())
    shown = gains[gains["layer"] == layer].sort_values("position")
    top = max(float(shown["gain"].abs().max()), 1e-9)
    figure, column, line = go.Figure(), 0, 0
    for token, part, gain in zip(shown["token"], shown["part"], shown["gain"], strict=True):
        if column + len(token) > LINE:
            column, line = 0, line + 1
        figure.add_annotation(x=column, y=-line, **_drawn(token, gain / top, framed=part == "answer"))
        column += len(token)
    figure.update_xaxes(range=[-0.5, LINE], visible=False).update_yaxes(range=[-line - 0.5, 0.5], visible=False)
    told = f"{note} Layer {layer}; blue: the last token attends to it more than in the base model, red: less (up to "
    told += f"{top:.2g}); framed: the answer."
    style.dress(figure, title=title, subtitle=told.strip(), plot_height=HEIGHT * (line + 1), below=10)
    return figure.update_annotations(font_size=FONT["size"]).update_layout(margin={"l": 16, "r": 16})


def _drawn(token: str, gain: float, *, framed: bool) -> dict[str, object]:
    """A token's annotation; gain: from -1 to 1."""
    colour = style.translucent(style.BLUE if gain > 0 else style.VERMILLION, round(abs(gain), 3))
    text = token.replace("\n", BREAK).replace(" ", "\N{NO-BREAK SPACE}")
    return {
        "text": html.escape(text),
        "showarrow": False,
        "xanchor": "left",
        "borderpad": 1,
        "bgcolor": colour,
        "bordercolor": style.INK if framed else colour,
        "font": {**FONT, "color": "white" if abs(gain) > 0.7 else style.INK},
    }
