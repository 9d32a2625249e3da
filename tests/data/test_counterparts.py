"""The other halves of pairs: what memory says in every place of the answer, no context, another data set by id."""

from dataclasses import replace

import pytest

from moe_lens.data import Example
from moe_lens.data.counterparts import counterparts_from, memory_said, without_context
from moe_lens.errors import MoELensError

SWAPPED = Example(
    "0", "Rome, or Rome in Italy, is 9 km from Romero.", "What?", ("Rome in Italy", "Rome"), original_answer="Bonn"
)


def test_memory_stands_in_every_place_of_an_answer_and_in_no_longer_word():
    assert memory_said(SWAPPED) == replace(SWAPPED, context="Bonn, or Bonn, is 9 km from Romero.")


def test_examples_without_a_memory_an_answer_in_the_context_or_a_context_have_no_other_half():
    assert memory_said(replace(SWAPPED, original_answer=None)) is None
    assert memory_said(replace(SWAPPED, context="Romero is far.")) is None
    assert without_context(replace(SWAPPED, context="")) is None
    assert without_context(SWAPPED) == replace(SWAPPED, context="")


def test_another_data_sets_examples_are_found_by_id_and_keep_the_first_ones_answers():
    other = Example("0", "Nothing.", "Who?", ("nobody",))
    found = counterparts_from([other], [SWAPPED, replace(SWAPPED, id="1")])
    assert found == [replace(SWAPPED, context="Nothing.", question="Who?"), None]
    with pytest.raises(MoELensError, match="paired by id"):
        counterparts_from([other], [replace(SWAPPED, id="1")])
    with pytest.raises(MoELensError, match="'0' stands for two"):
        counterparts_from([other, replace(other, context="Else.")], [SWAPPED])
