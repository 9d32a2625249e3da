"""Figures of what `measure` writes: each mark at its value, each title with no more than the table tells."""

import numpy as np
import pandas as pd
import pytest

from moe_lens.errors import MoELensError
from moe_lens.report.contents import draw
from moe_lens.report.plots import answers_figure, masking_figure
from moe_lens.report.plots.answer_scores import summary_figure


def over_layers(**values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"variant": "as it is", "layer": [1, 0], **values})


def ended(name: str, values: list[float]) -> dict[str, list[float]]:
    return {name: values, f"{name}_low": [own - 0.1 for own in values], f"{name}_high": [own + 0.1 for own in values]}


def test_load_has_a_line_for_each_data_set_in_the_order_of_layers():
    parts = [
        over_layers(data=[name] * 2, **ended("entropy", [2.0, own]), **ended("max_load", [1.5, 1.25]))
        for name, own in (("swap", 1.0), ("novel", 3.0))
    ]
    figure = draw("load.parquet", pd.concat(parts))
    lines = [trace for trace in figure.data if trace.name]
    assert [trace.name for trace in lines] == ["swap", "novel"] * 2
    assert [list(trace.x) for trace in lines] == [[0, 1]] * 4
    assert list(lines[1].y) == [3.0, 2.0]
    band = figure.data[0]
    assert list(band.y) == pytest.approx([1.1, 2.1, 1.9, 0.9])
    assert list(figure.layout.xaxis.tickvals) == [0, 1]


def test_pairs_stand_at_their_cells_and_a_slider_chooses_the_layer():
    rows = [(0, 0, 1, 0.5), (0, 1, 0, 0.25), (3, 0, 1, 0.75), (3, 1, 0, np.nan)]
    table = pd.DataFrame(rows, columns=["layer", "expert", "other", "probability"]).assign(data="swap")
    figure = draw("coactivation.parquet", table)
    first, second = figure.data
    assert (first.z[0, 1], first.z[1, 0], second.z[0, 1]) == (0.5, 0.25, 0.75)
    assert np.isnan(first.z[0, 0])
    assert np.isnan(second.z[1, 0])
    steps = figure.layout.sliders[0].steps
    assert [(step.label, list(step.args[1])) for step in steps] == [
        ("layer 0", [True, False]),
        ("layer 3", [False, True]),
    ]
    assert (first.visible, second.visible) == (True, False)
    assert figure.layout.height == draw("coactivation.parquet", table[table["layer"] == 0]).layout.height + 60
    with pytest.raises(MoELensError, match="stands there twice"):
        draw("coactivation.parquet", pd.concat([table, table]))


def test_words_are_those_of_the_highest_values_and_rare_ones_do_not_count():
    rows = [("rare", 1, 1.0), ("low", 9, 0.25), ("high", 9, 0.5)]
    table = pd.DataFrame(rows, columns=["token", "tokens", "specialisation"]).assign(layer=0, expert=1)
    [heat] = draw("tokens.parquet", table).data
    assert heat.z[0][0] == 0.5
    assert "«high» «low»" in heat.hovertext[0][0]
    assert "rare" not in heat.hovertext[0][0]


def test_a_difference_is_counted_only_where_its_interval_leaves_0_out():
    ends = {"difference_low": [0.1, -0.3, -0.4, np.nan], "difference_high": [0.3, -0.1, 0.2, np.nan]}
    table = pd.DataFrame(
        {"number": "score", "layer": 0, "expert": range(4), "difference": [0.2, -0.2, 0.1, 0.5]} | ends
    )
    for columns in ([], ["expert"]):
        own = table if columns else table.drop(columns="expert").assign(layer=range(4))
        title = draw("difference-usage.parquet", own).layout.title.text.replace("<br>", " ")
        assert title == "2 of 3 differences have a 95 % interval without 0; about 0 would by chance"
    unknown = table.assign(difference_low=np.nan, difference_high=np.nan)
    assert "of none of which" in draw("difference-usage.parquet", unknown).layout.title.text.replace("<br>", " ")


def test_differences_of_unlike_numbers_have_axes_of_their_own():
    parts = [
        over_layers(number=[name] * 2, tokens=["first"] * 2, **ended("difference", [of, of + 1]))
        for name, of in (("probability", 0.25), ("log_probability", 3.0))
    ]
    figure = draw("difference-answer.parquet", pd.concat(parts))
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert {line.yaxis: list(line.y) for line in lines} == {"y": [1.25, 0.25], "y2": [4.0, 3.0]}
    assert [figure.layout[axis].title.text for axis in ("yaxis", "yaxis2")] == ["probability", "log<br>probability"]


