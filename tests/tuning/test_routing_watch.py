"""What training notes of the routers, and the boards that show its log."""

import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pandas as pd
import pytest
from training_cases import EXAMPLES, SCHEDULE, fresh

from moe_lens import MoELensError
from moe_lens.metrics import router_saturation
from moe_lens.statistics import RouterLoad, SelectedExperts
from moe_lens.tuning import TuneBias, TuneRouters, tune
from moe_lens.tuning.board import expect_boards, following, tensorboard, wandb

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


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "board"), ("wandb", "wandb")])
def test_without_its_package_a_board_is_refused_with_what_to_install(name, extra):
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(MoELensError, match=rf"needs the package {name}; .*moe_lens\[{extra}\]"):
        expect_boards([name])


def test_boards_are_given_the_numbers_of_each_step_from_the_first_on_and_ended_with_the_run():
    told = []

    @contextmanager
    def board(name, first):
        told.append((name, first))
        yield lambda numbers, step: told.append((step, numbers))
        told.append("ended")

    with following([board], "rate-1") as follow:
        assert told == [], "nothing is opened that gets no row"
        follow({"step": 3, "loss": 0.5})
        follow({"step": 4, "loss": 0.25, "routing": {"layer": [0, 1], "drift": [0.5, 1.0], "unused": [1.0, 2.0]}})
    second = {"loss": 0.25, "routing/drift": 0.75, "routing/unused": 3.0}
    assert told == [("rate-1", 3), (3, {"loss": 0.5}), (4, second), "ended"]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_reads_what_was_logged(tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = [partial(tensorboard, tmp_path)]
    tuned = tune(fresh(tokenizer), EXAMPLES, DEV, TuneRouters(), SCHEDULE, boards=boards, **QUICK)
    [folder] = tmp_path.rglob("rate-*")
    found = EventAccumulator(str(folder)).Reload()
    losses = found.Scalars("loss")
    assert [one.step for one in losses] == tuned.log["step"].tolist()
    assert [one.value for one in losses] == pytest.approx(tuned.log["loss"].tolist(), rel=1e-5)
    drift = tuned.routing[tuned.routing["step"] > 0].groupby("step")["drift"].mean()
    assert [one.value for one in found.Scalars("routing/drift")] == pytest.approx(drift.tolist(), rel=1e-5)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_what_was_logged(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    boards = [partial(wandb, tmp_path)]
    tuned = tune(fresh(tokenizer), EXAMPLES, DEV, TuneRouters(), SCHEDULE, boards=boards, **QUICK)
    [kept] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    steps = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in history(kept)]
    assert [row["_step"] for row in steps] == tuned.log["step"].tolist()
    assert [row["loss"] for row in steps] == pytest.approx(tuned.log["loss"].tolist())
    drift = tuned.routing[tuned.routing["step"] > 0].groupby("step")["drift"].mean()
    assert [row["routing/drift"] for row in steps if "routing/drift" in row] == pytest.approx(drift.tolist())


def history(path):
    """The items of each step in wandb's file: after 7 bytes a log of records, in blocks as LevelDB has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        if (left := 32768 - place % 32768) < 7:  # filled up, since no head of a record fits in
            place += left
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        parts += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                yield record.history.item
