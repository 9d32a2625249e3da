"""Causal masking runs: what is masked, what random sets it is compared with, and what is kept on disk."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens import Example, ExpertSet, MoELensError, Zero
from moe_lens.causal import own_answers
from moe_lens.causal.evaluation import answer_table, q_values, summarise, summary_table
from moe_lens.choosing import Choice, joined, mask, random_controls, write_masked
from moe_lens.choosing.controls import compared_summary
from moe_lens.choosing.masking import masking_rows, named
from moe_lens.lens.interventions import MODES, AddVector, Bias, Scale, parse_mode
from moe_lens.metrics import seeds_interval
from moe_lens.results import read_provenance, read_table

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",), "the mat"),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
    Example("c", "The dog slept in the sun.", "Who slept?", ("The dog",), "The cat"),
]
SHORT = {"max_new_tokens": 4, "batch_size": 2}
HALF = Choice("half", "chosen", ExpertSet.of({layer: range(4) for layer in range(3)}))
TOP = Choice("ce:2", "ce", ExpertSet.of({0: [6, 7], 1: [0, 1]}))


def literal(text: str) -> Choice:
    return Choice(text, "chosen", ExpertSet.parse(text))


def test_controls_match_the_sizes_of_every_layer_and_are_the_same_for_the_same_seed():
    chosen = [TOP, literal("0:1,2;1:5"), TOP]
    controls = random_controls(chosen, 3, n_experts=8, seed=0)
    assert [c.name for c in controls] == [
        *(f"random:2#{i}" for i in range(3)),
        *(f"random~0x2+1x1#{i}" for i in range(3)),
    ]
    assert {tuple(len(ids) for _, ids in c.experts.members) for c in controls[:3]} == {(2, 2)}
    assert {tuple(len(ids) for _, ids in c.experts.members) for c in controls[3:]} == {(2, 1)}
    assert len({c.experts for c in controls[:3]}) == 3
    assert controls == random_controls(chosen, 3, n_experts=8, seed=0)
    assert controls != random_controls(chosen, 3, n_experts=8, seed=1)


def answers_of(em: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(name, str(i), "", value, value, value) for name, values in em.items() for i, value in enumerate(values)]
    table = pd.DataFrame(rows, columns=["intervention", "id", "prediction", "em", "f1", "memory"])
    return table.assign(memory_ratio=table["memory"], same=False)


def test_rows_say_how_much_was_lost_and_how_random_sets_compare():
    em = {"none": [1, 1, 1, 1], "ce:1": [0, 0, 0, 1], "random:1#0": [1, 1, 0, 1], "random:1#1": [0, 0, 0, 0]}
    choices = [Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:]]
    rows = masking_rows(answers_of(em), choices, "zero").set_index("intervention")
    assert rows.loc["none", "em"] == 1
    assert pd.isna(rows.loc["none", "em_drop"])
    assert rows.loc["ce:1", "em_drop"] == 0.75
    assert rows.loc["ce:1", "rank"] == "2 of 3"  # one random set did more damage
    assert rows.loc["random:1", ["em", "em_drop", "family"]].tolist() == [0.375, 0.625, "random mean"]
    assert 0 < rows.loc["ce:1", "p_value"] <= 1
    assert rows.loc["ce:1", "em_low"] <= 0.25 <= rows.loc["ce:1", "em_high"]


def test_each_set_is_compared_with_the_random_ones_of_its_shape_over_sets_and_examples():
    answered = {"none": 1.0, "ce:1": 0.1, **{f"random:1#{i}": 0.6 + 0.01 * (i % 3) for i in range(20)}}
    em = {name: [float(place < 100 * share) for place in range(100)] for name, share in answered.items()}
    choices = [Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:]]
    rows = masking_rows(answers_of(em), choices, "zero").set_index("intervention")
    row, members = rows.loc["ce:1"], rows[rows["family"] == "random"]
    assert row["below_random"] == pytest.approx(members["em"].mean() - 0.1)
    assert row[["rank", "random_p"]].tolist() == ["1 of 21", 1 / 21]
    differences = [[one - own for one, own in zip(em[name], em["ce:1"], strict=True)] for name in members.index]
    expected = seeds_interval(differences, bounds=(-1, 1))
    assert row[["below_random_low", "below_random_high"]].tolist() == [expected.low, expected.high]
    assert 0.35 < expected.low < 0.45  # of 100 examples, half of which differ
    assert rows.loc[["none", "random:1", *members.index], "below_random"].isna().all()


def test_every_paired_metric_of_a_summary_is_compared_with_random_sets_which_are_no_rows_of_it():
    em = {"none": [1, 1, 1, 1], "ce:1": [0, 0, 0, 1], "random:1#0": [1, 1, 0, 1], "random:1#1": [0, 0, 0, 0]}
    chosen, *controls = (Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:])
    answers = answers_of(em)
    table = compared_summary(answers, [chosen], controls, ["em", "memory_ratio"])
    assert table["intervention"].tolist() == ["none", "ce:1"] * 2
    rows = table.set_index(["intervention", "metric"])
    assert rows.loc[("ce:1", "em"), ["below_random", "rank", "random_p"]].tolist() == [0.125, "2 of 3", 2 / 3]
    assert pd.isna(rows.loc[("ce:1", "memory_ratio"), "below_random"]), "other masks, other examples"
    alone = summary_table(answers[answers["intervention"].isin(["none", "ce:1"])], metrics=["em"])
    assert rows.loc[("ce:1", "em"), "q_value"] == alone.loc[1, "q_value"], "controls count as tests"


def test_a_summary_of_no_paired_metric_has_no_comparison_and_examples_that_share_an_id_are_compared_by_place():
    em = {"none": [1, 1, 1], "ce:1": [0, 0, 1], "random:1#0": [1, 0, 1]}
    chosen, control = (Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:])
    answers = answers_of(em)
    table = compared_summary(answers, [chosen], [control], ["memory_ratio"])
    assert table["intervention"].tolist() == ["none", "ce:1"]
    assert "below_random" not in table
    rows = masking_rows(answers.assign(id="same"), [chosen, control], "zero").set_index("intervention")
    assert rows.loc["ce:1", "below_random"] == pytest.approx(1 / 3)


def test_a_set_that_does_what_random_ones_do_has_an_interval_over_0_that_is_no_point():
    em = {name: [1.0] * 50 for name in ("none", "ce:1", *(f"random:1#{i}" for i in range(5)))}
    choices = [Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:]]
    row = masking_rows(answers_of(em), choices, "zero").set_index("intervention").loc["ce:1"]
    assert row[["below_random", "random_p"]].tolist() == [0, 1]
    assert row["below_random_low"] < -0.05 < 0.05 < row["below_random_high"]


def test_a_random_set_that_does_as_much_damage_takes_the_first_rank():
    em = {"none": [1, 1], "ce:1": [0, 1], "random:1#0": [1, 0]}
    choices = [Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in list(em)[1:]]
    assert masking_rows(answers_of(em), choices, "zero").set_index("intervention").loc["ce:1", "rank"] == "2 of 2"


def test_controls_of_different_layers_are_kept_apart_and_every_choice_is_ranked():
    chosen = [literal(text) for text in ("0:5", "1:3", "0:1,2;1:5", "0:3,4;1:0")]
    controls = random_controls(chosen, 1, n_experts=8, seed=0)
    names = [control.name for control in controls]
    assert names == ["random~0x1#0", "random~1x1#0", "random~0x2+1x1#0"]
    em = {"none": [1, 1]} | {choice.name: [0, 1] for choice in [*chosen, *controls]}
    rows = masking_rows(answers_of(em), [*chosen, *controls], "zero").set_index("intervention")
    assert rows.loc[[choice.name for choice in chosen], "rank"].tolist() == ["2 of 2"] * 4


def test_two_sets_of_one_name_are_refused_and_one_set_named_twice_counts_once(olmoe, tmp_path):
    chosen = [Choice("mine", "mine", ExpertSet.of({0: [expert]})) for expert in (1, 2)]
    with pytest.raises(MoELensError, match="these repeat: mine"):
        mask(olmoe, EXAMPLES, chosen, out=tmp_path, **SHORT)
    assert not list(tmp_path.iterdir())
    assert named([chosen[0], chosen[0]], "zero") == {"mine": Zero(chosen[0].experts)}
    with pytest.raises(MoELensError, match=r"mode of masking must be one of zero, .*got 'delete'"):
        mask(olmoe, EXAMPLES, chosen[:1], "delete")


def test_memory_is_counted_where_it_is_known():
    table = answers_of({"none": [1, 0]}).assign(memory=[float("nan"), 1.0])
    assert summarise(table)["memory"] == 1.0
    assert summarise(table.assign(memory=float("nan")))["memory"] is None


@pytest.mark.parametrize("mode", ["zero", "renormalize"])
def test_the_rows_are_those_of_each_mask_answered_by_hand(olmoe, mode, capsys):
    chosen = [HALF, literal("0:1;1:2;2:3")]
    found = mask(olmoe, EXAMPLES, chosen, mode, controls=2, seed=3, **SHORT)
    sets = {"none": ExpertSet()} | {choice.name: choice.experts for choice in chosen}
    sets |= {c.name: c.experts for c in random_controls(chosen, 2, n_experts=8, seed=3)}
    by_hand = {}
    for name, experts in sets.items():
        with olmoe.intervene(*([MODES[mode](experts)] if experts else [])):
            by_hand[name] = answer_table(olmoe, EXAMPLES, progress=False, **SHORT)
    rows = found.rows.set_index("intervention")
    assert list(rows.index) == [*by_hand, "random:4", "random:1"]
    for name, answers in by_hand.items():
        told = summarise(answers, None if name == "none" else by_hand["none"], seed=3)
        assert rows.loc[name, list(told)].tolist() == pytest.approx(list(told.values()), nan_ok=True)
        assert found.answers[found.answers["intervention"] == name]["prediction"].tolist() == list(
            answers["prediction"]
        )
    assert len({tuple(answers["prediction"]) for answers in by_hand.values()}) > 2, "no mask took"
    assert rows["size"].to_dict() == {
        name: {"half": 4, "none": 0}.get(name, 4 if "random:4" in name else 1) for name in rows.index
    }
    assert set(rows["mode"].dropna()) == {mode}
    tested = rows.loc[[choice.name for choice in chosen]]
    assert tested["q_value"].tolist() == pytest.approx(q_values(tested["p_value"]).tolist())
    assert rows.loc[[name for name in rows.index if "random" in name], "q_value"].isna().all()
    assert capsys.readouterr().out == ""


def test_every_strength_is_answered_and_compared_with_random_sets_of_the_same_strength(olmoe):
    mode = parse_mode("bias:0,6", positions="last")
    found = mask(olmoe, EXAMPLES, [HALF], mode, controls=2, seed=3, **SHORT)
    sets = {HALF.name: HALF.experts}
    sets |= {one.name: one.experts for one in random_controls([HALF], 2, n_experts=8, seed=3)}
    rows = found.rows.set_index("intervention")
    answered = {}
    for dose in (0, 6):
        for name, experts in sets.items():
            with olmoe.intervene(Bias(experts, float(dose), positions="last")):
                answered[f"{name}@bias={dose}"] = answer_table(olmoe, EXAMPLES, progress=False, **SHORT)
    for name, answers in answered.items():
        own = found.answers[found.answers["intervention"] == name]
        assert own["prediction"].tolist() == answers["prediction"].tolist()
        assert rows.loc[name, "em"] == answers["em"].mean()
        assert rows.loc[name, ["mode", "positions", "steps"]].tolist() == ["bias", "last", "all"]
        assert rows.loc[name, ["strength", "set"]].tolist() == [float(name[-1]), name.partition("@")[0]]
    assert len({tuple(answers["prediction"]) for answers in answered.values()}) > 1, "no bias took"
    unmasked = found.answers[found.answers["intervention"] == "none"]["prediction"].tolist()
    assert answered["half@bias=0"]["prediction"].tolist() == unmasked, "a bias of 0 changes answers"
    scores = {name: answers["em"].to_numpy() for name, answers in answered.items()}
    for dose in (0, 6):
        theirs = [scores[f"random:4#{number}@bias={dose}"] for number in range(2)]
        below = seeds_interval([one - scores[f"half@bias={dose}"] for one in theirs], bounds=(-1, 1), seed=3)
        assert rows.loc[f"half@bias={dose}", "below_random"] == below.mean
        assert rows.loc[f"random:4@bias={dose}", "em"] == pytest.approx(sum(map(sum, theirs)) / 6)


def test_a_dose_is_compared_with_the_random_sets_of_its_own_strength_whatever_those_of_others_do():
    """Made answers: at strength 1 nothing happens to anyone, at 2 only the chosen set loses all."""
    names = ["ce:1", "random:1#0", "random:1#1"]
    em = {"none": [1, 1, 1, 1]} | {f"{name}@scale=1": [1, 1, 1, 1] for name in names}
    em |= {f"{name}@scale=2": [0, 0, 0, 0] if name == "ce:1" else [1, 1, 1, 1] for name in names}
    chosen = [Choice(name, name.partition(":")[0], ExpertSet.of({0: [0]})) for name in names]
    rows = masking_rows(answers_of(em), chosen, "scale:1,2").set_index("intervention")
    assert rows.loc[["ce:1@scale=1", "ce:1@scale=2"], "below_random"].tolist() == [0, 1]
    assert rows.loc[["ce:1@scale=1", "ce:1@scale=2"], "rank"].tolist() == ["3 of 3", "1 of 3"]
    tested = rows.loc[["ce:1@scale=1", "ce:1@scale=2"]]
    assert tested["q_value"].tolist() == pytest.approx(q_values(tested["p_value"]).tolist()), "strengths are tests too"
    table = compared_summary(answers_of(em), chosen[:1], chosen[1:], ["em"], mode="scale:1,2")
    assert table["intervention"].tolist() == ["none", "ce:1@scale=1", "ce:1@scale=2"]
    assert table["below_random"].tolist()[1:] == [0, 1]


def test_a_saved_intervention_is_a_row_of_its_own_beside_the_same_on_random_experts(olmoe):
    examples = own_answers(olmoe, ["the cat sat", "a dog slept", "Answer: the capital"], max_new_tokens=4)
    own = Scale(ExpertSet.of({layer: range(3) for layer in range(3)}), 1.6, positions="last", steps="prefill")
    vector = AddVector(1, torch.ones(olmoe.module.config.hidden_size))
    found = mask(olmoe, examples, [HALF], saved={"mine": own, "vector": vector}, controls=4, **SHORT)
    with olmoe.intervene(own):
        by_hand = answer_table(olmoe, examples, progress=False, **SHORT)
    row = found.rows.set_index("intervention").loc["mine"]
    assert row[["family", "experts", "mode", "em"]].tolist() == [
        "saved",
        str(own.experts),
        "scale",
        by_hand["em"].mean(),
    ]
    drawn = random_controls([Choice("mine", "saved", own.experts)], 4, n_experts=8, seed=0)
    twins = []
    for one in drawn:
        with olmoe.intervene(Scale(one.experts, 1.6, positions="last", steps="prefill")):
            twins.append(answer_table(olmoe, examples, progress=False, **SHORT)["em"].mean())
    assert row["below_random"] == pytest.approx(np.mean(twins) - row["em"])
    assert 0 < np.mean([row["em"], *twins]) < 1, "nothing is tested where no answer changes, or all do"
    assert row["rank"].endswith("of 5")
    of_twins = [name for name in found.answers["intervention"].unique() if name.startswith("mine on random:3#")]
    assert len(of_twins) == 4
    assert pd.isna(found.rows.set_index("intervention").loc["vector", "below_random"]), "it is on no experts"
    with pytest.raises(MoELensError, match="'half' has the name of another run; rename its folder"):
        mask(olmoe, EXAMPLES, [HALF], saved={"half": own}, **SHORT)


def test_several_tasks_are_one_table_by_their_names(olmoe):
    one, two = (mask(olmoe, EXAMPLES[:n], [HALF], controls=0, **SHORT) for n in (1, 2))
    both = joined({"first": one, "second": two})
    assert both.rows["task"].tolist() == ["first"] * 2 + ["second"] * 2
    assert both.rows["n"].tolist() == [1, 1, 2, 2]
    assert both.answers.groupby("task", sort=False).size().tolist() == [2, 4]


def test_every_shape_is_compared_with_its_own_controls(olmoe):
    chosen = [HALF, literal("0:1;1:2;2:3"), literal("0:5;1:6;2:7"), literal("1:0,1,2")]
    found = mask(olmoe, EXAMPLES, chosen, controls=3, **SHORT)
    rows = found.rows.set_index("intervention")
    groups = {"half": "random:4", chosen[1].name: "random:1", chosen[2].name: "random:1", chosen[3].name: "random:3"}
    assert set(rows[rows["family"] == "random mean"].index) == set(groups.values())
    for name, control in groups.items():
        members = rows[rows.index.str.startswith(f"{control}#")]
        assert len(members) == 3
        shape = [len(ids) for _, ids in ExpertSet.parse(rows.loc[name, "experts"]).members]
        for experts in members["experts"]:
            assert [len(ids) for _, ids in ExpertSet.parse(experts).members] == shape
        assert rows.loc[name, "rank"] == f"{1 + (members['em'] <= rows.loc[name, 'em']).sum()} of 4"
        assert rows.loc[control, "em"] == pytest.approx(members["em"].mean())
    alone = mask(olmoe, EXAMPLES, chosen, controls=0, **SHORT).rows
    assert list(alone["intervention"]) == ["none", *groups]
    assert "rank" not in alone


def test_finished_parts_are_kept_and_those_of_another_model_or_mode_are_not_taken_over(olmoe, tmp_path, monkeypatch):
    def again(made_by: dict, mode: str = "zero") -> pd.DataFrame:
        return mask(olmoe, EXAMPLES, [HALF], mode, controls=0, out=tmp_path, made_by=made_by, **in_one_part).answers

    in_one_part = SHORT | {"batch_size": len(EXAMPLES)}
    answers = again({"model": "m"})
    computed = []
    said = answers["prediction"].tolist()[:3]
    monkeypatch.setattr(olmoe, "generate", lambda *args, **kwargs: computed.append(1) or said)
    assert again({"model": "m", "command": ["other"]}).equals(answers)
    assert not computed, "finished work was done again"
    again({"model": "another"})
    assert len(computed) == 2, "another model's answers were taken over"
    again({"model": "another"}, "renormalize")
    assert len(computed) == 4, "another mode's answers were taken over"


def test_what_was_found_is_written_with_its_provenance(olmoe, tmp_path):
    found = mask(olmoe, [EXAMPLES[1]], [HALF], controls=1, **SHORT)  # of which nobody knows a memory
    files = write_masked(found, tmp_path, {"model": "m"})
    assert files == ["answers.parquet", "masking.parquet", "summary.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    pd.testing.assert_frame_equal(read_table(tmp_path / "answers.parquet"), found.answers)
    assert read_provenance(tmp_path / "masking.parquet") == {"model": "m"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["provenance"] == {"model": "m"}
    assert [row["intervention"] for row in summary["rows"]] == ["none", "half", "random:4#0", "random:4"]
    assert summary["rows"][0]["memory"] is None
    assert summary["rows"][0]["em_drop"] is None


def test_a_mask_the_model_cannot_spare_is_refused_before_anything_is_computed(olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(olmoe, "generate", None)
    most = [HALF, Choice("most", "chosen", ExpertSet.of({0: range(6)}))]
    with pytest.raises(MoELensError, match="fewer than the 3"):
        mask(olmoe, EXAMPLES, most, "reroute", controls=0, out=tmp_path)
    with pytest.raises(MoELensError, match="experts 0 to 7"):
        mask(olmoe, EXAMPLES, [HALF, literal("0:8")], controls=0, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_set_is_no_control_of_itself():
    [first, *_] = random_controls([literal("0:0,1")], 1, n_experts=8, seed=0)
    controls = random_controls([Choice("own", "own", first.experts)], 3, n_experts=8, seed=0)
    assert [choice.name for choice in controls] == [f"random:2#{number}" for number in range(3)]
    assert first.experts not in {choice.experts for choice in controls}


def test_controls_of_neighbouring_seeds_and_of_other_shapes_are_drawn_independently():
    """Of 64^6 sets none comes twice by chance, and a set of more layers repeats none in those that it shares."""
    layers = ";".join(f"{layer}:1" for layer in range(6))
    shapes = [literal(layers), literal(f"{layers};6:1")]
    drawn = [c.experts for seed in range(4) for c in random_controls(shapes, 100, n_experts=64, seed=seed)]
    shared = [experts.restrict(range(6)) for experts in drawn]
    assert len(set(shared)) == len(shared) == 800


def test_controls_are_all_different_and_where_a_shape_has_not_so_many_it_is_told():
    with pytest.warns(UserWarning, match=r"random:2: expected 20 random sets, but found only 5 .* no lower than 1/6"):
        controls = random_controls([literal("0:0,1")], 20, n_experts=4, seed=0)
    assert len({choice.experts for choice in controls}) == len(controls) == 5


def test_where_a_shape_has_one_set_only_there_is_no_control_which_is_told():
    everything = Choice("all", "chosen", ExpertSet.of({0: range(4)}))
    with pytest.warns(UserWarning, match="found only 0"):
        assert random_controls([everything], 2, n_experts=4, seed=0) == []


@pytest.mark.parametrize("given", ["ce:4", [ExpertSet.of({1: [2]})], [Zero(ExpertSet.of({1: [2]}))], None])
def test_what_is_no_choice_is_refused(given, olmoe):
    with pytest.raises(MoELensError, match="expected choices of experts, as choices"):
        mask(olmoe, EXAMPLES, given, controls=0)


def test_a_choice_that_is_there_twice_counts_once(olmoe):
    one, other = (Choice(f"set {layer}", "chosen", ExpertSet.of({layer: [2]})) for layer in (0, 1))
    once = mask(olmoe, EXAMPLES, [one, other], controls=1, max_new_tokens=2)
    again = mask(olmoe, EXAMPLES, [one, other, one, one], controls=1, max_new_tokens=2)
    pd.testing.assert_frame_equal(once.rows, again.rows)
