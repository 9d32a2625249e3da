"""The choice of experts to train: scores of the base and of the router-tuned model, which leave the lens as it was."""

import pytest
import torch
from moe_lens.choosing.tuned_scores import expert_scores, with_delta
from test_methods import TEXTS
from test_selection import to_train
from training_cases import EXAMPLES, fresh

from moe_lens import ExpertSet
from moe_lens.choosing.scores import SCORES
from moe_lens.statistics import ExpertUsage
from moe_lens.tuning import TuneRouters, save_trained


@pytest.fixture
def routers(tokenizer, tmp_path):
    """A delta of routers with other weights than the base's, and the lens that has them."""
    lens = fresh(tokenizer)
    with TuneRouters().attached(lens) as trained, torch.no_grad():
        for name in trained.names:
            lens.module.get_parameter(name).neg_()
    save_trained(lens.module, trained, tmp_path, facts={"method": "router"})
    return tmp_path, lens


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
    assert to_train("ce:2", table=tables["ce"]) == ExpertSet.top(ratio.table(), 2) != ExpertSet.top(count.table(), 2)
    assert to_train("esft-token:p=0.4", table=tables["esft-token"]) == ExpertSet.cumulative(count.table(), 0.4)
    gain = ratio.table()["score"] - base.table()["score"]
    assert tables["ce-gain"]["score"].to_numpy() == pytest.approx(gain.to_numpy(), abs=1e-6)
    assert torch.equal(lens.run_with_cache(TEXTS)[0], before)


def test_a_score_of_the_base_never_asks_for_tuned_routers(tokenizer):
    def tuned():
        raise AssertionError("routers were asked for")

    table = expert_scores(SCORES["esft-token"], fresh(tokenizer), EXAMPLES, tuned)
    assert table.groupby("layer")["score"].sum().to_numpy() == pytest.approx([1, 1, 1], rel=1e-5)
