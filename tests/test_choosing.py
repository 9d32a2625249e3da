"""The choice of experts to train: scores of the base and of the router-tuned model, which leave the lens as it was."""

import pytest
import torch
from test_methods import TEXTS
from training_cases import EXAMPLES, fresh

from moe_lens import ExpertSet, MoELensError
from moe_lens.scores import SCORES
from moe_lens.statistics import ExpertUsage
from moe_lens.tuning import TuneRouters, save_trained
from moe_lens.tuning.choosing import check_experts, choose_experts, expert_scores, score_of, with_delta


@pytest.fixture
def routers(tokenizer, tmp_path):
    """A delta of routers with other weights than the base's, and the lens that has them."""
    lens = fresh(tokenizer)
    with TuneRouters().attached(lens) as trained, torch.no_grad():
        for name in trained.names:
            lens.module.get_parameter(name).neg_()
    save_trained(lens.module, trained, tmp_path, facts={"method": "router"})
    return tmp_path, lens


def choose(specification: str, **given) -> ExpertSet:
    rest = {"table": None, "planted": ExpertSet, "layers": (0, 1, 2), "n_experts": 8, "seed": 0}
    return choose_experts(specification, **(rest | given))


def test_ceft_ranks_by_the_tuned_model_and_esft_by_the_base_which_is_left_alone(tokenizer, routers):
    folder, tuned = routers
    lens = fresh(tokenizer)
    before, _ = lens.run_with_cache(TEXTS)
    [ratio] = tuned.measure(EXAMPLES, ExpertUsage(), progress=False)
    [base] = lens.measure(EXAMPLES, ExpertUsage(), progress=False)
    [count] = lens.measure(EXAMPLES, ExpertUsage("token"), progress=False)
    tables = {
        name: expert_scores(SCORES[name], lens, EXAMPLES, lambda: with_delta(lens, folder))
        for name in ("ce", "ce-gain", "esft-token")
    }
    assert choose("ce:2", table=tables["ce"]) == ExpertSet.top(ratio.table(), 2) != ExpertSet.top(count.table(), 2)
    assert choose("esft-token:p=0.4", table=tables["esft-token"]) == ExpertSet.cumulative(count.table(), 0.4)
    gain = ratio.table()["score"] - base.table()["score"]
    assert tables["ce-gain"]["score"].to_numpy() == pytest.approx(gain.to_numpy(), abs=1e-6)
    assert torch.equal(lens.run_with_cache(TEXTS)[0], before)


def test_a_score_of_the_base_never_asks_for_tuned_routers(tokenizer):
    def tuned():
        raise AssertionError("routers were asked for")

    table = expert_scores(SCORES["esft-token"], fresh(tokenizer), EXAMPLES, tuned)
    assert table.groupby("layer")["score"].sum().to_numpy() == pytest.approx([1, 1, 1], rel=1e-5)
    assert [score_of(text) for text in ("esft-gate:2", "random:2", "0:1")] == [SCORES["esft-gate"], None, None]


def test_what_is_chosen_stays_within_the_layers_asked_for(routers):
    assert choose("0:1,5;2:7", layers=(0,)) == ExpertSet.of({0: [1, 5]})
    assert choose("planted", planted=lambda: ExpertSet.of({0: [1], 1: [2]}), layers=(1, 2)) == ExpertSet.of({1: [2]})
    drawn = choose("random:3", layers=(1, 2), seed=4)
    assert (drawn.layers, {len(drawn[layer]) for layer in drawn.layers}) == ((1, 2), {3})
    assert drawn == choose("random:3", layers=(1, 2), seed=4) != choose("random:3", layers=(1, 2), seed=5)
    with pytest.raises(MoELensError, match=r"no expert of '2:7' is in the layers \[0, 1\]"):
        choose("2:7", layers=(0, 1))


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("random:9", "N of the 8 experts"),
        ("random:0", "N of the 8 experts"),
        ("random:", "N of the 8 experts"),
        ("esft-token:p=", "such as esft-token:p=0.2"),
        ("esft-token:p=1.5", "such as esft-token:p=0.2"),
        ("esft-token:p=-1", "such as esft-token:p=0.2"),
        ("ce", "with whole numbers"),
        ("ce:1,2", "as one set; 'ce:1,2' names 2"),
        ("experts", "cannot read the experts"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_counted(specification, message):
    with pytest.raises(MoELensError, match=message):
        check_experts(specification, n_experts=8)
    for fine in ("random:8", "esft-token:p=0.2", "esft-gate:p=1", "ce:8", "planted", "x.json", "0:1"):
        check_experts(fine, n_experts=8)
