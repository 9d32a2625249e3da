"""The dose curve: exact match at each strength of an intervention, beside the random sets' at the same strengths."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.errors import MoELensError
from moe_lens.report.plots import style
from moe_lens.report.plots.masked_answers import FAMILIES, NAMES
from moe_lens.report.section import Section
from moe_lens.report.tables import require

COLUMNS = ("set", "family", "mode", "strength", "em", "em_low", "em_high", "n")
AXES = {
    "bias": "added to the experts' router logits",
    "scale": "factor of the experts' gating weights",
    "topk": "experts per token",
}
"""The axis of each mode's strength."""
DRAWN_APART = ("none", "random", "random mean", "saved")


def doses_figure(rows: pd.DataFrame) -> go.Figure:
    """EM over the strength, a line with bars per set of experts; a panel per task.

    The model as it is is a dashed line with a band; of random sets a band reaches from the lowest to the highest, and
    a dotted line is their mean.

    Args:
        rows: those of a masking run with strengths: one row per set, strength (and `task`), with the columns `set`,
            `family` ("none" for the unmasked run, "random" for each random set, "random mean" for a mean), `mode`,
            `strength`, `em`, `em_low`, `em_high` and `n`. More columns show up under the pointer.

    Raises:
        MoELensError: a column is missing, no row has a strength, or there are several modes.
    """
    rows = require(rows, COLUMNS, figure="doses_figure")
    dosed = rows[rows["strength"].notna()]
    if dosed.empty or dosed["mode"].nunique() > 1:
        raise MoELensError(
            "doses_figure draws the strengths of one mode; this table has those of "
            f"{', '.join(dosed['mode'].unique()) or 'none'}"
        )
    rows = rows if "task" in rows else rows.assign(task="")
    tasks = list(dict.fromkeys(rows["task"]))
    figure = make_subplots(len(tasks), 1, shared_xaxes=True, vertical_spacing=0.24 / max(2, len(tasks)))
    strengths = sorted(set(dosed["strength"]))
    chosen = dosed[~dosed["family"].isin(DRAWN_APART)]
    looks = _looks(chosen)
    for place, task in enumerate(tasks, start=1):
        part = rows[rows["task"] == task]
        _draw_unmasked(figure, part[part["family"] == "none"], strengths, place)
        _draw_random(figure, part[part["strength"].notna()], place)
        for name, look in looks.items():
            own = part[(part["set"] == name) & part["strength"].notna()].sort_values("strength")
            _draw_set(figure, own, name, look, place)
        figure.update_yaxes(title_text=f"EM, {task}" if task else "exact match (EM)", row=place)
    figure.update_yaxes(range=[-0.02, 1.02], dtick=0.2 if len(tasks) == 1 else 0.5)
    spread = 0.06 * ((strengths[-1] - strengths[0]) or 1)
    figure.update_xaxes(
        tickvals=_apart(strengths), showgrid=False, range=[strengths[0] - spread, strengths[-1] + spread]
    )
    mode = dosed["mode"].iloc[0]
    figure.update_xaxes(title_text=AXES.get(mode, f"strength ({mode})"), row=len(tasks))
    height = 330 if len(tasks) == 1 else 190 * len(tasks)
    return style.dress(figure, title=_title(rows, chosen), subtitle=_subtitle(rows), plot_height=height)


SECTIONS = {
    "doses.parquet": Section(
        "How much of it takes how much",
        "Exact match at each strength of an intervention. bias: added to the experts' router logits, so that they are "
        "chosen more often and get more weight; scale: times their gating weights, 1 changes nothing; topk: experts "
        "per token. The grey band reaches from the lowest to the highest of the random sets of the same size at the "
        "same strength: a curve inside it is what any experts would have given.",
        draw=doses_figure,
        place=45,
    ),
}


def _apart(strengths: list[float]) -> list[float]:
    """Those of rising strengths whose labels do not run into one another."""
    least = 0.07 * (strengths[-1] - strengths[0])
    found = strengths[-1:]
    for strength in reversed(strengths[:-1]):
        if found[0] - strength >= least:
            found.insert(0, strength)
    return found


def _looks(chosen: pd.DataFrame) -> dict[str, style.Look]:
    """A family's known look for its only set, another one for each of several."""
    sets = dict(zip(chosen["set"], chosen["family"], strict=True))
    families = list(sets.values())
    own = {
        name: FAMILIES[family] for name, family in sets.items() if family in FAMILIES and families.count(family) == 1
    }
    return style.looks(sets, {"random mean": FAMILIES["random mean"]} | own)