def plain(figure) -> str:
    return figure.layout.title.text.replace("<br>", " ")


def test_information_is_drawn_beside_what_deals_at_random_give_and_the_title_counts_tested_layers():
    table = over_layers(information=[0.2, 0.1], chance=[0.05, 0.06], chance_high=[0.1, 0.12])
    table = table.assign(domains=2, p_value=[0.01, 0.3])
    figure = draw("information.parquet", table)
    lines = {trace.name: list(trace.y) for trace in figure.data if trace.name}
    assert lines == {"the data sets": [0.1, 0.2], "dealt at random": [0.06, 0.05]}
    bands = [list(trace.y) for trace in figure.data if trace.fill == "toself" and np.isfinite(trace.y).all()]
    assert bands == [pytest.approx([0.12, 0.1, 0, 0])]
    assert plain(figure) == "Experts tell data sets apart in 1 of 2 layers (p <= 0.05 each)"


def test_clusters_stand_for_all_layers_and_each_with_their_chance():
    rows = [("all", 0.9, 0.8, 0.1, 0.01), ("0", 0.5, 0.4, 0.12, 0.02)]
    table = pd.DataFrame(rows, columns=["layers", "nmi", "ari", "chance", "p_value"]).assign(examples=9, variant="a")
    figure = draw("clustering.parquet", table)
    assert [(trace.name, list(trace.y)) for trace in figure.data] == [
        ("NMI", [0.9, 0.5]),
        ("ARI", [0.8, 0.4]),
        ("NMI by chance", [0.1, 0.12]),
    ]
    assert plain(figure).endswith("NMI 0.90 over all layers (p = 0.01)")


def test_histograms_are_drawn_as_the_share_below_with_the_fit_beside():
    table = pd.DataFrame({"layer": 3, "high": [0.5, 1.0] * 3, "share": [0.25, 0.75, 0.5, 0.5, 1, 0]})
    table = table.assign(value=np.repeat(["each", "largest", "entropy"], 2), fitted=[0.5, 0.5, *[np.nan] * 4])
    figure = draw("histograms.parquet", table)
    assert [list(trace.y) for trace in figure.data] == [[0.25, 1], [0.5, 1], [0.5, 1], [1, 1]]
    assert [trace.line.dash for trace in figure.data] == ["solid", "dot", "solid", "solid"]


def test_groups_are_one_number_of_a_layer_in_the_same_texts_and_in_others():
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1] * 2, "group": 0})
    table = table.assign(modularity=[0.3, 0.3, 0.2, 0.2], held_out=[0.1, 0.1, 0.0, 0.0])
    assert [list(trace.y) for trace in draw("groups.parquet", table).data] == [[0.3, 0.2], [0.1, 0]]


def test_matches_are_means_over_experts_and_the_title_counts_who_stays():
    table = pd.DataFrame({"layer": 0, "by": "tokens", "expert": [0, 1], "match": [0, 2], "moved": [False, True]})
    table = table.assign(similarity=[1.0, 0.5], same=[1.0, 0.0], average=[0.25, 0.25])
    figure = draw("matching.parquet", table)
    assert {trace.name: list(trace.y) for trace in figure.data} == {
        "of the match": [0.75],
        "of the same number": [0.5],
        "of any two": [0.25],
    }
    assert plain(figure) == "1 of 2 experts match the one of the same number"


def test_signatures_have_a_panel_for_each_profile_and_are_compared_with_halves_of_texts():
    rows = [(0, "specialisation", 0.3, 0.4, 0.1), (0, "collaboration", 0.05, 0.4, 0.1)]
    table = pd.DataFrame(rows, columns=["layer", "profile", "distance", "same", "floor"])
    figure = draw("signatures.parquet", table)
    assert [list(trace.y) for trace in figure.data] == [[0.3], [0.4], [0.1], [0.05], [0.4], [0.1]]
    assert [trace.yaxis for trace in figure.data] == ["y"] * 3 + ["y2"] * 3
    assert "in 1 of 2 cases above that of halves of the texts" in figure.layout.title.subtitle.text.replace("<br>", " ")


