"""The paper's numbers: those of its tables, beside one's own of the same model, variant, task and metric."""

import os
import re
from pathlib import Path

import pandas as pd
import pytest

from moe_lens import MoELensError
from moe_lens.architecture.paper_models import PAPER_MODELS
from moe_lens.data.lookup import SOURCES
from moe_lens.metrics.catalogue import METRICS
from moe_lens.paper.published import beside_paper, published

OLMOE = "allenai/OLMoE-1B-7B-0924-Instruct"


def test_they_are_of_the_papers_models_data_sets_and_metrics_each_once():
    table = published()
    assert set(table["model"]) == {one.name for one in PAPER_MODELS}
    assert set(table["task"]) <= set(SOURCES)
    assert set(table["metric"]) <= set(METRICS)
    assert not table.duplicated([name for name in table if name != "value"]).any()
    assert table["value"].between(0, 1).all()
    assert table.groupby("item").size().to_dict() == {
        "table1": 80, "table2": 8, "table3": 120, "table4": 16, "table5": 20, "table8": 18, "table9": 24, "table10": 8,
        "table11": 16,
    }  # fmt: skip
    assert all(one.name in one.hub for one in PAPER_MODELS), "or a model's id would not tell its numbers"


def test_each_number_stands_in_the_papers_own_text():
    """Its tables' rows as the text has them: the numbers of a variant in a row, in the order of the columns."""
    if "MOE_LENS_SHARED" not in os.environ:
        pytest.skip("MOE_LENS_SHARED is not set")
    text = Path(os.environ["MOE_LENS_SHARED"], "paper", "router_lens_paper.txt").read_text(encoding="utf-8")
    rows = {" ".join(re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.])", line)) for line in text.splitlines()}
    tables = published()
    for item in ("table1", "table3"):
        of_item = tables[tables["item"] == item]
        for (model, variant), own in of_item.groupby(["model", "variant"]):
            assert " ".join(f"{value * 100:.1f}" for value in own["value"]) in rows, (item, model, variant)


def test_values_stand_beside_ones_own_wherever_the_data_came_from():
    own = pd.DataFrame(
        [
            ("base", "nq-swap@authors:data", 0.3, 0.4),
            ("router-tuned", "nq-swap", 0.7, 0.8),
            ("mine", "squad", 0.5, 0.5),
        ],
        columns=["variant", "task", "em", "f1"],
    )
    found = beside_paper(own, "table1", OLMOE)
    assert found["em, paper"].tolist()[:2] == pytest.approx([0.281, 0.764])
    assert found["f1, paper"].tolist()[:2] == pytest.approx([0.405, 0.778])
    assert found["em, paper"].isna().tolist() == [False, False, True]
    assert set(found["published in"]) == {"Table 1"}
    assert found[list(own)].equals(own)
    assert "em, paper" not in own


def test_by_metric_by_size_and_by_what_was_trained_on():
    long = pd.DataFrame([("CEFT", "gigaword", "bleu", 0.1)], columns=["variant", "task", "metric", "mean"])
    assert beside_paper(long, "table9", "x/MiniCPM-MoE-8x2B")["paper"].tolist() == pytest.approx([0.159])
    sized = pd.DataFrame(
        [("CEFT", 1, "nq-swap", 0.5), ("CEFT", 2, "nq-swap", 0.5)], columns=["variant", "size", "task", "em"]
    )
    assert beside_paper(sized, "table5", OLMOE)["em, paper"].tolist()[0] == pytest.approx(0.875)
    assert beside_paper(sized, "table5", OLMOE)["em, paper"].isna().tolist() == [False, True]
    after = pd.DataFrame([("FFT", "mmlu", "accuracy", 0.3)], columns=["variant", "task", "metric", "mean"])
    values = [
        beside_paper(after, "table4", OLMOE, on)["paper"].tolist() for on in ("nq-swap:here", "confiqa-mc", "squad")
    ]
    assert values[:2] == [pytest.approx([0.321]), pytest.approx([0.451])]
    assert pd.isna(values[2][0])
    esft = pd.DataFrame([("ESFT-gate", "squad", 0.8)], columns=["variant", "task", "em"])
    assert beside_paper(esft, "table3", OLMOE)["em, paper"].tolist() == pytest.approx([0.826])


@pytest.mark.parametrize(
    ("item", "model", "says"),
    [
        ("table1", "organism", "the paper has no numbers of organism; it has those of OLMoE-1B-7B, DeepSeek-V2-Lite"),
        ("table2", "Mixtral-8x7B", "table2 has numbers of OLMoE-1B-7B, MiniCPM-MoE-8x2B, and not of Mixtral-8x7B"),
        ("figure4", OLMOE, "figure4 has numbers of none of its models"),
    ],
)
def test_what_the_paper_has_no_numbers_of_is_said(item, model, says):
    with pytest.raises(MoELensError, match=says):
        beside_paper(pd.DataFrame({"variant": [], "task": []}), item, model)
