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


def test_a_memory_that_is_blank_is_refused_for_it_would_be_scored():
    with pytest.raises(MoELensError, match="'q7' has a blank original_answer; leave it None"):
        Example("q7", "", "Who?", ("a",), " ")
    with pytest.raises(MoELensError, match="'q7' has a blank original_answer"):
        Example("q7", "", "Who?", ("a",), "b", original_aliases=("",))


def test_memory_has_all_its_names_and_no_others_without_a_first():
    assert Example("q7", "", "Who?", ("a",), "b", original_aliases=("c", "d")).memory == ("b", "c", "d")
    assert Example("q7", "", "Who?", ("a",)).memory == ()
    with pytest.raises(MoELensError, match="'q7' has original_aliases of no original_answer; give that too"):
        Example("q7", "", "Who?", ("a",), original_aliases=("c",))


def test_a_prompt_with_a_context_is_refused_and_so_is_another_way_to_ask():
    with pytest.raises(MoELensError, match="'q7' is asked as one of question, prompt, verbatim, and only a question"):
        Example("q7", "c", "Say a.", ("a",), asked="prompt")
    with pytest.raises(MoELensError, match="'q7' is asked as one of"):
        Example("q7", "", "Say a.", ("a",), asked="chat")
    with pytest.raises(MoELensError, match="'q7' has a blank prompt"):
        Example("q7", "", " ", ("a",), asked="prompt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("a",), "at least two different options"),
        (("a", "a"), "two different"),
        (("a", " b"), "space around it"),
        (("a", ""), "none blank"),
        (("b", "c"), r"answers that are among its options \('b', 'c'\); got \('a',\)"),
    ],
)
def test_options_that_cannot_be_chosen_between_are_refused_by_name(options, message):
    with pytest.raises(MoELensError, match=f"'q7' needs .*{message}"):
        Example("q7", "", "Which?", ("a",), options=options)


def test_an_example_keeps_its_options_in_order():
    assert Example("q7", "", "Which?", ("a",), options=("c", "a", "b")).options == ("c", "a", "b")
