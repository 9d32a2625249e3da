"""Figures show what their tables say, and refuse tables that they would show wrongly."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from moe_lens.errors import MoELensError
from moe_lens.report.plots import (
    agreement_figure,
    answers_figure,
    clusters_figure,
    correlation_figure,
    dose_choice_figure,
    doses_figure,
    gains_figure,
    layers_figure,
    left_figure,
    masking_figure,
    metrics_figure,
    parameters_figure,
    patching_figure,
    scores_figure,
    selectivity_figure,
    single_experts_figure,
    sizes_figure,
    style,
    tradeoff_figure,
    transfer_figure,
    tuning_figure,
    usage_figure,
)
from moe_lens.report.plots.style import dress
from moe_lens.report.views import attention_view


@pytest.mark.parametrize("title", [1, 2, 3, 4])
@pytest.mark.parametrize("subtitle", [1, 2, 3])
def test_titles_of_any_length_begin_at_one_height_and_end_above_the_axes(title, subtitle):
    """Sizes as plotly draws them: lines 1.3 em apart; a text of one line 0.7 em lower than one of several."""
    wide, narrow = ("x" * 54 + " ") * title, ("x" * 80 + " ") * subtitle  # a word per line
    layout = dress(go.Figure(), title=wide, subtitle=narrow, plot_height=100).layout
    assert [text.count("<br>") + 1 for text in (layout.title.text, layout.title.subtitle.text)] == [title, subtitle]
    first = layout.title.pad.t + 0.7 * 22 * (title == 1)  # a baseline
    assert first == pytest.approx(14 + 0.7 * 22, abs=1)
    below = first + 1.3 * 22 * (title - 1) + 0.3 * 22  # 0.3 em: what hangs below a baseline
    last = below + 1.6 * 15 + 0.7 * 15 * (subtitle == 1) + 1.3 * 15 * (subtitle - 1)
    assert layout.margin.t - 30 < last + 0.3 * 15 < layout.margin.t - 5


def masking_row(family: str, size: int, em: float, *, mode: str = "zero", name: str | None = None) -> dict:
    return {
        "intervention": name or f"{family}:{size}",
        "family": family,
        "size": size,
        "mode": None if family == "none" else mode,
        "em": em,
        "em_low": em - 0.05,
        "em_high": em + 0.02,
        "n": 200,
    }


def masking_table(*modes: str) -> pd.DataFrame:
    rows = [masking_row("none", 0, 0.9)]
    for mode in modes:
        rows += [masking_row("ce", size, 0.8 - 0.1 * size, mode=mode) for size in (1, 2, 4)]
        rows += [masking_row("oe-last", size, 0.85 - 0.1 * size, mode=mode) for size in (4, 1, 2)]
        rows += [masking_row("planted", 4, 0.3, mode=mode)]
        rows += [
            masking_row("random", size, em, mode=mode, name=f"random:{size}#{em}")
            for size in (1, 4)
            for em in (0.5, 0.6, 0.85)
        ]
    return pd.DataFrame(rows)


def trace(figure, name: str, *, place: int = 0):
    return [it for it in figure.data if it.name == name][place]


def test_masking_shows_each_family_at_its_size_with_its_interval():
    figure = masking_figure(masking_table("zero"))
    ce = trace(figure, "CE")
    np.testing.assert_allclose(ce.y, [0.7, 0.6, 0.4])
    assert [round(x) for x in ce.x] == [0, 1, 2]
    assert [figure.layout.xaxis.ticktext[round(x)] for x in ce.x] == ["1", "2", "4"]
    np.testing.assert_allclose(ce.error_y.array, 0.02)
    np.testing.assert_allclose(ce.error_y.arrayminus, 0.05)


def test_masking_draws_a_score_given_in_another_order_from_small_to_large():
    score = trace(masking_figure(masking_table("zero")), "oe-last")
    np.testing.assert_allclose(score.y, [0.75, 0.65, 0.45])
    assert list(score.x) == sorted(score.x)


def test_masking_averages_the_random_sets_of_each_size_where_the_table_does_not():
    figure = masking_figure(masking_table("zero"))
    np.testing.assert_allclose(trace(figure, "random (mean of sets)").y, [0.65, 0.65])
    dots = [it for it in figure.data if it.mode == "markers"]
    assert [len(it.y) for it in dots] == [6]


def test_masking_takes_the_mean_of_the_random_sets_with_its_interval_from_the_table():
    rows = pd.concat([masking_table("zero"), pd.DataFrame([masking_row("random mean", 4, 0.66)])], ignore_index=True)
    mean = trace(masking_figure(rows), "random (mean of sets)")
    np.testing.assert_allclose(mean.y, [0.66])
    np.testing.assert_allclose(mean.error_y.arrayminus, 0.05)


def test_masking_keeps_families_apart_so_that_no_mark_hides_another():
    figure = masking_figure(masking_table("zero"))
    at_four = [x for it in figure.data if it.name and it.name != "unmasked" for x in it.x if round(x) == 2]
    assert len(at_four) == 4
    assert min(np.diff(sorted(at_four))) > 0.05
    assert max(at_four) - min(at_four) < 1


def test_masking_refuses_to_mix_modes():
    with pytest.raises(MoELensError, match="one mode, but got zero, reroute"):
        masking_figure(masking_table("zero", "reroute"))


def test_masking_of_many_scores_gives_each_a_look_of_its_own():
    rows = masking_table("zero")
    extra = pd.DataFrame([masking_row(f"score-{place}", 4, 0.2) for place in range(14)])
    figure = masking_figure(pd.concat([extra, rows], ignore_index=True))
    looks = [(it.marker.color, it.marker.symbol, it.line.dash) for it in figure.data if it.error_y.array is not None]
    assert len(looks) == len(set(looks)) == 18


def test_masking_of_more_scores_than_looks_draws_them_all():
    extra = pd.DataFrame([masking_row(f"score-{place}", 4, 0.2) for place in range(60)])
    figure = masking_figure(pd.concat([extra, masking_table("zero")], ignore_index=True))
    assert {f"score-{place}" for place in range(60)} <= {trace.name for trace in figure.data}


def test_masking_says_the_damage_of_the_largest_size_in_words():
    subtitle = masking_figure(masking_table("zero")).layout.title.subtitle.text.replace("<br>", " ")
    assert "4 per layer masked (zero): EM CE 0.40, planted 0.30, random (mean) 0.65, unmasked 0.90" in subtitle
    assert "200 examples" in subtitle


def test_masking_says_how_far_each_set_is_below_random_ones_of_its_shape():
    table = masking_table("zero")
    ours = table["intervention"] == "ce:4"
    for name, value in {"": 0.25, "_low": 0.125, "_high": 0.375}.items():
        table.loc[ours, f"below_random{name}"] = value
    table.loc[ours, "random_p"] = 1 / 21
    subtitle = masking_figure(table).layout.title.subtitle.text.replace("<br>", " ")
    assert "EM CE 0.40 (0.25 [0.12, 0.38] below random, p = 0.048), planted 0.30, random" in subtitle


def test_without_masked_sets_the_saved_interventions_stand_beside_the_model_as_it_is():
    rows = pd.DataFrame(
        [masking_row("none", 0, 0.9, name="none"), masking_row("saved", 0, 0.4, mode="addvector", name="mine")]
    )
    [marks] = masking_figure(rows).data
    assert (list(marks.x), list(marks.y)) == (["without", "mine"], [0.9, 0.4])
    assert list(masking_figure(rows.iloc[:1]).data[0].x) == ["without"]


def test_the_choice_of_a_dose_has_a_star_where_it_is_and_a_panel_per_task_targets_first():
    row = {"set": "a", "n": 96, "unmasked": 0.5, "em_low": 0.1, "em_high": 0.9}
    rows = [
        {**row, "intervention": f"a@bias={x}", "strength": x, "task": task, "role": role, "em": em, "chosen": x == 3}
        for task, role, ems in (("closed_book", "spared", (0.5, 0.48)), ("swap", "target", (0.6, 0.7)))
        for x, em in zip((1, 3), ems, strict=True)
    ]
    figure = dose_choice_figure(pd.DataFrame(rows))
    target, spared = figure.data
    assert (list(target.y), list(spared.y)) == ([0.6, 0.7], [0.5, 0.48])
    assert target.marker.symbol[1] == "star" != target.marker.symbol[0]
    kept = [shape.y0 for shape in figure.layout.shapes if shape.line.dash == "dot"]
    assert kept == [0.475], "of the spared task alone"
    assert "a@bias=3: swap 0.50 to 0.70" in figure.layout.title.text
    with pytest.raises(MoELensError, match="stands there twice"):
        dose_choice_figure(pd.DataFrame([*rows, rows[0]]))


def test_masking_shows_every_column_under_the_pointer():
    table = masking_table("zero").assign(p_value=0.0125)
    text = trace(masking_figure(table), "CE").hovertext[0]
    assert "intervention: ce:1" in text
    assert "p_value: 0.0125" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="em_low"), "em_low"),
        (lambda table: table.iloc[:0], "without rows"),
        (
            lambda table: pd.concat([table, pd.DataFrame([masking_row("none", 0, 0.1, name="again")])]),
            "again",
        ),
    ],
)
def test_masking_refuses_tables_that_do_not_compare(change, message):
    with pytest.raises(MoELensError, match=message):
        masking_figure(change(masking_table("zero")))


def usage_table(*panels: str) -> pd.DataFrame:
    rows = [
        {"layer": layer, "expert": expert, "score": layer + expert / 10, "panel": panel}
        for panel in panels
        for layer in (1, 3)
        for expert in range(4)
    ]
    return pd.DataFrame(rows)


def test_usage_puts_each_score_at_its_layer_and_expert_in_whatever_order_rows_come():
    figure = usage_figure(usage_table("base").drop(columns="panel").sample(frac=1, random_state=0))
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z, [[1, 1.1, 1.2, 1.3], [3, 3.1, 3.2, 3.3]])
    assert list(heat.x) == [0, 1, 2, 3]
    assert list(figure.layout.yaxis.ticktext) == [1, 3]


def test_usage_panels_without_negative_scores_share_a_scale_and_a_gain_is_centred_on_zero():
    table = usage_table("base", "tuned", "gain")
    table.loc[table["panel"] == "base", "score"] /= 10
    table.loc[table["panel"] == "gain", "score"] -= 2
    base, tuned, gain = usage_figure(table).data
    assert (base.zmin, base.zmax) == (tuned.zmin, tuned.zmax) == (0, 3.3)
    assert gain.zmin == -gain.zmax
    assert gain.zmax == pytest.approx(1.3)


def test_usage_outlines_the_marked_experts_of_the_layers_that_are_there():
    marks = pd.DataFrame({"layer": [3, 2], "expert": [2, 0]})
    frame = trace(usage_figure(usage_table("base"), marks, marks_label="planted"), "planted")
    corners = [(x, y) for x, y in zip(frame.x, frame.y, strict=True) if x is not None]
    assert {x for x, _ in corners} == {1.5, 2.5}
    assert {y for _, y in corners} == {0.5, 1.5}  # layer 3 is the second row of cells


def test_usage_keeps_layers_in_line_where_a_panel_lacks_one():
    table = usage_table("base", "tuned")
    table = table[(table["panel"] == "base") | (table["layer"] == 3)]
    base, tuned = usage_figure(table).data
    assert list(base.y) == list(tuned.y)
    assert np.isnan(np.asarray(tuned.z, dtype=float)[0]).all()


def test_usage_names_the_highest_expert():
    title = usage_figure(usage_table("base")).layout.title.text
    assert title.replace("<br>", " ") == "Context-dependence ratio is highest for layer 3, expert 3, base (3.3)"
    even = usage_figure(usage_table("base").assign(score=0.25), label="use")
    assert even.layout.title.text == "Use is highest for 8 experts alike (0.25)"


def test_usage_refuses_two_scores_for_one_expert():
    table = pd.concat([usage_table("base")] * 2)
    with pytest.raises(MoELensError, match="stands there twice"):
        usage_figure(table)


def scores_table() -> pd.DataFrame:
    table = pd.DataFrame({"score": ["ce", "ce-last", "oe"], "auc": [0.7, 0.95, 0.2], "size": [4, 4, 4]})
    return table.assign(auc_low=table["auc"] - 0.1, auc_high=table["auc"] + 0.05, em_drop=[0.1, 0.5, 0.2])


def test_scores_puts_the_best_score_on_top():
    figure = scores_figure(scores_table())
    assert list(figure.layout.yaxis.ticktext) == ["oe", "ce", "ce-last"]
    dots = figure.data[0]
    named = {figure.layout.yaxis.ticktext[round(y)]: x for x, y in zip(dots.x, dots.y, strict=True)}
    assert named == {"ce": 0.7, "ce-last": 0.95, "oe": 0.2}


def test_titles_say_what_the_table_shows():
    title = scores_figure(scores_table()).layout.title.text
    assert title == "AUC is highest for ce-last (0.95)"
    alike = pd.DataFrame({"score": list("abcd"), "auc": 1.0})
    assert scores_figure(alike).layout.title.text == "AUC is highest for 4 alike (1.00)"
    tied = scores_figure(scores_table().assign(auc=[0.951, 0.95, 0.2])).layout.title
    assert tied.text == "AUC is highest for ce and ce-last (0.95)"
    assert "3 scores" in tied.subtitle.text
    title = masking_figure(masking_table("zero")).layout.title.text.replace("<br>", " ")
    assert title == "EM 0.30 of 0.90 with 4 planted experts per layer masked; random sets 0.65, not tested"
    swap = answers_table().query("task == 'swap'")
    assert answers_figure(swap).layout.title.text == "EM is highest for mine (0.50), then base (0.10)"
    assert answers_figure(swap.assign(em=[0.501, 0.502])).layout.title.text == "EM is 0.50 for all"
    three = pd.concat([swap, swap.head(1).assign(variant="other", em=0.502)])
    title = answers_figure(three).layout.title.text.replace("<br>", " ")
    assert title == "EM is highest for other and mine (0.50), then base (0.10); intervals overlap"
    assert tuning_figure(tuning_log()).layout.title.text == "The loss goes from 3.00 to 1.00 in training"


def test_scores_draws_the_metrics_it_knows_unless_told_which():
    assert len(scores_figure(scores_table(), ["auc"]).data) == 1
    other = scores_table().rename(columns=lambda name: name.replace("auc", "mine")).drop(columns="em_drop")
    assert [list(it.x) for it in scores_figure(other).data] == [[0.2, 0.7, 0.95]]
    auc, drop = scores_figure(scores_table()).data
    np.testing.assert_allclose(auc.error_x.array, 0.05)
    np.testing.assert_allclose(auc.error_x.arrayminus, 0.1)
    assert drop.error_x.array is None


def test_scores_refuses_a_table_in_which_one_dot_would_hide_another():
    with pytest.raises(MoELensError, match="score ce"):
        scores_figure(pd.concat([scores_table()] * 2))


def test_scores_says_what_a_table_without_metrics_lacks():
    with pytest.raises(MoELensError, match="m_low and m_high"):
        scores_figure(scores_table()[["score", "auc"]].rename(columns={"auc": "mine"}))


def test_seeds_become_their_mean_with_bars_from_lowest_to_highest():
    seeds = [answers_table().assign(seed=seed, em=0.2 * seed + 0.1) for seed in (0, 1, 2)]
    once = pd.DataFrame([{"variant": "base", "task": "hops", "em": 0.5, "em_low": 0.4, "em_high": 0.7}])
    base = trace(answers_figure(pd.concat([*seeds, once])), "base")
    np.testing.assert_allclose(base.y, [0.3, 0.3, 0.5])
    np.testing.assert_allclose(base.error_y.array, [0.2, 0.2, 0.2])
    np.testing.assert_allclose(base.error_y.arrayminus, [0.2, 0.2, 0.1])
    scores = pd.concat([scores_table().assign(seed=seed, em_drop=[seed, 0.5, 0.2]) for seed in (0.0, 0.4)])
    drop = scores_figure(scores, ["em_drop"]).data[0]
    np.testing.assert_allclose(drop.x, [0.2, 0.2, 0.5])  # the best is on top
    np.testing.assert_allclose(drop.error_x.array, [0.2, 0, 0])


def test_one_seed_twice_is_refused():
    with pytest.raises(MoELensError, match="seed 1"):
        answers_figure(pd.concat([answers_table().assign(seed=1)] * 2))


def test_what_is_left_has_the_finder_that_leaves_least_on_top_and_random_sets_as_a_line():
    left = {"one": (0.2, 0.1), "two": (0.6, 0.4), "random sets": (0.8, 0.7), "nothing masked": (0.9, 0.9)}
    rows = [
        {"model": model, "finder": name, "em": em[place], "em_low": em[place] - 0.05, "em_high": em[place] + 0.1}
        for place, model in enumerate("ab")
        for name, em in left.items()
    ]
    figure = left_figure(pd.DataFrame(rows))
    assert list(figure.layout.yaxis.ticktext) == ["two", "one"]  # plotly counts from below
    assert [list(panel.x) for panel in figure.data] == [[0.2, 0.6], [0.1, 0.4]]
    assert [list(panel.y) for panel in figure.data] == [[1, 0], [1, 0]]
    assert [shape.x0 for shape in figure.layout.shapes] == [0.8, 0.9, 0.7, 0.9]
    assert figure.data[0].error_x.array == pytest.approx([0.1, 0.1])
    assert "one leaves least" in figure.layout.title.text
    with pytest.raises(MoELensError, match="stands there twice"):
        left_figure(pd.DataFrame([*rows, rows[0]]))


def tuning_log() -> pd.DataFrame:
    return pd.DataFrame({"step": [1, 2, 3, 4], "loss": [3.0, 2.0, 1.5, 1.0], "learning_rate": [0, 1e-3, 5e-4, 0]})


def test_tuning_marks_the_best_dev_score_with_a_star():
    log = tuning_log().assign(dev_em=[np.nan, 0.4, np.nan, 0.3])
    marks = next(it for it in tuning_figure(log).data if it.marker.symbol is not None)
    assert dict(zip(marks.x, marks.marker.symbol, strict=True)) == {2: "star", 4: "circle"}


def test_tuning_draws_any_dev_score_on_a_scale_of_its_own():
    log = tuning_log().assign(dev_log_likelihood=[np.nan, -2.5, np.nan, -0.7])
    figure = tuning_figure(log)
    marks = next(it for it in figure.data if it.marker.symbol is not None)
    assert dict(zip(marks.y, marks.marker.symbol, strict=True)) == {-2.5: "circle", -0.7: "star"}
    assert figure.layout.yaxis2.range is None
    assert "best dev log-likelihood -0.70 after step 4" in figure.layout.title.subtitle.text
    assert tuning_figure(tuning_log().assign(dev_f1=0.5)).layout.yaxis2.range == (-0.05, 1.08)
    with pytest.raises(MoELensError, match="one dev score; the log has dev_em, dev_log_likelihood"):
        tuning_figure(log.assign(dev_em=0.1))


def test_tuning_has_no_empty_panel_without_dev_scores():
    figure = tuning_figure(tuning_log())
    assert [list(it.y) for it in figure.data] == [[3.0, 2.0, 1.5, 1.0], [0, 1e-3, 5e-4, 0]]
    assert not hasattr(figure.layout, "yaxis3")


def answers_table() -> pd.DataFrame:
    rows = [
        ("base", "swap", 0.1),
        ("base", "novel", 0.9),
        ("router-tuned", "novel", 0.8),
        ("mine", "swap", 0.5),
    ]
    table = pd.DataFrame(rows, columns=["variant", "task", "em"])
    return table.assign(em_low=table["em"] - 0.1, em_high=table["em"] + 0.1)


def test_answers_puts_bars_at_their_tasks_in_the_tables_order():
    figure = answers_figure(answers_table())
    assert list(figure.layout.xaxis.categoryarray) == ["swap", "novel"]
    tuned = trace(figure, "router-tuned")
    assert (list(tuned.x), list(tuned.y)) == (["novel"], [0.8])
    assert len({it.marker.color for it in figure.data}) == 3


def test_metrics_stand_side_by_side_and_the_title_compares_the_first():
    rows = [("base", "bleu", 0.2), ("FFT", "bleu", 0.7), ("base", "rouge_l", 0.5), ("FFT", "rouge_l", 0.4)]
    table = pd.DataFrame(rows, columns=["variant", "metric", "mean"]).assign(task="summary", n=9)
    table = table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.2)
    figure = metrics_figure(table)
    assert figure.layout.title.text == "sentence BLEU is highest for FFT (0.70), then base<br>(0.20)"
    assert list(trace(figure, "base").x) == ["sentence BLEU", "ROUGE-L"]
    np.testing.assert_allclose(trace(figure, "FFT").y, [0.7, 0.4])
    np.testing.assert_allclose(trace(figure, "FFT").error_y.array, 0.2)
    both = metrics_figure(pd.concat([table, table.assign(task="news")]))
    assert "sentence BLEU<br>news" in trace(both, "base").x
    long = metrics_figure(table.replace({"metric": {"rouge_l": "accuracy_over_groups"}}).assign(task="exam"))
    assert trace(long, "base").x[1] == "accuracy, mean over groups"
    longer = pd.concat([table.replace({"metric": {"rouge_l": "accuracy_over_groups"}}), table.assign(task="news")])
    assert trace(metrics_figure(longer), "base").x[1] == "accuracy, mean<br>over groups<br>summary"
    room = [metrics_figure(one).layout.margin.b for one in (table, longer)]
    assert room[1] - room[0] == 2 * 26, "a label's lines stand above the legend"
    with pytest.raises(MoELensError, match="stands there twice"):
        metrics_figure(pd.concat([table, table]))


def test_answers_refuses_two_bars_in_one_place():
    with pytest.raises(MoELensError, match="variant base, task swap"):
        answers_figure(pd.concat([answers_table()] * 2))


@pytest.mark.parametrize(
    "figure",
    [
        lambda: masking_figure(masking_table("zero")),
        lambda: usage_figure(usage_table("base", "tuned"), pd.DataFrame({"layer": [1], "expert": [0]})),
        lambda: scores_figure(scores_table()),
        lambda: tuning_figure(tuning_log()),
        lambda: answers_figure(answers_table()),
    ],
)
def test_legend_lies_below_the_axes_within_the_picture(figure):
    layout = figure().layout
    plot = layout.height - layout.margin.t - layout.margin.b
    assert plot >= 100
    assert 0 < -layout.legend.y * plot <= layout.margin.b


def test_drawing_leaves_the_table_as_it_was():
    for draw, table in (
        (masking_figure, masking_table("zero")),
        (usage_figure, usage_table("base").drop(columns="panel")),
        (scores_figure, scores_table()),
        (tuning_figure, tuning_log()),
        (answers_figure, answers_table()),
    ):
        before = table.copy(deep=True)
        draw(table)
        pd.testing.assert_frame_equal(table, before)


def gains_table() -> pd.DataFrame:
    rows = [("context (CAG)", layer, 0.1 * layer) for layer in (3, 1, 2)] + [("answer (AAG)", 1, -0.5)]
    table = pd.DataFrame(rows, columns=["series", "layer", "gain"])
    return table.assign(gain_low=table["gain"] - 0.05, gain_high=table["gain"] + 0.1, n=200)


def test_gains_that_are_defined_nowhere_are_drawn_as_none():
    """As where attention has a window that ends before the context, and the base model has nothing there."""
    names = ["gain", "gain_low", "gain_high"]
    figure = gains_figure(gains_table().assign(**dict.fromkeys(names, float("nan"))), what="Attention")
    assert "Attention has no gain that is defined" in figure.layout.title.text


def test_gains_are_lines_in_the_order_of_layers_with_bands_of_their_intervals():
    figure = gains_figure(gains_table(), what="Attention")
    assert figure.layout.title.text == "Attention gains most at layer 3, context (CAG): +30%"
    context = trace(figure, "context (CAG)")
    assert list(context.x) == [1, 2, 3]
    np.testing.assert_allclose(context.y, [0.1, 0.2, 0.3])
    band = next(it for it in figure.data if it.fill == "toself")
    np.testing.assert_allclose(band.y, [0.2, 0.3, 0.4, 0.25, 0.15, 0.05])
    assert "200 examples" in figure.layout.title.subtitle.text
    unsure = gains_table().assign(gain_low=lambda rows: rows["gain_low"].where(rows["layer"] < 3, -0.1))
    figure = gains_figure(unsure, what="Attention")
    assert figure.layout.title.text == "Attention gains most at layer 2, context (CAG): +20%"
    figure = gains_figure(unsure.assign(gain_low=-0.1), what="Attention")
    assert figure.layout.title.text == "Attention gains at no layer by more than its interval"


def test_steep_gains_are_times_the_base_on_a_logarithmic_axis():
    table = gains_table().assign(gain=lambda rows: 100 * rows["gain"])
    figure = gains_figure(table, what="It")
    assert list(trace(figure, "context (CAG)").y) == pytest.approx([11, 21, 31])
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.title.text.replace("<br>", " ") == "It gains most at layer 3, context (CAG): 31 times the base"


def test_gains_say_how_they_were_averaged_and_over_how_many_examples():
    table = gains_table().assign(n=[200, 200, 200, 17], ratio_of_means=[30.0, 1.0, 2.0, 0.0])
    means = table["ratio_of_means"]
    table = table.assign(ratio_of_means_low=means - 1, ratio_of_means_high=means + 1)
    assert "mean of 17 to 200 examples" in gains_figure(table, what="It").layout.title.subtitle.text
    figure = gains_figure(table, what="It", column="ratio_of_means")
    assert list(trace(figure, "context (CAG)").y) == [2, 3, 31]
    assert "ratio of means, not mean of ratios, of 17 to 200 examples" in figure.layout.title.subtitle.text
    assert figure.layout.title.text.replace("<br>", " ") == "It gains most at layer 3, context (CAG): 31 times the base"
    assert figure.layout.yaxis.title.text == "mean, times the base's"


@pytest.mark.parametrize("ordered", [False, True])
def test_gains_of_many_series_look_different(ordered):
    table = pd.concat([gains_table().iloc[:3].assign(series=f"first {place}") for place in range(1, 31)])
    figure = gains_figure(table, what="It", ordered=ordered)
    lines = [it for it in figure.data if it.mode == "lines+markers"]
    assert len({(it.line.color, it.line.dash, it.marker.symbol) for it in lines}) == 30
    if ordered:
        light = [sum(int(it.line.color[i : i + 2], 16) for i in (1, 3, 5)) for it in lines]
        assert light[0] > light[10] > light[20] > light[-1]


def test_gains_with_panels_name_each_series_once_in_the_legend():
    table = pd.concat([gains_table().assign(panel=panel) for panel in ("a", "b")])
    figure = gains_figure(table, what="Attention")
    assert [it.name for it in figure.data if it.name and it.showlegend] == ["context (CAG)", "answer (AAG)"]
    with pytest.raises(MoELensError, match="twice"):
        gains_figure(pd.concat([table, table]), what="Attention")


def test_transfer_writes_each_gain_in_its_cell_and_marks_the_sure_ones():
    rows = [("swap", "swap", 0.8, 0.7, 0.9), ("swap", "hops", 0.1, -0.1, 0.3), ("hops", "swap", -0.2, -0.3, -0.1)]
    rows += [("hops", "hops", 0.3, 0.2, 0.4)]
    table = pd.DataFrame(rows, columns=["trained", "task", "em_gain", "em_gain_low", "em_gain_high"])
    figure = transfer_figure(table)
    texts = {(it.y, it.x): it.text for it in figure.layout.annotations}
    assert texts[("swap", "swap")] == "<b>+0.80</b>"
    assert texts[("swap", "hops")] == "+0.10"
    assert texts[("hops", "swap")] == "<b>-0.20</b>"
    assert figure.data[0].z.tolist() == [[-0.2, 0.3], [0.8, 0.1]]
    assert "Of 2 transfers to another task 0 gain and 1 lose" in figure.layout.title.text


@pytest.mark.parametrize(("accuracy", "word"), [(0.9, "tells its task"), (0.5, "hardly tells")])
def test_clusters_title_says_whether_they_are_apart(accuracy, word):
    table = pd.DataFrame({"task": ["a", "b"] * 4, "x": range(8), "y": range(8)})
    numbers = {"silhouette": 0.1, "knn_accuracy": accuracy, "knn_accuracy_low": accuracy - 0.05, "chance": 0.5}
    numbers["knn_accuracy_high"] = accuracy + 0.04
    figure = clusters_figure(table.assign(**numbers))
    assert word in figure.layout.title.text
    assert {it.name: len(it.x) for it in figure.data} == {"a": 4, "b": 4}
    subtitle = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert "chance 0.50" in subtitle
    assert f"[{accuracy - 0.05:.2f}, {accuracy + 0.04:.2f}]" in subtitle


def test_clusters_compare_the_routers_of_their_panels():
    table = pd.DataFrame({"task": ["a", "b"] * 4, "x": range(8), "y": range(8), "silhouette": 0.1, "chance": 0.5})
    panels = [
        table.assign(panel=name, knn_accuracy=x, knn_accuracy_low=x, knn_accuracy_high=x)
        for name, x in (("own", 0.9), ("one", 0.55))
    ]
    figure = clusters_figure(pd.concat(panels))
    title = figure.layout.title.text.replace("<br>", " ")
    assert title == "Nearest neighbours share the task: 0.90 with own, 0.55 with one"
    assert {it.xaxis for it in figure.data} == {"x", "x2"}


def test_layers_have_a_panel_per_kind_and_the_base_as_a_line():
    rows = [("base", -1, 0.1)] + [(kind, layer, 0.2 * layer) for kind in ("single", "first") for layer in (1, 2)]
    table = pd.DataFrame(rows, columns=["kind", "layer", "em"])
    figure = layers_figure(table.assign(em_low=table["em"] - 0.01, em_high=table["em"] + 0.02))
    assert [list(it.y) for it in figure.data if it.type == "bar"] == [[0.2, 0.4], [0.2, 0.4]]
    assert {shape.y0 for shape in figure.layout.shapes} == {0.1}
    assert trace(figure, "base (0.10)")
    title = figure.layout.title.text.replace("<br>", " ")
    assert "layer 2 alone reach EM 0.40, those of all 2 layers 0.40" in title


def test_layers_without_a_tuned_one_are_refused():
    table = pd.DataFrame({"kind": ["base"], "layer": [-1], "em": [0.1], "em_low": [0.0], "em_high": [0.2]})
    with pytest.raises(MoELensError, match="no tuned layer"):
        layers_figure(table)


def test_layers_of_several_seeds_are_their_mean():
    rows = [("single", 0, seed, em) for seed, em in enumerate((0.3, 0.5, 0.7))]
    table = pd.DataFrame(rows, columns=["kind", "layer", "seed", "em"])
    figure = layers_figure(table.assign(em_low=0.0, em_high=1.0))
    [bar] = [it for it in figure.data if it.type == "bar"]
    assert list(bar.y) == pytest.approx([0.5])
    assert [bar.error_y.array[0], bar.error_y.arrayminus[0]] == pytest.approx([0.2, 0.2])
    assert "mean of 3 seeds" in figure.layout.title.subtitle.text


def test_sizes_have_a_panel_per_task_a_line_per_choice_and_the_base():
    rows = [("base", 0, task, 0, 0.1) for task in ("swap", "closed_book")]
    rows += [("CEFT", size, task, seed, em + 0.02 * seed)
             for size, em in ((8, 0.8), (1, 0.2)) for task in ("swap", "closed_book") for seed in (0, 1)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["variant", "size", "task", "seed", "em"])
    figure = sizes_figure(table.assign(em_low=table["em"], em_high=table["em"]))
    for place in (0, 1):
        line = trace(figure, "CEFT", place=place)
        assert list(line.x) == ["1", "8"]
        np.testing.assert_allclose(line.y, [0.21, 0.81])
        np.testing.assert_allclose(line.error_y.array, 0.01)
    assert {shape.y0 for shape in figure.layout.shapes} == {0.1}
    title = figure.layout.title.text.replace("<br>", " ")
    assert title == "EM is highest on swap for CEFT of 8 (0.81), on closed_book for CEFT of 8 (0.81)"
    with pytest.raises(MoELensError, match="twice"):
        sizes_figure(pd.concat([table, table]).assign(em_low=0.0, em_high=1.0))


def tradeoff_table() -> pd.DataFrame:
    rows = [("base", None, "swap", 0, 0.0), ("base", None, "closed_book", 0, 1.0)]
    for rate, learned, kept in ((0.01, 0.9, 0.4), (0.003, 0.7, 0.8)):
        for seed in (0, 1):
            rows += [("CEFT", rate, "swap", seed, learned + 0.02 * seed), ("CEFT", rate, "closed_book", seed, kept)]
    table = pd.DataFrame(rows, columns=["variant", "learning_rate", "task", "seed", "em"])
    return table.assign(em_low=table["em"] - 0.1, em_high=table["em"] + 0.1)


def test_tradeoff_has_what_is_learned_along_and_what_is_kept_up_by_rising_rate():
    figure = tradeoff_figure(tradeoff_table())
    np.testing.assert_allclose([trace(figure, "CEFT").x, trace(figure, "CEFT").y], [[0.71, 0.91], [0.8, 0.4]])
    np.testing.assert_allclose([trace(figure, "base").x, trace(figure, "base").y], [[0.0], [1.0]])
    np.testing.assert_allclose(trace(figure, "CEFT").error_x.array, 0.01)
    np.testing.assert_allclose(trace(figure, "base").error_y.arrayminus, 0.1)
    title = figure.layout.title.text.replace("<br>", " ")
    assert title == "Most is learned by CEFT (0.91), most kept by CEFT (0.80), each at its best rate"
    low, high = trace(figure, "CEFT").marker.size
    assert low < high
    assert "mean of 2 seeds" in figure.layout.title.subtitle.text


def test_a_variant_looks_the_same_in_every_figure_and_like_no_other():
    names = ["base", "router-tuned", "CEFT", "CEFT, ce-last", "ESFT-token", "ESFT-gate", "random experts"]
    names += ["planted experts", "FFT", *(f"mine {place}" for place in range(12))]
    table = pd.DataFrame({"variant": names, "task": "swap", "em": 0.5, "em_low": 0.4, "em_high": 0.6})
    bars = {it.name: it.marker for it in answers_figure(table).data}
    assert len({(it.color, it.pattern.shape) for it in bars.values()}) == len(names)
    rates = table[::-1].assign(learning_rate=0.1)
    figure = tradeoff_figure(pd.concat([rates, rates.assign(task="kept")]))
    for name in names[:9]:
        assert trace(figure, name).marker.color == bars[name].color
        assert trace(figure, name).line.dash == {"": "solid", "/": "dash"}[bars[name].pattern.shape]
    assert len({(it.marker.color, it.marker.symbol, it.line.dash) for it in figure.data}) == len(names)


def test_tradeoff_takes_two_tasks_and_each_point_once():
    table = tradeoff_table()
    with pytest.raises(MoELensError, match="two tasks"):
        tradeoff_figure(table[table["task"] == "swap"])
    with pytest.raises(MoELensError, match="twice"):
        tradeoff_figure(pd.concat([table, table]))


def test_correlation_says_r_with_its_interval():
    table = pd.DataFrame({"target": "answer", "model": ["base", "all"], "gain": [0, 0.4], "em": [0.1, 0.9]})
    figure = correlation_figure(table.assign(r=0.95, r_low=0.7, r_high=0.99))
    assert "answer: r = 0.95 [0.70, 0.99]" in figure.layout.title.subtitle.text
    assert list(figure.data[0].text) == ["base", "all"]
    assert figure.layout.title.text == "EM rises with attention to the answer (r = 0.95)"
    unsure = correlation_figure(table.assign(r=0.6, r_low=-0.1, r_high=0.9))
    assert "neither way for sure" in unsure.layout.title.text


def test_parameters_are_written_with_their_share():
    table = pd.DataFrame({"model": "m", "method": ["CEFT", "FFT"], "trainable": [8192, 2_000_000], "total": 2_000_000})
    figure = parameters_figure(table)
    assert [it.text[0] for it in figure.data] == ["8.2K (0.4%)", "2.0M (100.0%)"]
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.title.text == "Share of the parameters trained: CEFT 0.4%"


def dose_table(*tasks: str) -> pd.DataFrame:
    """Chosen experts fall from 0.9 by 0.1 a strength; three random sets by 0.01, 0.02 and 0.03."""
    rows = []
    for task in tasks:
        rows.append({"set": "none", "family": "none", "em": 0.9, "strength": np.nan})
        for strength in (1.0, 2.0, 5.0):
            rows.append({"set": "ce-last:4", "family": "ce-last", "em": 0.9 - 0.1 * strength, "strength": strength})
            rows += [
                {"set": f"random:4#{i}", "family": "random", "em": 0.9 - 0.01 * i * strength, "strength": strength}
                for i in (1, 2, 3)
            ]
            rows.append({"set": "random:4", "family": "random mean", "em": 0.9 - 0.02 * strength, "strength": strength})
        rows = [{"task": task} | row for row in rows]
    table = pd.DataFrame(rows).assign(mode="bias", n=96, positions="from_question", steps="all")
    return table.assign(em_low=table["em"] - 0.05, em_high=table["em"] + 0.02)


def test_doses_are_lines_over_the_strength_with_the_range_of_random_sets_behind():
    figure = doses_figure(dose_table("swap").sample(frac=1, random_state=0))
    line = trace(figure, "ce-last:4")
    assert list(line.x) == [1, 2, 5]
    np.testing.assert_allclose(line.y, [0.8, 0.7, 0.4])
    np.testing.assert_allclose(line.error_y.arrayminus, 0.05)
    np.testing.assert_allclose(trace(figure, "random (mean and range of sets)").y, [0.88, 0.86, 0.8])
    band = next(it for it in figure.data if it.fill == "toself" and "127" in it.fillcolor)
    assert list(band.x) == [1, 2, 5, 5, 2, 1]
    np.testing.assert_allclose(band.y, [0.89, 0.88, 0.85, 0.75, 0.84, 0.87])
    assert set(trace(figure, "without").y) == {0.9}
    assert figure.layout.xaxis.title.text == "added to the experts' router logits"
    said = f"{figure.layout.title.text} {figure.layout.title.subtitle.text}".replace("<br>", " ")
    assert "bias 5 on ce-last:4 takes EM on swap from 0.90 to 0.40" in said
    assert "positions from_question; 96 examples" in said


def test_the_range_of_random_sets_at_one_strength_is_a_bar():
    table = dose_table("swap")
    figure = doses_figure(table[table["strength"].isna() | (table["strength"] == 5)])
    bar = trace(figure, "random (mean and range of sets)").error_y
    np.testing.assert_allclose([*bar.array, *bar.arrayminus], [0.05, 0.05])
    assert trace(doses_figure(table), "random (mean and range of sets)").error_y.array is None


def test_doses_of_several_tasks_are_panels_with_one_legend():
    figure = doses_figure(pd.concat([dose_table("swap"), dose_table("closed_book")], ignore_index=True))
    assert [axis.title.text for axis in figure.select_yaxes()] == ["EM, swap", "EM, closed_book"]
    assert [it.yaxis for it in figure.data if it.name == "ce-last:4"] == ["y", "y2"]
    named = [it.name for it in figure.data if it.name and it.showlegend]
    assert len(named) == len(set(named)) == 3


def test_labels_of_strengths_that_lie_close_together_are_left_out():
    table = dose_table("swap")
    close = pd.concat([table, table[table["strength"] == 1].assign(strength=1.1)], ignore_index=True)
    figure = doses_figure(close)
    assert list(trace(figure, "ce-last:4").x) == [1, 1.1, 2, 5]
    assert list(figure.layout.xaxis.tickvals) == [1.1, 2, 5]


def test_doses_refuse_a_table_without_strengths_or_of_two_modes():
    table = dose_table("swap")
    with pytest.raises(MoELensError, match="this table has those of none"):
        doses_figure(table.assign(strength=np.nan))
    with pytest.raises(MoELensError, match="bias, scale"):
        doses_figure(pd.concat([table, table.assign(mode="scale")]))


def matrix_table() -> pd.DataFrame:
    rows = [
        ("ce:4", "kept", "spared", 0.02, "selective", 0.03),
        ("ce:4", "swap", "target", 0.8, "selective", 0.03),
        ("oe:4", "kept", "spared", 0.3, "not selective", 1.5),
        ("oe:4", "swap", "target", 0.2, "not selective", 1.5),
    ]
    table = pd.DataFrame(rows, columns=["intervention", "task", "role", "effect", "verdict", "ratio"])
    table = table.assign(
        metric="em",
        measure="share",
        unmasked=0.9,
        n=96,
        ratio_low=table["ratio"] - 0.1,
        ratio_high=[0.2, 0.2, np.inf, np.inf],
    )
    return table.assign(effect_low=table["effect"] - 0.1, effect_high=table["effect"] + 0.1)


def test_the_matrix_has_targets_first_and_says_every_effect_and_verdict():
    figure = selectivity_figure(matrix_table())
    [cells] = figure.data
    np.testing.assert_allclose(np.asarray(cells.z), [[0.8, 0.02], [0.2, 0.3]])
    assert list(figure.layout.xaxis.ticktext) == ["swap<br>(target)", "kept<br>(spared)"]
    assert list(figure.layout.yaxis.ticktext) == ["ce:4", "oe:4"]
    told = {(note.x, note.y): note.text for note in figure.layout.annotations}
    assert told[0, 0] == "80%<br>[70, 90%]"
    assert told[1, 1] == "30%<br>[20, 40%]"
    ends = [text for (x, _), text in told.items() if x > 1]
    assert ends == ["<b>selective</b><br>ratio 0.03 [-0.07, 0.20]", "<b>not selective</b><br>ratio 1.50 [1.40, ∞]"]
    assert figure.layout.title.text == "ce:4 is selective"


def test_the_matrix_of_several_metrics_has_a_row_for_each_and_says_drops_in_their_unit():
    drops = matrix_table().assign(metric="logit_difference", measure="drop")
    drops[["effect", "effect_low", "effect_high"]] *= 10
    figure = selectivity_figure(pd.concat([matrix_table(), drops]))
    [cells] = figure.data
    names = ["ce:4<br>em", "oe:4<br>em", "ce:4<br>logit_difference", "oe:4<br>logit_difference"]
    assert list(figure.layout.yaxis.ticktext) == names
    np.testing.assert_allclose(np.asarray(cells.z)[2:], [[1, 0.025], [0.25, 0.375]])  # of the largest drop, 8
    told = {(note.x, note.y): note.text for note in figure.layout.annotations}
    assert told[0, 2] == "-8.00<br>[-9.00, -7.00]"
    assert "or of logit_difference the amount" in figure.layout.title.subtitle.text


def test_a_matrix_of_many_tasks_is_wide_enough_for_what_its_cells_say():
    names = [
        ("swap", "target"),
        ("novel", "target"),
        ("closed_book", "spared"),
        ("consistent", "spared"),
        ("q", "spared"),
    ]
    rows = [matrix_table().iloc[0].to_dict() | {"task": task, "role": role} for task, role in names]
    figure = selectivity_figure(pd.DataFrame(rows))
    axis = figure.layout.xaxis
    cell = (figure.layout.width - 24 - 110) / (axis.range[1] - axis.range[0])  # 110: the interventions' names
    assert cell > 10 * 8, "ten characters of 15 px"


def test_the_matrix_refuses_two_rows_for_a_cell():
    with pytest.raises(MoELensError, match="one row per intervention and metric and task"):
        selectivity_figure(pd.concat([matrix_table(), matrix_table().head(1)]))


def patching_table(keys: dict[str, list], **columns: object) -> pd.DataFrame:
    """A map over the product of the keys, whose third cell is the strongest and the first certain of two."""
    table = pd.MultiIndex.from_product(keys.values(), names=keys.keys()).to_frame(index=False)
    share = np.zeros(len(table))
    share[[0, 2]] = 0.25, 0.75
    table = table.assign(
        what="residual", metric="logit_difference", n=60, unpatched=-10.0, source=2.0, normalised=share,
        normalised_low=share - 0.1, normalised_high=share + 0.1, effect=share * 12, effect_low=share * 12 - 1,
        effect_high=share * 12 + 1, q_value=np.where(share > 0, 0.01, 0.9),
    )  # fmt: skip
    return table.assign(**columns)


def framed(figure) -> list[tuple[float, float]]:
    """The middles of the framed cells, (x, y)."""
    line = trace(figure, "q ≤ 0.05")
    corners = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x is not None]
    return [tuple(np.mean(corners[at : at + 4], axis=0).round(6)) for at in range(0, len(corners), 5)]


def test_a_map_over_positions_has_them_from_above_and_says_each_cell_with_its_interval():
    table = patching_table({"layer": [0, 3], "position": ["context", "question", "last"]})
    figure = patching_figure(table.sort_values("layer", ascending=False, kind="stable"))
    cells = figure.data[0]
    np.testing.assert_allclose(np.asarray(cells.z), [[0.25, 0], [0, 0], [0.75, 0]])
    assert (cells.zmin, cells.zmax) == (-1, 1)
    assert list(figure.layout.yaxis.ticktext) == ["context", "question", "last"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert list(figure.layout.xaxis.ticktext) == [0, 3]
    told = {(note.x, note.y): note.text for note in figure.layout.annotations}
    assert told[0, 2] == "0.75<br>[0.65, 0.85]"
    assert sorted(framed(figure)) == [(0, 0), (0, 2)]
    said = f"{figure.layout.title.text} {figure.layout.title.subtitle.text}".replace("<br>", " ")
    assert "residual of layer 0, last, moves logit_difference 75% of the way" in said
    assert "0: unpatched -10.00, 1: source 2.00 (logit_difference, nats); 60 examples; brackets: 95 %" in said


def test_a_large_map_over_experts_has_layers_from_below_and_labels_that_can_be_read():
    table = patching_table({"layer": list(range(30)), "position": ["prompt"], "expert": list(range(64))})
    figure = patching_figure(table.sample(frac=1, random_state=0))
    assert np.asarray(figure.data[0].z).shape == (30, 64)
    assert np.asarray(figure.data[0].z)[0, 2] == 0.75
    assert figure.layout.yaxis.range[0] < figure.layout.yaxis.range[1]
    assert not figure.layout.annotations, "no number fits into a cell"
    assert len(figure.layout.xaxis.tickvals) <= 18
    assert len(figure.layout.yaxis.tickvals) <= 8
    assert sorted(framed(figure)) == [(0, 0), (2, 0)]
    assert "brackets" not in figure.layout.title.subtitle.text


def test_tokens_are_named_by_their_text_where_all_prompts_share_it():
    table = patching_table({"layer": [0], "position": ["-2", "-1", "0"]}, token=["<b>", None, "\n"])
    assert list(patching_figure(table).layout.yaxis.ticktext) == ["&lt;b&gt;", "-1", "\\n"]


def test_where_the_runs_do_not_differ_for_certain_the_plain_effect_is_drawn():
    table = patching_table({"layer": [0, 1], "position": ["last", "question"]}, normalised=np.nan)
    figure = patching_figure(table)
    assert figure.data[0].zmax == 9
    assert "effect on logit_difference, nats; unpatched -10.00" in figure.layout.title.subtitle.text
    assert "moves logit_difference by +9.00" in figure.layout.title.text.replace("<br>", " ")
    nowhere = patching_figure(table.assign(q_value=1.0))
    assert "for certain nowhere" in nowhere.layout.title.text.replace("<br>", " ")
    with pytest.raises(MoELensError, match="one row per position and layer"):
        patching_figure(pd.concat([table, table]))


def test_agreement_shows_shared_experts_below_the_diagonal_and_ranks_above():
    rows = [("ce", "oe", 0.5, 0.25), ("ce", "set", -0.2, 0.1), ("oe", "set", 0.9, 0.6)]
    table = pd.DataFrame(rows, columns=["first", "second", "rank_correlation", "jaccard"])
    figure = agreement_figure(table)
    [heat] = figure.data
    names = list(heat.x)
    cells = np.array(heat.z, dtype=float)
    for first, second, ranks, shared in rows:
        assert cells[names.index(second), names.index(first)] == shared
        assert cells[names.index(first), names.index(second)] == ranks
    assert np.isnan(np.diag(cells)).all()
    assert figure.layout.title.text.replace("<br>", " ") == "oe and set choose most alike (0.60)"
    with pytest.raises(MoELensError, match="twice"):
        agreement_figure(pd.concat([table, table[:1]]))


def test_experts_alone_are_marked_by_whose_answer_comes_out_and_the_two_chosen_are_named():
    table = pd.DataFrame({
        "layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "says": ["context", "memory", "other", "memory"],
        "prediction": ["Rome", "Bern", "a <b>", "Bern"], "chosen": [True, True, False, False],
        "question": "Where?", "answer": "Rome", "memory": "Bern", "as_it_is": "Bern",
    })  # fmt: skip
    figure = single_experts_figure(table)
    marks = {trace.name: [*zip(trace.x, trace.y, strict=True)] for trace in figure.data}
    assert marks["context's answer"] == [(0, 0)]
    assert marks["memory's answer"] == [(1, 0), (1, 1)]
    assert marks["another"] == [(0, 1)]
    assert marks["the two of the title"] == [(0, 0), (1, 0)]
    assert figure.layout.title.text.replace("<br>", " ") == "Alone in layer 0: expert 0 “Rome”, expert 1 “Bern”"


def test_the_still_of_an_attention_view_is_the_layer_in_which_the_answer_gains_most():
    tokens = [("In", "context"), (" Bern", "answer"), (".\n", "context"), ("Where?", "question")]
    rows = [(layer, i, *token, 0.1) for layer in (0, 1) for i, token in enumerate(tokens)]
    base = pd.DataFrame(rows, columns=["layer", "position", "token", "part", "attention"])
    gains = {(0, 0): 0.5, (1, 1): 0.2, (1, 3): -0.1}
    tuned = base.assign(attention=[0.1 + gains.get((row[0], row[1]), 0) for row in rows])
    still = attention_view(base, tuned, note="A note.").still
    assert "A note. Layer 1;" in still.layout.title.subtitle.text.replace("<br>", " ")
    drawn = [
        (one.text.replace("\xa0", " "), one.bgcolor, one.bordercolor == style.INK) for one in still.layout.annotations
    ]
    blue, red = style.translucent(style.BLUE, 1.0), style.translucent(style.VERMILLION, 0.5)
    white = style.translucent(style.VERMILLION, 0.0)
    assert drawn == [
        ("In", white, False), (" Bern", blue, True), (".⏎", white, False), ("Where?", red, False),
    ]  # fmt: skip
