"""The routing of one prompt: every token by every layer by every expert, of one model or of several side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.report.document import View, view
from moe_lens.report.tables import require
from moe_lens.report.views.tokens import experts_of_tokens

if TYPE_CHECKING:
    from moe_lens.data import Example
    from moe_lens.lens.interventions import Intervention
    from moe_lens.lens.lens import MoELens

COLUMNS = ("position", "token", "part", "layer", "n_experts", "rank", "expert", "weight")


def show(
    lens: "MoELens",
    prompt: "Example | str",
    *,
    under: "Sequence[Intervention]" = (),
    against: "MoELens | None" = None,
) -> View:
    """Which experts each token of a prompt takes, as an interactive page: in a notebook, or `.save(path)`.

    Beside the lens's model, another one (`against`) or the model under interventions (`under`), or both at once. Inside
    a `lens.intervene` block its interventions are in force on both sides; a panel is headed by all that are.
    """
    this, other = ("this model", "the other model") if against else ("", "")
    plain = "without intervention" if under else "gating weights"
    panels = {_heading(lens, this) or plain: _experts(lens, prompt)}
    if against or under:
        beside = against or lens
        with beside.intervene(*under):
            panels[_heading(beside, other)] = _experts(beside, prompt)
    return routing_view(panels)


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
    tables = {name: require(table, COLUMNS, figure="routing_view") for name, table in panels.items()}
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


def _heading(lens: "MoELens", model: str) -> str:
    """Of a panel: the model's name, where there are two, and every intervention in force."""
    return ", ".join([*([model] if model else []), *(f"under {type(it).__name__}" for it in lens.interventions)])


def _experts(lens: "MoELens", prompt: "Example | str") -> pd.DataFrame:
    """`experts_of_tokens` of the prompt as the lens runs it now."""
    [record] = lens.records([prompt], progress=False)
    return experts_of_tokens(record, lens.tokenizer)


def _layers(table: pd.DataFrame, layers: list[int]) -> list[list[list[list[float]]]]:
    """Per layer and token the [expert, weight] pairs in falling order of weight."""
    ordered = table.sort_values(["layer", "position", "rank"])
    pairs: dict[tuple[int, int], list[list[float]]] = {}
    for row in ordered.itertuples():
        pairs.setdefault((row.layer, row.position), []).append([int(row.expert), round(float(row.weight), 4)])
    positions = sorted(set(table["position"]))
    return [[pairs.get((layer, position), []) for position in positions] for layer in layers]


def _note(data: dict[str, Any]) -> str:
    tokens, layers = len(data["tokens"]), len(data["layers"])
    return (
        f"{tokens} tokens, {layers} MoE layers of {data['experts']} experts. Click, or use the arrow keys: "
        "up and down for the token, left and right for the expert, with shift for the layer."
    )