def _draw_unmasked(figure: go.Figure, unmasked: pd.DataFrame, strengths: list[float], place: int) -> None:
    """The run without the intervention: a line over the whole panel, its interval as a band."""
    for _, row in unmasked.iterrows():
        spread = 0.06 * ((strengths[-1] - strengths[0]) or 1)
        ends = [strengths[0] - spread, strengths[-1] + spread]
        band = _band(ends, [row["em_low"]] * 2, [row["em_high"]] * 2, style.translucent(style.BLACK, 0.1))
        line = go.Scatter(
            x=ends, y=[row["em"]] * 2, mode="lines", name="without", legendgroup="without", showlegend=place == 1,
            line={"color": style.BLACK, "width": 2, "dash": "dash"}, hoverinfo="skip",
        )  # fmt: skip
        figure.add_traces([band, line], rows=place, cols=1)


def _draw_random(figure: go.Figure, part: pd.DataFrame, place: int) -> None:
    """Of each shape's random sets the range as a band and the mean as a dotted line with marks."""
    look = FAMILIES["random mean"]
    drawn = part[part["family"] == "random"]
    for number, name in enumerate(dict.fromkeys(part.loc[part["family"] == "random mean", "set"])):
        sets = drawn[drawn["set"].str.rpartition("#")[0] == name].groupby("strength")["em"].agg(["min", "max"])
        mean = part[(part["family"] == "random mean") & (part["set"] == name)].sort_values("strength")
        band = _band(list(sets.index), list(sets["min"]), list(sets["max"]), style.translucent(style.GREY, 0.25))
        spread = sets.reindex(mean["strength"])
        ends = mean.assign(em_low=spread["min"].to_numpy(), em_high=spread["max"].to_numpy())
        line = go.Scatter(
            x=mean["strength"], y=mean["em"], mode="lines+markers", name="random (mean and range of sets)",
            error_y=style.error_bars(ends, "em") if len(ends) == 1 else None,  # a band of one strength has no width
            legendgroup="random", showlegend=place == 1 and number == 0, marker={**look.mark, "size": 9},
            line={**look.line, "dash": "dot"}, hovertext=style.hover(mean), hoverinfo="text",
        )  # fmt: skip
        figure.add_traces([band, line], rows=place, cols=1)


def _draw_set(figure: go.Figure, own: pd.DataFrame, name: str, look: style.Look, place: int) -> None:
    """The line of one set of experts with its intervals."""
    line = go.Scatter(
        x=own["strength"], y=own["em"], error_y=style.error_bars(own, "em"), mode="lines+markers",
        name=NAMES.get(name, name), legendgroup=name, showlegend=place == 1, marker={**look.mark, "size": 11},
        line=look.line, hovertext=style.hover(own), hoverinfo="text",
    )  # fmt: skip
    figure.add_trace(line, row=place, col=1)


def _band(x: list[float], low: list[float], high: list[float], colour: str) -> go.Scatter:
    return go.Scatter(
        x=[*x, *x[::-1]], y=[*high, *low[::-1]], mode="lines", fill="toself", fillcolor=colour, line={"width": 0},
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def _title(rows: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """Where the curve that goes furthest from the model as it is, on the first task, gets to."""
    task = rows["task"].iloc[0]
    unmasked = rows[(rows["task"] == task) & (rows["family"] == "none")]["em"]
    own = chosen[chosen["task"] == task]
    if own.empty or unmasked.empty:
        return "What random experts do at each strength"
    start = unmasked.iloc[0]
    furthest = own.loc[(own["em"] - start).abs().idxmax()]
    dose = f"{furthest['mode']} {furthest['strength']:g}"
    dose += f" on {furthest['set']}" if furthest["family"] != furthest["mode"] else ""  # topk is on no set
    return f"{dose} takes EM{f' on {task}' if task else ''} from {start:.2f} to {furthest['em']:.2f}"


def _subtitle(rows: pd.DataFrame) -> str:
    places = [
        f"{name} {value}"
        for name in ("positions", "steps")
        if name in rows
        for value in dict.fromkeys(rows.loc[rows["strength"].notna(), name])
        if value != "all"
    ]
    where = f"{', '.join(places)}; " if places else ""
    return f"{where}{style.counts(rows['n'])} examples; bars and dashed line's band: 95 % intervals"
