"""Example: what is refused at once instead of scoring zero later."""

import pytest

from moe_lens.data import Example
from moe_lens.errors import MoELensError


@pytest.mark.parametrize(
    ("question", "answers", "message"),
    [
        (" ", ("a",), "'q7' has a blank question"),
        ("Who?", (), "'q7' needs answers"),
        ("Who?", ("a", ""), "'q7' needs answers"),
        ("Who?", (" a",), "'q7' needs answers"),
    ],
)
def test_examples_that_cannot_be_asked_or_scored_are_refused_by_name(question, answers, message):
    with pytest.raises(MoELensError, match=message):
        Example("q7", "", question, answers)
