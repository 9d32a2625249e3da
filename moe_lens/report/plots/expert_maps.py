"""What single experts do, as maps of layer by expert: how salient, on which data, for which tokens, to write what."""

from functools import partial

import pandas as pd
import plotly.graph_objects as go

from moe_lens.report.plots.usage_maps import usage_figure, with_panels
from moe_lens.report.section import Section
from moe_lens.report.tables import named_together, require

SEEN = 5
"""Occurrences from which on a token counts for the map: of rarer ones shares are few and extreme."""
WORDS = 8


def value_map(table: pd.DataFrame, *, value: str, label: str) -> go.Figure:
    """The map of a column, one below the other for several variants and data sets."""
    table = require(table, ("layer", "expert", value), figure="value_map")
    return usage_figure(with_panels(table).assign(score=table[value]), label=label)


def words_map(table: pd.DataFrame, *, value: str, label: str) -> go.Figure:
    """The map of each expert's highest value over tokens, whose texts show up under the pointer.

    Args:
        table: one row per layer, expert and token with the columns `layer`, `expert`, `token`, `tokens` (occurrences of
            the token or the expert) and the value; `variant` and `data` where they take several values. Where `read`
            says which tokens the data have, those count.
    """
    table = require(table, ("layer", "expert", "token", "tokens", value), figure="words_map")
    table = table[table["read"]] if "read" in table else table
    often = table[table["tokens"] >= SEEN]
    table = (often if len(often) else table).assign(panel=named_together(table, ("variant", "data")))
    ranked = table.sort_values(value, ascending=False, kind="stable").groupby(["panel", "layer", "expert"], sort=True)
    words = ranked["token"].agg(lambda texts: " ".join(f"«{text}»" for text in texts.iloc[:WORDS]))
    best = ranked[value].first()
    return usage_figure(pd.DataFrame({"score": best, "words": words}).reset_index(), label=label)


SECTIONS = {
    "saliency.parquet": Section(
        "How much each expert adds",
        "REAP's saliency: the mean over the tokens that select an expert of gating weight times norm of its output.",
        draw=partial(value_map, value="reap", label="REAP saliency"),
        place=38,
    ),
    "specialisation.parquet": Section(
        "How often experts are active on each data set",
        "The share of a data set's tokens that select an expert; over the experts of a layer it sums to k.",
        draw=partial(value_map, value="specialisation", label="activation rate"),
        place=39,
    ),
    "rates.parquet": Section(
        "How strongly experts are taken",
        "The mean gating weight of an expert over the tokens that select it.",
        draw=partial(value_map, value="weight", label="mean gating weight"),
        place=62,
    ),
    "baseline.parquet": Section(
        "How much the token alone tells",
        "The share of the variance of an expert's use that the token's id tells in other examples; routing that the "
        "token decides says nothing of its context.",
        draw=partial(value_map, value="token", label="told by the token"),
        place=65,
    ),
    "contexts.parquet": Section(
        "Where experts have most weight",
        "The places with each expert's highest gating weights, the token between « and ».",
        draw=None,
        place=66,
    ),
    "tokens.parquet": Section(
        "Which experts a token goes to",
        "The share of a token's occurrences that select the expert, of that token of which it is highest; only tokens "
        f"that are read at least {SEEN} times. Under the pointer the highest {WORDS}.",
        draw=partial(words_map, value="specialisation", label="share of a token's occurrences"),
        place=51,
    ),
    "predictions.parquet": Section(
        "Which experts are active where a token is predicted",
        f"The same of the token that the model finds most likely next, where it is at least {SEEN} times.",
        draw=partial(words_map, value="specialisation", label="share of a prediction's occurrences"),
        place=52,
    ),
    "vocabulary.parquet": Section(
        "What experts write",
        "The logit lens on single experts: how much the mean of what an expert adds raises the logit of its highest "
        f"token of those that the data have above what the layer's experts do. Under the pointer the highest {WORDS}.",
        draw=partial(words_map, value="excess", label="logit above the layer's mean"),
        place=53,
    ),
}
