"""Saved interventions: equal when they are loaded, in every kind; damage, others' classes and runs are told."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import most_used

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import (
    AddVector,
    Bias,
    Force,
    Intervention,
    LogitBias,
    Patch,
    ProjectOut,
    Renormalize,
    Replay,
    Reroute,
    RouteAs,
    Rows,
    Run,
    Scale,
    SetTo,
    Steer,
    TopK,
    Zero,
    load_intervention,
)
from moe_lens.lens.interventions import KINDS

TEXTS = ["the cat sat on the mat", "a dog slept"]
E = ExpertSet.of({1: [2, 5], 2: [0]})
VECTOR = torch.linspace(-1, 1, 32)
SEVERAL = [
    Zero(E, positions="from_question", steps=(0, 2)),
    Renormalize(E, layers=[1]),
    Reroute(E),
    Scale(E, 1 / 3),
    Bias(E, 2.0, sd={1: 0.1, 2: 0.7}, weights="unbiased"),
    Force(E, "sum", steps="decode"),
    LogitBias({2: torch.arange(8.0), 0: -torch.ones(8)}, "unbiased", steps=(1,)),
    TopK(2, layers=[0]),
    Steer(E, epsilon=0.5),
    AddVector(1, VECTOR.double(), 1e-3, what="moe_output"),
    ProjectOut(torch.eye(3, 32), positions=(-1, 0)),
    SetTo({1: VECTOR, 0: VECTOR.bfloat16()}),
    RouteAs({"model.layers.1.mlp.gate.weight": torch.eye(8, 32)}, layers=[1], positions="last"),
    Rows((Zero(E), None, AddVector(2, VECTOR))),
]


@pytest.mark.parametrize("own", SEVERAL, ids=lambda own: type(own).__name__)
def test_what_is_loaded_is_what_was_saved(tmp_path, own):
    own.save(tmp_path / "own", made_by={"model": "tiny"})
    found = load_intervention(tmp_path / "own")
    assert type(found) is type(own)
    assert found == own
    assert json.loads((tmp_path / "own" / "intervention.json").read_text())["made_by"] == {"model": "tiny"}


def test_every_kind_that_can_be_saved_is_tested():
    assert {type(own).__name__ for own in SEVERAL} == set(KINDS)


def test_a_loaded_one_does_the_same(olmoe, tmp_path):
    own = Bias(most_used(olmoe, TEXTS, size=2), 1.5, positions="last")
    own.save(tmp_path)
    with olmoe.intervene(own):
        expected, _ = olmoe.run_with_cache(TEXTS)
    with olmoe.intervene(load_intervention(tmp_path)):
        assert torch.equal(olmoe.run_with_cache(TEXTS)[0], expected)
    assert not torch.equal(olmoe.run_with_cache(TEXTS)[0], expected)


def test_the_same_is_saved_as_the_same_bytes(tmp_path):
    for name in "ab":
        AddVector(1, VECTOR).save(tmp_path / name, made_by={})
    for file in ("intervention.json", "intervention.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("intervention.json", b"moe_output", b"residual"),
        ("intervention.json", b"0.001", b"0.002"),
        ("intervention.safetensors", None, None),
        ("intervention.json", b'"AddVector"', b'"os.system"'),
        ("intervention.json", b"{", b""),
    ],
)
def test_damage_is_told(tmp_path, file, old, new):
    AddVector(1, VECTOR, 1e-3, what="moe_output").save(tmp_path)
    path = tmp_path / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if old is None else content.replace(old, new, 1))
    with pytest.raises(MoELensError, match=r"is damaged|no intervention 'os\.system'|expected a saved intervention"):
        load_intervention(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, f'{{"intervention": {"9" * 5_000}}}', "[1]"], ids=["deep", "long", "list"]
)
def test_json_of_something_else_is_told(tmp_path, content):
    (tmp_path / "intervention.json").write_text(content)
    with pytest.raises(MoELensError, match="expected a saved intervention"):
        load_intervention(tmp_path)


def test_a_folder_without_one_is_told(tmp_path):
    with pytest.raises(MoELensError, match=r"expected a saved intervention, a folder with intervention\.json"):
        load_intervention(tmp_path)


@dataclass(frozen=True, eq=False, repr=False)
class Mine(Intervention):
    """A user's own."""

    factor: float = 2.0


def test_ones_own_class_is_refused_by_name_also_in_rows(tmp_path):
    for own in (Mine(), Rows((Mine(), None))):
        with pytest.raises(MoELensError, match=r"only interventions of this package .* got .*\.Mine: keep its code"):
            own.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [Patch, Replay])
def test_values_of_a_run_are_not_saved_and_what_to_do_is_said(olmoe, tmp_path, kind):
    own = kind(Run(olmoe, [Example("0", "", "a dog", ("a",))]))
    with pytest.raises(MoELensError, match=r"a run of a lens cannot be saved.*SetTo\(mean_values"):
        own.save(tmp_path)
