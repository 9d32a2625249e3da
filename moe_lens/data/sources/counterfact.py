"""CounterFact (Meng et al., 2022): a false statement of a fact as context, and the statement to complete."""

from collections.abc import Iterator

from moe_lens.data.dataset import Hub, Record, Row, Source


def rows(record: Record) -> Iterator[Row]:
    """The row of a record of the authors' file or of the hub: memory would complete it with the true object."""
    if "requested_rewrite" in record:
        edit = record["requested_rewrite"]
        statement = edit["prompt"].replace("{}", edit["subject"], 1)
        false, true = edit["target_new"]["str"], edit["target_true"]["str"]
    else:
        statement, false, true = record["prompt"], record["target_false"], record["target_true"]
    yield {
        "id": record.get("case_id"),
        "context": f"{statement.strip()} {false.strip()}.",
        "question": statement,
        "answer": false,
        "original_answer": true.strip(),
    }


SOURCE = Source(
    name="counterfact",
    rows=rows,
    hub=Hub(
        id="NeelNanda/counterfact-tracing",
        revision="c945b082ca08d0a8f3ba227fb78404a09614c36e",
        splits={"train": "train"},
    ),
    files={"train": ("counterfact.json",)},
    carved={"train": {"dev": 1000, "test": 2000}},
)
"""The paper's Table 2 is about CounterFact, but does not say how it was split; the sizes of the parts are ours."""
