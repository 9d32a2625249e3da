"""The attention case of the paper's Figures 7 and 14: a prompt coloured by what a tuned model attends to more."""

from dataclasses import replace

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.report.document import View, view
from moe_lens.report.section import Section
from moe_lens.report.tables import require
from moe_lens.report.views.attention_still import attention_still

COLUMNS = ("position", "token", "part", "layer", "attention")


def attention_view(
    base: pd.DataFrame,
    tuned: pd.DataFrame,
    *,
    title: str = "What the tuned model attends to more",
    note: str = "",
) -> View:
    """The prompt's tokens coloured by the gain in the last token's attention, layer by layer.

    The gain is the difference, tuned minus base; the pointer shows both values and the relative gain of Eq. 11, which
    the table beside the prompt gives for the whole context and for the answer's tokens in it.

    base, tuned: what `attention_of_tokens` gives, of the same prompt in two models.
    note: what is to be said of the case, such as both answers.
    Raises MoELensError for a table that lacks a column, or for different prompts or layers.
    """
    tables = [require(table, COLUMNS, figure="attention_view") for table in (base, tuned)]
    keys = ["layer", "position"]
    first, second = (table.sort_values(keys).reset_index(drop=True) for table in tables)
    if not first[[*keys, "token"]].equals(second[[*keys, "token"]]):
        raise MoELensError("the two tables must be of the same tokens and layers; they differ")
    tokens = first.drop_duplicates("position")
    layers = sorted({int(layer) for layer in first["layer"]})
    data = {
        "tokens": tokens["token"].tolist(),
        "parts": tokens["part"].tolist(),
        "layers": layers,
        "base": _by_layer(first, layers),
        "tuned": _by_layer(second, layers),
    }
    hint = "Layers: click, or use the left and right arrow keys."
    page = view(title, f"{note} {hint}".strip(), script="attention.js", data=data, height=520)
    return replace(page, still=attention_still(first, second, title=title, note=note))


def attention_case_view(table: pd.DataFrame) -> View:
    """The first case of a table of several."""
    require(table, ("case", "model", "note"), figure="the attention of a case")
    case = table[table["case"] == table["case"].iloc[0]]
    base, tuned = (case[case["model"] == model] for model in ("base", "tuned"))
    return attention_view(base, tuned, note=case["note"].iloc[0])


SECTIONS = {
    "attention_case.parquet": Section(
        "One case",
        "A prompt that tuning set right (Figures 7 and 14), its tokens coloured by the gain in attention.",
        draw=attention_case_view,
        place=80,
    ),
}


def _by_layer(table: pd.DataFrame, layers: list[int]) -> list[list[float]]:
    """Attention [layer][token]."""
    return [[round(value, 6) for value in table.loc[table["layer"] == layer, "attention"]] for layer in layers]
