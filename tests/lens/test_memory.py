"""A device's memory: batches that do not fit are halved and counted once; one record is alive at a time."""

import weakref

import pytest
import torch
from limited_memory import out_of_memory_beyond

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import Needs
from moe_lens.lens.interventions import Rows, Zero
from moe_lens.statistics import AnswerProbability, ExpertUsage, RouterLoad, SelectedExperts

TEXTS = ["the cat sat", "a dog slept in the sun", "the", "What is the capital of Arland?", "mat"]
EXAMPLES = [
    Example(str(place), "The capital of Arland is Belmor.", text, ("Belmor", "the mat")[place % 2 :])
    for place, text in enumerate(TEXTS)
]


def test_records_that_do_not_fit_are_halved_and_hold_the_same(olmoe):
    [whole] = olmoe.records(TEXTS, capture=("routing", "residual"), progress=False)
    with out_of_memory_beyond(2, olmoe.module), pytest.warns(UserWarning, match=r"with 5 examples .* with 2 at a time"):
        parts = list(olmoe.records(TEXTS, capture=("routing", "residual"), progress=False))
    assert [len(part.ids) for part in parts] == [2, 2, 1]
    assert [name for part in parts for name in part.ids] == list(whole.ids)
    last = torch.cat([part.residual[1][:, -1] for part in parts])
    torch.testing.assert_close(last, whole.residual[1][:, -1])


def test_rows_of_a_halved_batch_keep_to_their_examples(olmoe):
    masked = Zero(ExpertSet.of({layer: range(6) for layer in olmoe.architecture.moe_layers}))
    with olmoe.intervene(Rows((masked, None, masked, None, None))):
        [whole] = olmoe.records(TEXTS, progress=False)
        with out_of_memory_beyond(2, olmoe.module), pytest.warns(UserWarning, match="out of memory"):
            parts = list(olmoe.records(TEXTS, progress=False))
    weights = torch.cat([part.routing[2].weights[:, -1] for part in parts])
    torch.testing.assert_close(weights, whole.routing[2].weights[:, -1])


def test_a_single_text_that_does_not_fit_is_told(olmoe):
    with (
        out_of_memory_beyond(0, olmoe.module),
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MoELensError, match=r"single example of .* tokens"),
    ):
        next(olmoe.records(TEXTS, progress=False))


def test_statistics_of_halved_batches_are_those_of_whole_ones(olmoe):
    def made() -> tuple[object, ...]:
        return ExpertUsage(), RouterLoad(), SelectedExperts(), AnswerProbability(olmoe.project_on_vocab)

    whole = olmoe.measure(EXAMPLES, *made(), progress=False)
    with out_of_memory_beyond(2, olmoe.module), pytest.warns(UserWarning, match="out of memory"):
        parts = olmoe.measure(EXAMPLES, *made(), progress=False)
    for mine, expected in zip(parts, whole, strict=True):
        table = expected.table()
        for name, column in mine.table().items():
            if column.dtype.kind == "f":
                assert column.to_numpy() == pytest.approx(table[name].to_numpy(), rel=1e-5, abs=1e-6, nan_ok=True)
            else:
                assert list(column) == list(table[name])


class Hungry(ExpertUsage):
    """A statistic that takes more memory than there is for more than two examples."""

    def update(self, record):
        if len(record.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return super().update(record)


def test_what_was_counted_before_memory_ran_out_is_not_counted_again(olmoe):
    with pytest.warns(UserWarning, match="out of memory with 5 examples"):
        before, hungry, after = olmoe.measure(TEXTS, ExpertUsage(), Hungry(), ExpertUsage(), progress=False)
    [expected] = olmoe.measure(TEXTS, ExpertUsage(), progress=False)
    for usage in (before, hungry, after):
        assert usage.counted == len(TEXTS)
        assert usage.table()["score"].to_numpy() == pytest.approx(expected.table()["score"].to_numpy())


class Witness:
    """A statistic that sees which of the records that it was given are still there."""

    needs, settings = Needs.of({"routing", "residual"}, "last"), {}

    def __init__(self):
        self.seen, self.alive = [], []

    def update(self, record):
        self.seen.append(weakref.ref(record))
        return self

    def look(self, *_):
        self.alive.append(sum(record() is not None for record in self.seen))

    def merge(self, other):
        return self

    def table(self):
        return None


def test_one_record_is_alive_at_a_time(olmoe):
    witness = Witness()
    handle = olmoe.module.register_forward_pre_hook(witness.look)
    try:
        olmoe.measure(TEXTS, witness, batch_size=1, progress=False)
    finally:
        handle.remove()
    assert len(witness.seen) == len(TEXTS)
    assert witness.alive == [0] * len(TEXTS), "a record was kept while the next was made"