def test_the_course_of_routing_has_a_line_for_each_layer_and_says_what_changed():
    table = pd.DataFrame(
        {"step": [0, 0, 9, 9], "layer": [0, 1] * 2, "drift": [0, 0, 0.25, 0.75], "unused": [0, 0, 1, 2]}
    )
    table = table.assign(entropy=2.0, load_entropy=2.0, max_load=1.5)
    figure = draw("routing_course.parquet", table)
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in figure.data[:2]] == [
        ("layer 0", [0, 9], [0, 0.25]),
        ("layer 1", [0, 9], [0, 0.75]),
    ]
    assert plain(figure) == "In training 50% of the selected experts change"
    assert "3 experts unused at the end" in figure.layout.title.subtitle.text


def masked(em: float, p: float | None) -> pd.DataFrame:
    rows = [("none", "none", 0, 0.75), ("ce:2", "ce", 2, em), ("random:2#0", "random", 2, 0.8)]
    table = pd.DataFrame(rows, columns=["intervention", "family", "size", "em"]).assign(mode="zero", n=16)
    table = table.assign(em_low=table["em"] - 0.1, em_high=table["em"] + 0.1, random_p=np.nan)
    table.loc[1, "random_p"] = p
    return table


@pytest.mark.parametrize(
    ("em", "p", "ends"),
    [
        (0.88, 0.5, "random sets 0.80 (p = 0.5: not told from them)"),
        (0.1, 0.048, "random sets 0.80 (p = 0.048)"),
        (0.1, 0.5, "random sets 0.80 (p = 0.5, the least that 1 can give)"),
        (0.1, None, "random sets 0.80, not tested"),
    ],
)
def test_what_masking_leaves_is_said_with_its_test(em, p, ends):
    title = masking_figure(masked(em, p)).layout.title.text.replace("<br>", " ")
    assert title == f"EM {em:.2f} of 0.75 with 2 CE experts per layer masked; {ends}"
    alone = masking_figure(masked(em, p).iloc[:2]).layout.title.text.replace("<br>", " ")
    assert alone.endswith("not compared with random sets")


def test_no_mean_over_tasks_hides_what_one_of_them_lost():
    rows = [("base", "swap", 0.1), ("base", "closed_book", 1.0), ("CEFT", "swap", 0.9), ("CEFT", "closed_book", 0.35)]
    table = pd.DataFrame(rows, columns=["variant", "task", "em"])
    table = table.assign(em_low=table["em"] - 0.05, em_high=table["em"] + 0.05)
    title = answers_figure(table).layout.title.text.replace("<br>", " ")
    assert title == "EM by task, from 0.10 (base on swap) to 1.00 (base on closed_book)"
    one = table[table["task"] == "swap"]
    assert answers_figure(one).layout.title.text == "EM is highest for CEFT (0.90), then base (0.10)"
    wide = answers_figure(one.assign(em_low=0.0, em_high=1.0)).layout.title.text.replace("<br>", " ")
    assert wide == "EM is highest for CEFT (0.90), then base (0.10); intervals overlap"


def test_evaluations_scores_are_bars_and_the_title_counts_tested_drops():
    rows = [
        ("none", "em", 0.9, np.nan),
        ("ce:4", "em", 0.2, 0.01),
        ("oe:4", "em", 0.85, 0.4),
        ("none", "nats", -3, np.nan),
    ]
    table = pd.DataFrame(rows, columns=["intervention", "metric", "mean", "q_value"]).assign(n=20)
    table = table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.1)
    figure = summary_figure(table)
    assert [(bar.name, list(bar.x), list(bar.y)) for bar in figure.data] == [
        ("none", ["EM"], [0.9]),
        ("ce:4", ["EM"], [0.2]),
        ("oe:4", ["EM"], [0.85]),
    ]
    assert figure.layout.title.text.replace("<br>", " ") == "1 of 2 differences from the model as it is have q < 0.05"
    nats = summary_figure(table[table["metric"] == "nats"])
    assert list(nats.data[0].y) == [-3]
    assert nats.layout.title.text == "Scores of the model as it is, compared with nothing"
    several = pd.concat([table.assign(task="swap"), table.assign(task="novel", mean=0.5)])
    [first, *_] = summary_figure(several[several["metric"] == "em"]).data
    assert (list(first.x), list(first.y)) == (["EM<br>swap", "EM<br>novel"], [0.9, 0.5]), "no bar stands on another"
