"""Everything that the package does gives on one pretend device and on two what it gives on the CPU."""

import warnings

import pandas as pd
import pytest
from device_features import (
    FEATURES,
    OF_SHARED_EXPERTS,
    STATISTICS,
    SURVEYED,
    Outcome,
    differs,
    opened,
    outcome,
    outcomes,
)
from placed_models import placed
from pretend_device import pretend_devices
from remote_models import KINDS, build, remote_folder

import moe_lens.statistics
from moe_lens.architecture.tiny import FAMILIES, tiny_model, tiny_tokenizer
from moe_lens.lens import CAPTURES

#: Each way of routing and of calling experts: softmax, biases and sinks, groups with shared experts, and a router that
#: takes the state of the layer before and may skip its token.
DIFFERENT = ("olmoe", "deepseek_v3", "gpt_oss", "zaya")
#: Done of the first family only, since they take longest or are parts of others.
OF_THE_FIRST = {"tune ceft, checkpointing", "tune lora", "tune fft", "evaluate", "check generate"}
OF_THE_FIRST |= {f"capture {name}" for name in CAPTURES}
#: What of the survey of all families is done on one device, too.
SURVEYED_ON_ONE = ("rows, generate", "ExpertVocabulary", "AttentionMass")


@pytest.fixture(scope="module", autouse=True)
def devices():
    with pretend_devices(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def on_the_cpu():
    """What becomes of features of a family on the CPU, each computed once."""
    known: dict[tuple[str, str], Outcome] = {}
    lenses = {}

    def find(family: str, names) -> dict[str, Outcome]:
        if family not in lenses:
            lenses[family] = opened(tiny_model(family))
        missing = [name for name in names if (family, name) not in known]
        known.update({(family, name): found for name, found in outcomes(missing, lenses[family]).items()})
        return {name: known[family, name] for name in names}

    return find


def wrong(here: dict[str, Outcome], expected: dict[str, Outcome]) -> dict[str, str]:
    return {name: said for name in here if (said := differs(here[name], expected[name]))}


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("olmoe", "two"),
        pytest.param("olmoe", "one", marks=pytest.mark.slow),
        *(pytest.param(family, "two", marks=pytest.mark.slow) for family in DIFFERENT[1:]),
    ],
)
def test_every_feature_gives_on_devices_what_it_gives_on_the_cpu(family, place, on_the_cpu):
    names = [name for name in FEATURES if family == DIFFERENT[0] or name not in OF_THE_FIRST]
    lens, expected = opened(placed(tiny_model(family), place)), on_the_cpu(family, names)
    if family == DIFFERENT[0]:
        assert {name for name, told in expected.items() if told.kind != "done"} == OF_SHARED_EXPERTS, (
            "then nothing is compared"
        )
    assert wrong(outcomes(names, lens), expected) == {}


def test_listed_experts_run_split_over_two_devices(tmp_path):
    folder = remote_folder(tmp_path / "model", tiny_tokenizer(), KINDS["summed"])
    names = ("check capture", "check expert_outputs", "rows, logits", "ExpertVocabulary", "tune ceft")
    here, cpu = opened(placed(build(folder), "two")), opened(build(folder))
    here.module.load_state_dict(cpu.module.state_dict())
    assert wrong(outcomes(names, here), outcomes(names, cpu)) == {}


def test_statistics_take_a_device_without_float64(on_the_cpu):
    expected = on_the_cpu("olmoe", STATISTICS)
    with pretend_devices(float64=False):
        found = outcomes(STATISTICS, opened(placed(tiny_model("olmoe"), "one")))
    assert wrong(found, expected) == {}


def test_every_statistic_is_among_the_features():
    functions = {"average_heads", "weight_similarity", "router_similarity", "save_statistic", "add_saved"}
    functions |= {"expert_groups", "router_affinity"}
    public = set(moe_lens.statistics.__all__) - functions - {"LayerSums"}  # which others are made from
    assert {name.split()[0] for name in STATISTICS} == public


def test_a_wrong_value_a_crash_and_another_refusal_are_told():
    done, refused = Outcome("done", {"a": [1.0, 2.0]}), Outcome("refused", "no head")
    assert differs(done, Outcome("done", {"a": [1.0, 2.0 + 1e-7]})) == ""
    assert differs(done, Outcome("done", {"a": [1.0, 2.1]})) == "/a/1: up to 0.1 apart"
    assert differs(done, Outcome("done", {})) == ": ['a'], not []"
    table = pd.DataFrame({"a": [1.0], "b": [2.0]})
    assert differs(Outcome("done", table), Outcome("done", table[["a"]])) == ": ['a', 'b'], not ['a']"
    assert differs(refused, Outcome("refused", "no head")) == ""
    assert "done" in differs(refused, done)
    assert differs(refused, Outcome("refused", "no router"))
    assert "on the CPU as well" in differs(Outcome("crashed", "x"), Outcome("crashed", "x"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_on_devices_what_it_gives_on_the_cpu(family):
    opening = outcome(lambda: opened(tiny_model(family)))
    for place, names in (("two", SURVEYED), ("one", SURVEYED_ON_ONE)):
        here = outcome(lambda place=place: opened(placed(tiny_model(family), place)))
        if opening.kind == "refused":
            assert here == opening
            continue
        assert here.kind == "done", here.value
        assert wrong(outcomes(names, here.value), outcomes(names, opening.value)) == {}, place
