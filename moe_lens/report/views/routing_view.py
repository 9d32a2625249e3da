"""The routing of one prompt: every token by every layer by every expert, of one model or of several side by side."""

from collections.abc import Mapping

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.report.document import View, view
from moe_lens.report.plots import style

COLUMNS = ("position", "token", "part", "layer", "n_experts", "rank", "expert", "weight")


def routing_view(panels: Mapping[str, pd.DataFrame], *, title: str = "Which experts each token takes") -> View:
    """A page with a map of tokens by layers by experts for each panel, linked by a chosen token and expert.

    Click (or use the arrow keys) to choose a token and an expert: the prompt is coloured by that expert's gating
    weight at every token, and the chosen token's experts are listed, those that only one panel takes in bold.
    With several panels the later ones can show their difference from the first.

    panels: heading -> what `experts_of_tokens` gives, all of the same prompt.
    Raises MoELensError for no panel, a table that lacks a column, or panels of different prompts.
    """
    if not panels:
        raise MoELensError("a view needs one or more panels; got none")
    tables = {name: style.require(table, COLUMNS, figure="routing_view") for name, table in panels.items()}
    first = next(iter(tables.values()))
    tokens = first.drop_duplicates("position").sort_values("position")
    for name, table in tables.items():
        own = table.drop_duplicates("position").sort_values("position")
        if own["token"].tolist() != tokens["token"].tolist():
            raise MoELensError(f"the panels of a view show one prompt; {name!r} has other tokens than the first")
    layers = sorted({int(layer) for table in tables.values() for layer in table["layer"]})
    data = {
        "tokens": tokens["token"].tolist(),
        "parts": tokens["part"].tolist(),
        "layers": layers,
        "experts": int(max(table["n_experts"].max() for table in tables.values())),
        "panels": [{"name": name, "layers": _layers(table, layers)} for name, table in tables.items()],
    }
    return view(title, _note(data), script="routing.js", data=data, height=760)


def _layers(table: pd.DataFrame, layers: list[int]) -> list[list[list[list[float]]]]:
    """Per layer and token the [expert, weight] pairs in falling order of weight."""
    ordered = table.sort_values(["layer", "position", "rank"])
    pairs: dict[tuple[int, int], list[list[float]]] = {}
    for row in ordered.itertuples():
        pairs.setdefault((row.layer, row.position), []).append([int(row.expert), round(float(row.weight), 4)])
    positions = sorted(set(table["position"]))
    return [[pairs.get((layer, position), []) for position in positions] for layer in layers]


def _note(data: dict) -> str:
    tokens, layers = len(data["tokens"]), len(data["layers"])
    return (
        f"{tokens} tokens, {layers} MoE layers of {data['experts']} experts. Click, or use the arrow keys: "
        "up and down for the token, left and right for the expert, with shift for the layer."
    )
