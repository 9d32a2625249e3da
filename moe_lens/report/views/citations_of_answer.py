"""ContextCite as a page: the sentences of each context, coloured by how much the model's answer rests on them."""

import math

import pandas as pd

from moe_lens.report.document import Value, View, view
from moe_lens.report.section import Section
from moe_lens.report.tables import require

COLUMNS = ("place", "id", "question", "answer", "sentence", "text", "attribution")


def citations_view(table: pd.DataFrame, *, title: str = "What each answer rests on") -> View:
    """The contexts sentence by sentence, one example at a time, with the question and the model's answer.

    A sentence is coloured by its attribution, the nats that it adds to the log-odds of the answer, on the scale of its
    own example; where no sentence was left out, none is.

    table: what `moe_lens.decoding.context_citations` gives, one row per example and sentence.
    Raises MoELensError for a table that lacks a column or is empty.
    """
    table = require(table, COLUMNS, figure="citations_view").sort_values(["place", "sentence"])
    cases: list[Value] = []
    for _, case in table.groupby("place", sort=False):
        values: list[Value] = [None if math.isnan(value) else round(float(value), 4) for value in case["attribution"]]
        first = case.iloc[0]
        told = {name: str(first[name]) for name in ("id", "question", "answer")}
        cases.append({**told, "texts": case["text"].tolist(), "values": values})
    note = "Nats that each sentence adds to the log-odds of the answer. Examples: click, or left and right arrow keys."
    return view(title, note, script="citations.js", data={"cases": cases}, height=420)


SECTIONS = {
    "citations.parquet": Section(
        "What each answer rests on",
        "The sentences of the contexts, coloured by what each adds to the log-odds of the model's own answer "
        "(ContextCite).",
        draw=citations_view,
        place=85,
    ),
}
