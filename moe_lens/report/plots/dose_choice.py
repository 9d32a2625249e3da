"""The choice of a strength on held-out examples: what each strength gives the targets and leaves of what is spared."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.report.plots import style
from moe_lens.report.plots.masked_answers import FAMILIES
from moe_lens.report.section import Section
from moe_lens.report.tables import require, require_once

COLUMNS = ("set", "intervention", "strength", "task", "role", "n", "unmasked", "em", "em_low", "em_high", "chosen")


def dose_choice_figure(table: pd.DataFrame) -> go.Figure:
    """EM over the strength on the held-out examples, a panel per task, targets first; the chosen strength is a star.

    The model as it is is a dashed line; of a spared task a dotted one marks what has to be kept.

    Args:
        table: one row per strength and task, as `choosing.doses.dose_table` gives them.

    Raises:
        MoELensError: a column is missing, or a strength has two rows for a task.
    """
    table = require(table, COLUMNS, figure="dose_choice_figure")
    require_once(table, ("intervention", "task"), figure="dose_choice_figure")
    roles = dict(zip(table["task"], table["role"], strict=True))
    tasks = sorted(roles, key=lambda task: roles[task] != "target")
    lines = table["intervention"].str.rpartition("@")[0].where(table["intervention"].str.contains("@"))
    table = table.assign(line=lines.fillna(table["set"]))
    names = list(dict.fromkeys(table["line"]))
    known = {name: FAMILIES[name] for name in names if name in FAMILIES}
    looks = style.looks(names, known) if len(names) <= len(style.LOOKS) - len(known) else style.ordered_looks(names)
    figure = make_subplots(len(tasks), 1, shared_xaxes=True, vertical_spacing=0.24 / max(2, len(tasks)))
    for place, task in enumerate(tasks, start=1):
        part = table[table["task"] == task]
        before = part["unmasked"].iloc[0]
        for name, look in looks.items():
            own = part[part["line"] == name].sort_values("strength")
            _draw(figure, own, name, look, place)
        # after the lines: an empty panel takes none
        figure.add_hline(y=before, line={"color": style.BLACK, "width": 2, "dash": "dash"}, row=place, col=1)
        if roles[task] == "spared":
            figure.add_hline(y=0.95 * before, line={"color": style.GREY, "dash": "dot"}, row=place, col=1)
        figure.update_yaxes(title_text=f"EM, {task}<br>({roles[task]})", row=place)
    figure.update_yaxes(range=[-0.02, 1.02], dtick=0.2 if len(tasks) == 1 else 0.5)
    figure.update_xaxes(tickvals=sorted(set(table["strength"])), showgrid=False)
    figure.update_xaxes(title_text="strength", row=len(tasks))
    height = 330 if len(tasks) == 1 else 190 * len(tasks)
    subtitle = f"{style.counts(table['n'])} held-out examples per task; star: chosen; dashed: without"
    subtitle += f"{', dotted: 0.95 of that' * ('spared' in roles.values())}; bars: 95 % intervals"
    return style.dress(figure, title=_title(table), subtitle=subtitle, plot_height=height)


SECTIONS = {
    "dose_choice.parquet": Section(
        "Which strength was chosen, before the test examples were looked at",
        "Exact match on held-out examples at each strength. Chosen is, of each set, the strength with the highest mean "
        "over the targets, of those that leave every spared task at least 0.95 of what it has without (dotted), and "
        "that raise the targets; of equals the weaker. A set without a star has no such strength.",
        draw=dose_choice_figure,
        place=44,
    ),
}


def _draw(figure: go.Figure, own: pd.DataFrame, name: str, look: style.Look, place: int) -> None:
    """One line over the strengths, a star at the chosen one."""
    usual = "circle" if look.mark["symbol"] == "star" else look.mark["symbol"]
    symbols = ["star" if chosen else usual for chosen in own["chosen"]]
    sizes = [18 if chosen else 9 for chosen in own["chosen"]]
    line = go.Scatter(
        x=own["strength"], y=own["em"], error_y=style.error_bars(own, "em"), mode="lines+markers", name=name,
        legendgroup=name, showlegend=place == 1, marker={**look.mark, "symbol": symbols, "size": sizes},
        line=look.line, hovertext=style.hover(own), hoverinfo="text",
    )  # fmt: skip
    figure.add_trace(line, row=place, col=1)


def _title(table: pd.DataFrame) -> str:
    """What is chosen, and what it gives the first target."""
    own = table[table["chosen"] & (table["role"] == "target")].drop_duplicates("intervention")
    if own.empty:
        return "No strength spares what is to be spared and raises the target"
    told = [f"{row.intervention}: {row.task} {row.unmasked:.2f} to {row.em:.2f}" for row in own.itertuples()]
    return f"Chosen: {'; '.join(told[:2])}{' and others' * (len(told) > 2)}"
