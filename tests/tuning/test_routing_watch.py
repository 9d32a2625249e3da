"""What training notes of the routers, and its log for TensorBoard."""

from dataclasses import replace
from importlib.util import find_spec

import pandas as pd
import pytest
from training_cases import EXAMPLES, SCHEDULE, fresh

from moe_lens import MoELensError
from moe_lens.metrics import router_saturation
from moe_lens.statistics import RouterLoad, SelectedExperts
from moe_lens.tuning import TuneBias, TuneRouters, tune
from moe_lens.tuning.board import Board, expect_board

DEV = EXAMPLES[:4]
QUICK = {"score": "log_likelihood", "max_new_tokens": 2}


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A lens whose routers were tuned, measured twice, what is known of it, and its folder."""
    lens, out = fresh(tokenizer), tmp_path_factory.mktemp("trained") / "out"
    return lens, tune(lens, EXAMPLES, DEV, TuneRouters(), SCHEDULE, out=out, **QUICK), out


def test_load_and_drift_are_noted_whenever_the_dev_data_are_measured(trained, tokenizer):
    lens, tuned, _ = trained
    measured = tuned.log.dropna(subset=["dev_log_likelihood"])["step"].tolist()
    table = tuned.routing
    assert sorted(table["step"].unique()) == [0, *measured]
    assert table[table["step"] == 0]["drift"].eq(0).all()
    assert "routing" not in tuned.log
    best = tuned.log.loc[tuned.log["dev_log_likelihood"].idxmax(), "step"]
    now = table[table["step"] == best].set_index("layer")
    examples = [replace(one, id=str(n)) for n, one in enumerate(DEV)]
    load, chosen = lens.measure(examples, RouterLoad(), SelectedExperts(), progress=False)
    [before] = fresh(tokenizer).measure(examples, SelectedExperts(), progress=False)
    shared = router_saturation(before.table(), chosen.table(), n_experts=8, resamples=10).set_index("layer")
    for layer, row in load.table().set_index("layer").iterrows():
        assert now.loc[layer, "drift"] == pytest.approx(1 - shared.loc[layer, "saturation"])
        for name in ("entropy", "load_entropy", "max_load", "unused"):
            assert now.loc[layer, name] == pytest.approx(row[name])
    assert now["drift"].max() > 0


def test_a_run_that_is_read_again_tells_the_same_course(trained, tokenizer):
    _, tuned, out = trained
    again = tune(fresh(tokenizer), EXAMPLES, DEV, TuneRouters(), SCHEDULE, out=out, **QUICK)
    pd.testing.assert_frame_equal(again.routing, tuned.routing)
    assert again.log.equals(tuned.log)


def test_what_a_method_adds_is_in_force_while_routing_is_noted(tokenizer):
    schedule = replace(SCHEDULE, learning_rate=1.0, epochs=1)
    tuned = tune(fresh(tokenizer), EXAMPLES, DEV, TuneBias(), schedule, **QUICK)
    last = tuned.routing[tuned.routing["step"] == tuned.routing["step"].max()]
    assert last["drift"].max() > 0.05


def test_without_dev_data_nothing_is_noted(tokenizer):
    tuned = tune(fresh(tokenizer), EXAMPLES[:3], [], TuneRouters(), replace(SCHEDULE, epochs=1))
    assert tuned.routing.empty
    assert {"step", "layer", "drift"} <= set(tuned.routing)


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_without_tensorboard_its_log_is_refused_with_what_to_install(tmp_path):
    for ask in (expect_board, lambda: Board(tmp_path)):
        with pytest.raises(MoELensError, match=r"needs the package tensorboard; .*moe_lens\[board\]"):
            ask()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_reads_what_was_logged(tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tuned = tune(fresh(tokenizer), EXAMPLES, DEV, TuneRouters(), SCHEDULE, board=tmp_path, **QUICK)
    [folder] = tmp_path.rglob("rate-*")
    found = EventAccumulator(str(folder)).Reload()
    losses = found.Scalars("loss")
    assert [one.step for one in losses] == tuned.log["step"].tolist()
    assert [one.value for one in losses] == pytest.approx(tuned.log["loss"].tolist(), rel=1e-5)
    drift = tuned.routing[tuned.routing["step"] > 0].groupby("step")["drift"].mean()
    assert [one.value for one in found.Scalars("routing/drift")] == pytest.approx(drift.tolist(), rel=1e-5)
    unused = tuned.routing[tuned.routing["step"] > 0].groupby("step")["unused"].sum()
    assert [one.value for one in found.Scalars("routing/unused")] == unused.tolist()
