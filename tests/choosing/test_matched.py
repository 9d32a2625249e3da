"""Random sets matched by usage: as large in each layer, about as much used, different, and told with both usages."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from moe_lens import Example, ExpertSet, ExpertUsage, MoELensError
from moe_lens.choosing import Choice, Controls, mask, matched_controls
from moe_lens.choosing.controls import against_random
from moe_lens.lens.interventions import parse_mode

USAGE = [0.3, 0.25, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02]
EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",), "the mat"),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
]


def usage_of(layers: dict[int, list[float]]) -> pd.DataFrame:
    rows = [(layer, expert, score) for layer, scores in layers.items() for expert, score in enumerate(scores)]
    return pd.DataFrame(rows, columns=["layer", "expert", "score"])


def choice(experts: dict[int, list[int]], name: str = "mine") -> Choice:
    return Choice(name, "chosen", ExpertSet.of(experts))


def used(scores: list[float], ids) -> float:
    return sum(scores[expert] for expert in ids)


@pytest.mark.parametrize("own", [[0, 1], [0, 7], [3, 5], [6, 7]])
def test_each_set_is_among_those_whose_usage_is_nearest_of_all_there_are(own):
    """Of the 27 other pairs of a made layer, told by trying all: the 8 nearest are drawn."""
    controls = matched_controls([choice({4: own})], 8, usage=usage_of({4: USAGE}), seed=0)
    target = used(USAGE, own)
    others = [pair for pair in combinations(range(8), 2) if list(pair) != own]
    distances = sorted(abs(used(USAGE, pair) - target) for pair in others)
    found = [abs(used(USAGE, one.experts[4]) - target) for one in controls]
    assert len({one.experts for one in controls}) == 8
    assert sorted(found) == pytest.approx(distances[:8])


def test_usage_is_matched_in_each_layer_also_where_there_are_many_experts():
    rng = np.random.default_rng(0)
    layers = {layer: rng.dirichlet(np.full(64, 0.3)).tolist() for layer in (0, 2)}
    most = {layer: sorted(np.argsort(scores)[-9:-1].tolist()) for layer, scores in layers.items()}
    controls = matched_controls([choice(most)], 20, usage=usage_of(layers), seed=1)
    assert len({one.experts for one in controls}) == 20
    assert [one.name for one in controls] == [f"matched to mine#{number}" for number in range(20)]
    assert {one.family for one in controls} == {"random"}
    for one in controls:
        for layer, scores in layers.items():
            assert len(one.experts[layer]) == 8
            assert used(scores, one.experts[layer]) == pytest.approx(used(scores, most[layer]), abs=0.01)
    spread = [used(layers[0], rng.choice(64, 8, replace=False)) for _ in range(20)]
    assert max(spread) < 0.8 * used(layers[0], most[0]), "any sets would do"
    others = {one.experts[0] for one in controls}
    assert len(others) > 5, "hardly drawn"


def test_the_same_seed_draws_the_same_sets_another_one_others_and_none_is_a_choice():
    usage = usage_of({0: USAGE, 1: USAGE[::-1]})
    chosen = [choice({0: [0, 3], 1: [1, 2]}), choice({0: [1, 4], 1: [0, 5]}, "other")]
    first = matched_controls(chosen, 5, usage=usage, seed=0)
    assert first == matched_controls(chosen, 5, usage=usage, seed=0)
    assert first != matched_controls(chosen, 5, usage=usage, seed=1)
    assert first[:5] == matched_controls(chosen[:1], 5, usage=usage, seed=0), "of one set, whatever else is compared"
    assert not {one.experts for one in first} & {one.experts for one in chosen}


def test_where_there_are_few_sets_all_are_taken_and_where_there_is_none_it_is_refused():
    with pytest.warns(UserWarning, match=r"matched to mine: expected 20 random sets, but found only 5 .* than 1/6"):
        few = matched_controls([choice({0: [0, 1]})], 20, usage=usage_of({0: USAGE[:4]}), seed=0)
    assert len({one.experts for one in few}) == 5
    with pytest.raises(MoELensError, match="no other set is as large as mine in each layer: all experts"):
        matched_controls([choice({0: [0, 1, 2, 3]})], 20, usage=usage_of({0: USAGE[:4]}), seed=0)
    whole_layer = {0: [0, 1, 2, 3], 1: [2]}
    kept = matched_controls([choice(whole_layer)], 2, usage=usage_of({0: USAGE[:4], 1: USAGE[:4]}), seed=0)
    assert all(one.experts[0] == (0, 1, 2, 3) and one.experts[1] != (2,) for one in kept)


def test_each_set_is_compared_with_its_own_and_the_table_tells_both_usages():
    usage = usage_of({0: USAGE, 1: USAGE})
    chosen = [choice({0: [0], 1: [7]}), choice({0: [5], 1: [5]}, "other")]
    controls = matched_controls(chosen, 3, usage=usage, seed=0)
    scores = {"mine": [0, 0]} | {one.name: [1, 0] if " mine" in one.name else [0, 0] for one in controls}
    scores |= {"other": [0, 0], "none": [1, 1]}
    rows = [(name, value) for name, values in scores.items() for value in values]
    answers = pd.DataFrame(rows, columns=["intervention", "em"]).astype({"em": float})
    found = against_random(answers, chosen, controls, "em", usage=usage).set_index("intervention")
    assert found["control"].tolist() == ["matched to mine", "matched to other"]
    assert found["below_random"].tolist() == [0.5, 0]
    assert found["usage"].tolist() == pytest.approx([(0.3 + 0.02) / 2, 0.04])
    theirs = [np.mean([USAGE[one.experts[layer][0]] for layer in (0, 1)]) for one in controls]
    assert found["control_usage"].tolist() == pytest.approx([np.mean(theirs[:3]), np.mean(theirs[3:])])


def test_a_masking_run_measures_usage_where_its_mode_acts(olmoe):
    mode = parse_mode("zero", positions="question")
    [usage] = olmoe.measure(EXAMPLES, ExpertUsage(positions="question"), progress=False)
    chosen = [Choice("top", "top", ExpertSet.top(usage.table(), 2))]
    found = mask(olmoe, EXAMPLES, chosen, mode, controls=Controls(3, matched=True), max_new_tokens=2)
    row = found.rows.set_index("intervention").loc["top"]
    by_expert = usage.table().set_index(["layer", "expert"])["score"]
    share = np.mean([by_expert[layer][list(ids)].sum() for layer, ids in chosen[0].experts.members])
    assert row["usage"] == pytest.approx(share)
    assert row["control"] == "matched to top"
    assert row["usage"] > row["control_usage"] > 0.6 * row["usage"]
    own = found.rows[found.rows["family"] == "random"]
    assert own["set"].tolist() == [f"matched to top#{number}" for number in range(3)]
    again = mask(olmoe, EXAMPLES, chosen, mode, controls=Controls(3, True, usage.table()), max_new_tokens=2)
    pd.testing.assert_frame_equal(again.rows, found.rows)


@pytest.mark.parametrize("wrong", ["matched", "matched:0", "usage:3", "matched:x", "random:-1", "5"])
def test_what_names_no_controls_is_refused(wrong):
    with pytest.raises(MoELensError, match=r"--control must be random:N or matched:N with N from 1"):
        Controls.parse(wrong)


def test_controls_say_for_the_provenance_what_they_are():
    assert [Controls.parse(text).told for text in ("none", "random:20", "matched:5")] == [0, 20, "matched:5"]
    with pytest.raises(MoELensError, match="which is not measured"):
        Controls.parse("matched:5").drawn([choice({0: [1]})], n_experts=8, seed=0)
