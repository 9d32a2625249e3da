"""Screened sweeps: the experts with the highest attribution are measured exactly, and what is missed is estimated."""

import numpy as np
import pandas as pd
import pytest
from conftest import build_model
from test_sweep import EXAMPLES

from moe_lens import MoELens, MoELensError
from moe_lens.causal import attribution, screened_effects, single_expert_effects
from moe_lens.causal.attributing import Attribution
from moe_lens.causal.screening import recall, recall_interval


def table(effects: list[float], chosen: list[bool]) -> pd.DataFrame:
    return pd.DataFrame({"effect": effects, "chosen": chosen})


def test_recall_is_one_where_no_other_is_strong_and_falls_by_what_a_strong_one_stands_for():
    weak = table([9.0, 8.0, 7.0, 1.0, 0.5], [True, True, True, False, False])
    assert recall(weak, 16) == 1  # the strongest 2 of 16 are chosen
    strong = table([9.0, 1.0, 1.0, 8.0, 0.5], [True, True, True, False, False])
    assert recall(strong, 16) == 0.5  # the 2nd stands for 13 / 2 others
    assert recall(table([9.0, 8.0, 1.0, 9.5], [True, True, True, False]), 4) == 0  # the strongest was not chosen


def test_the_recall_of_everything_is_certain_and_a_small_sample_leaves_much_open():
    every = table([9.0, 8.0, 7.0, 1.0], [True, True, False, False])
    assert recall_interval(every, 4) == (1.0, 1.0)  # all four are measured
    assert recall_interval(table([9.0, 8.0, 0.1], [True, True, False]), 40) == (0.0, 0.4)  # 2 of 5 at the best
    many = table([float(one) for one in range(40, 0, -1)], [True] * 10 + [False] * 30)
    assert recall_interval(many, 48) == (pytest.approx(4 / 6), 1.0)  # of 38 others none of 30: at most 2, exactly


def test_the_interval_of_recall_holds_the_truth_as_often_as_it_says():
    """Over many draws of the sample; the truth is known since every expert's effect is."""
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        effects = rng.normal(size=96)
        guess = effects + rng.normal(size=96) * 0.8
        chosen = guess >= np.sort(guess)[-24]
        truth = chosen[np.argsort(-effects)[:12]].mean()
        asked = np.concatenate([np.flatnonzero(chosen), rng.permutation(np.flatnonzero(~chosen))[:24]])
        low, high = recall_interval(table(effects[asked].tolist(), chosen[asked].tolist()), 96)
        held.append(low <= truth <= high)
    assert np.mean(held) >= 0.95


def test_screened_experts_are_the_highest_attributed_with_exact_effects(tokenizer):
    module = build_model("olmoe", len(tokenizer), num_hidden_layers=2)
    lens = MoELens(module, tokenizer, progress=False)
    found = screened_effects(lens, EXAMPLES, share=0.25, sample=3, seed=1)
    assert (found.n_experts, len(found.effects), int(found.effects["chosen"].sum())) == (16, 7, 4)
    [scores] = attribution(lens, EXAMPLES, Attribution(target="answer"))
    best = scores.nlargest(4, "score")[["layer", "expert"]]
    chosen = found.effects[found.effects["chosen"]]
    assert set(zip(chosen["layer"], chosen["expert"], strict=True)) == set(best.itertuples(index=False, name=None))
    exact = single_expert_effects(lens, EXAMPLES).set_index(["layer", "expert"])["effect"]
    measured = found.effects.set_index(["layer", "expert"])["effect"]
    assert measured.tolist() == pytest.approx(exact.loc[measured.index].tolist(), abs=1e-5)
    assert "4 of 16 experts" in str(found)
    assert found.recall_low <= found.recall <= found.recall_high
    assert f"[{found.recall_low:.0%}, {found.recall_high:.0%}]" in str(found)
    whole = screened_effects(lens, EXAMPLES, share=1.0)
    assert whole.effects["chosen"].sum() == whole.n_experts == 16
    assert (whole.recall_low, whole.recall, whole.recall_high) == (1, 1, 1)


@pytest.mark.parametrize("wrong", [{"mode": "bias:2"}, {"metric": "em"}, {"share": 0.0}, {"sample": 0}], ids=str)
def test_what_attribution_cannot_rank_is_refused(olmoe, wrong):
    with pytest.raises(MoELensError, match=r"take single_expert_effects|expected a share"):
        screened_effects(olmoe, EXAMPLES, **wrong)
