"""Interventions are told apart by what they hold, whoever wrote them, and by nothing else; thousands quickly."""

import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import MODES, Here, Intervention, Renormalize, Reroute, Rows, Zero
from moe_lens.routing import Routing

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention):
    """One's own, as the protocol asks for it: gating weights of some layers times a factor per expert."""

    factors: Tensor
    acting: tuple[int, ...] = (1,)

    @property
    def layers(self):
        return self.acting

    def __call__(self, here, routing):
        return replace(routing, weights=routing.weights * self.factors[routing.indices])

    def check(self, architecture):
        for layer in self.acting:
            architecture.at(layer)


class Halved(Intervention):
    """A plain class with plain attributes."""

    def __init__(self, layer: int, by: object = 2.0) -> None:
        self.layer, self.by = layer, by

    @property
    def layers(self):
        return (self.layer,)

    def __call__(self, here, routing):
        return replace(routing, weights=routing.weights / self.by)

    def check(self, architecture):
        architecture.at(self.layer)


class Remembering(Intervention):
    """One that works something out when it first acts, and keeps it."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    @cached_property
    def factors(self):
        return torch.ones(8).index_fill(0, torch.tensor([self.layer]), 0)

    @property
    def layers(self):
        return (self.layer,)

    def __call__(self, layer, routing):
        return replace(routing, weights=routing.weights * self.factors[routing.indices])

    def check(self, architecture):
        architecture.at(self.layer)


def equal(first: Intervention, second: Intervention) -> bool:
    """Whether two are equal; by digest, hash, equality and in a set alike."""
    found = {first.digest == second.digest, first == second, hash(first) == hash(second), len({first, second}) == 1}
    assert len(found) == 1, found
    return found.pop()


MAKERS = {
    "zero": lambda: Zero(ExpertSet.of({1: [2, 5], 0: [1]})),
    "renormalize": lambda: Renormalize(ExpertSet.of({1: [2, 5], 0: [1]})),
    "reroute": lambda: Reroute(ExpertSet.of({1: [2, 5], 0: [1]})),
    "another set": lambda: Zero(ExpertSet.of({1: [2, 5], 0: [3]})),
    "the same ids in other layers": lambda: Zero(ExpertSet.of({1: [2], 0: [1, 5]})),
    "rows": lambda: Rows((Zero(ExpertSet.of({1: [2]})), None)),
    "rows in another order": lambda: Rows((None, Zero(ExpertSet.of({1: [2]})))),
    "rows of another kind": lambda: Rows((Reroute(ExpertSet.of({1: [2]})), None)),
    "one row": lambda: Rows((Zero(ExpertSet.of({1: [2]})),)),
    "tensor": lambda: Scale(torch.arange(8.0)),
    "another value": lambda: Scale(torch.arange(8.0) + 1e-3 * (torch.arange(8) == 7)),
    "another dtype": lambda: Scale(torch.arange(8.0).double()),
    "another shape": lambda: Scale(torch.arange(8.0).view(2, 4)),
    "another setting": lambda: Scale(torch.arange(8.0), (2,)),
    "plain": lambda: Halved(1),
    "plain in another layer": lambda: Halved(2),
    "plain by another number": lambda: Halved(1, 2.5),
    "plain by a whole number": lambda: Halved(1, 2),
    "plain by a text": lambda: Halved(1, "2.0"),
    "plain by nothing": lambda: Halved(1, None),
    "plain by a truth": lambda: Halved(1, True),
    "plain by another intervention": lambda: Halved(1, Zero(ExpertSet.of({1: [2, 5], 0: [1]}))),
    "plain by experts": lambda: Halved(1, ExpertSet.of({1: [2, 5], 0: [1]})),
    "plain by the experts' text": lambda: Halved(1, str(ExpertSet.of({1: [2, 5], 0: [1]}))),
    "plain by a mapping": lambda: Halved(1, {"a": 1.0, "b": torch.ones(2)}),
    "plain by another mapping": lambda: Halved(1, {"a": 1.0, "c": torch.ones(2)}),
    "plain by two lists": lambda: Halved(1, [[1, 2], [3]]),
    "plain by two other lists": lambda: Halved(1, [[1], [2, 3]]),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_equal_settings_are_equal_and_no_others(name):
    for other, make in MAKERS.items():
        assert equal(MAKERS[name](), make()) == (name == other), other


def test_the_order_in_which_a_mapping_was_filled_does_not_count():
    first, second = {1: torch.ones(2), 2: torch.zeros(2)}, {2: torch.zeros(2), 1: torch.ones(2)}
    assert equal(Halved(1, first), Halved(1, second))
    assert not equal(Halved(1, first), Halved(1, {1: torch.zeros(2), 2: torch.ones(2)}))


def test_where_and_how_a_tensor_is_stored_does_not_count():
    numbers = torch.arange(16.0).view(8, 2)[:, 0]
    assert not numbers.is_contiguous()
    assert equal(Scale(numbers), Scale(numbers.clone()))
    assert equal(Scale(torch.nn.Parameter(numbers.clone())), Scale(numbers))
    for odd in (torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0), torch.ones(3, dtype=torch.bool)):
        assert equal(Scale(odd), Scale(odd.clone()))


def test_a_digest_is_the_same_in_every_process():
    assert Zero(ExpertSet.of({1: [2]})).digest == "d421679fbd105ac55636c87ebb315980ca4c19e9679e5e354d20c31cb5890457"


def test_anything_else_is_no_equal():
    experts = ExpertSet.of({1: [2]})
    assert Zero(experts) != experts
    assert Zero(experts) != Zero(experts).digest
    assert {name: kind(experts).mode for name, kind in MODES.items()} == {name: name for name in MODES}


@pytest.mark.parametrize(
    "held", [object(), torch.Generator(), torch.ones(1, device="meta"), iter([1])], ids=lambda held: type(held).__name__
)
def test_what_cannot_be_told_apart_is_refused(held, olmoe):
    own = Halved(1, held)
    with pytest.raises(
        MoELensError, match=f"told from others by what they hold: numbers, .*; got {type(held).__name__}"
    ):
        own.digest  # noqa: B018
    Rows((own, None)).check(olmoe.architecture)  # it acts all the same


@pytest.mark.parametrize("own", [Scale(torch.linspace(0, 2, 8)), Halved(1)], ids=repr)
def test_an_intervention_of_ones_own_acts_alone_and_by_rows(olmoe, own):
    plain, before = olmoe.run_with_cache(TEXTS)
    with olmoe.intervene(own):
        whole, record = olmoe.run_with_cache(TEXTS)
    expected = own(1, before.routing[1]).weights
    torch.testing.assert_close(record.routing[1].weights, expected)
    assert not torch.equal(whole, plain)
    with olmoe.intervene(Rows((None, own, None))):
        rows, _ = olmoe.run_with_cache(TEXTS)
    torch.testing.assert_close(rows[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(rows[1], whole[1])


def test_a_list_and_a_tuple_are_one_sequence():
    assert equal(Halved(1, {"by": (1, None)}), Halved(1, {"by": [1, None]}))


def test_equal_interventions_of_rows_that_were_built_apart_all_act():
    routing = Routing(torch.zeros(3, 1, 4), torch.tensor([[[0, 1]]] * 3), torch.full((3, 1, 2), 0.5))
    rows = Rows((Zero(ExpertSet.of({1: [0]})), None, Zero(ExpertSet.of({1: [0]}))))
    here = Here(layer=1, rows=3, width=1, past=0, prompt=1, batch=None, device=torch.device("cpu"))
    assert rows(here, routing).weights.tolist() == [[[0, 0.5]], [[0.5, 0.5]], [[0, 0.5]]]


def test_thousands_of_rows_are_quick(olmoe):
    kinds, count = (Zero, Renormalize, None), 6000
    started = time.process_time()
    made = [kinds[i % 3] and kinds[i % 3](ExpertSet.of({1: [i % 8, (i // 8) % 8]})) for i in range(count)]
    rows = Rows(tuple(made))
    assert rows == Rows(tuple(made))
    assert rows.layers == (1,)
    assert len(repr(rows)) < 100
    with olmoe.intervene(rows):
        said = olmoe.generate(TEXTS, max_new_tokens=2, progress=False)
        assert len(said) == 3
    taken = [rows.take(range(start, start + 32)) for start in range(0, count - 32, 32)]
    assert len(set(taken)) > 1
    assert time.process_time() - started < 3  # a fifth of a second; comparing each row with each takes ten


def scaled(by: float, mode: str = "weights") -> Intervention:
    """Of a class of its own, as a cell of a notebook makes it anew: the same name, another function."""

    @dataclass(frozen=True, eq=False, repr=False)
    class Scaled(Intervention):
        @property
        def layers(self):
            return (1,)

        def check(self, architecture):
            architecture.at(1)

        def __call__(self, here, routing):
            return replace(routing, **{mode: getattr(routing, mode) * by})

    return Scaled()


def test_the_code_of_ones_own_class_counts():
    assert equal(scaled(0.5), scaled(0.5))
    assert not equal(scaled(0.5), scaled(1.0))
    assert not equal(scaled(0.5), scaled(0.5, "logits"))
    made = {}
    for body in ("weights * FACTOR", "weights / FACTOR", "weights * FACTOR"):
        names = {"FACTOR": 2.0, "Intervention": Intervention, "replace": replace, "__name__": "cell"}
        exec(
            "class Own(Intervention):\n    layers = (1,)\n    def __call__(self, here, routing):\n"
            f"        return replace(routing, weights=routing.{body})\n",
            names,
        )
        digest = names["Own"]().digest
        assert made.setdefault(body, digest) == digest
        names["FACTOR"] = 3.0
        assert names["Own"]().digest != digest, "what the module says counts"
    assert len(set(made.values())) == 2


def test_rows_of_classes_with_one_name_act_each_by_itself(olmoe):
    first, second = scaled(0.0), scaled(2.0)
    texts = TEXTS[:2]
    rows = {}
    for own in (first, second):
        with olmoe.intervene(own):
            rows[own.digest], _ = olmoe.run_with_cache(texts)
    with olmoe.intervene(Rows((first, second))):
        together, _ = olmoe.run_with_cache(texts)
    torch.testing.assert_close(together[0], rows[first.digest][0])
    torch.testing.assert_close(together[1], rows[second.digest][1])
    assert not torch.allclose(rows[first.digest], rows[second.digest])


def test_what_lies_in_slots_and_what_was_changed_in_place_counts():
    @dataclass(frozen=True, eq=False, repr=False, slots=True)
    class Slotted(Intervention):
        by: float

    assert not equal(Slotted(0.0), Slotted(1.0))
    assert repr(Slotted(1.0)) == "Slotted(by=1.0)"
    factors = torch.zeros(8)
    own = Scale(factors)
    before = own.digest
    factors += 1
    assert own.digest != before
    assert own == own


def test_numbers_of_numpy_are_numbers():
    assert equal(Halved(np.int64(1), np.float64(2)), Halved(1, 2.0))
    assert equal(Halved(1, np.ones(3)), Halved(1, torch.ones(3, dtype=torch.float64)))
    assert not equal(Halved(1, np.ones(3)), Halved(1, np.ones(4)))
    assert equal(Halved(1, {3, 4}), Halved(1, {4, 3}))
    assert not equal(Halved(1, lambda weights: weights * 2), Halved(1, lambda weights: weights * 3))


def times(by: object):
    return lambda weights: weights * by


def test_functions_are_told_by_all_that_they_read():
    """Two of one code, a method of another object, and one that another module made."""
    assert equal(Halved(1, [times(1), times(2)]), Halved(1, [times(1), times(2)]))
    assert not equal(Halved(1, [times(1), times(2)]), Halved(1, [times(1), times(3)]))
    assert not equal(Halved(1, Scale(torch.zeros(2)).check), Halved(1, Scale(torch.ones(2)).check))
    assert equal(Halved(1, torch.relu), Halved(1, torch.relu))
    assert not equal(Halved(1, torch.relu), Halved(1, torch.abs))
    elsewhere = []
    for body in ("weights * 2", "weights * 3"):
        names = {"__name__": "notebook"}
        exec(f"edit = lambda weights: {body}", names)
        elsewhere.append(Halved(1, names["edit"]))
    assert not equal(*elsewhere)
    with pytest.raises(MoELensError, match="told from others"):
        Halved(1, torch.ones(2).mul).digest  # noqa: B018


def test_experts_with_a_tensor_beside_them_are_told_by_it_too():
    @dataclass(frozen=True, eq=False, repr=False)
    class Scaled(Zero):
        factors: Tensor

    own = Scaled(ExpertSet.of({1: [2]}), torch.ones(2))
    before = own.digest
    own.factors.zero_()
    assert own.digest != before


@pytest.mark.parametrize(
    "make", [lambda: Rows((Zero(ExpertSet.of({1: [2]})), None, Halved(2))), lambda: Remembering(1)], ids=["rows", "own"]
)
def test_what_an_intervention_works_out_while_it_acts_makes_it_no_other(olmoe, make):
    used, unused = make(), make()
    with olmoe.intervene(used):
        olmoe.run_with_cache(TEXTS)
    assert vars(used).keys() > vars(unused).keys(), "nothing was kept, so that this says nothing"
    assert equal(used, make())
