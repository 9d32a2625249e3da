"""Positions by word and by step, with and without an appended answer."""

import pytest
import torch

from moe_lens.errors import MoELensError
from moe_lens.lens.positions import in_the_answer, position_mask, step_positions

N = -100
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
LABELS = torch.tensor([[N, N, N, 7, 8, 9], [N, N, N, N, N, 9], [N, N, N, N, N, N]])
SPANS = ((slice(0, 2), None, None), (slice(1, 3), slice(2, 4), None))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [4, 5]]),
        ("prompt", [[0, 1, 2], [1, 2, 3, 4], [4, 5]]),
        ("last", [[2], [4], [5]]),
        ("decode", [[3, 4], [], []]),
        ("answer", [[2, 3, 4], [4], [5]]),
        ("context", [[0, 1], [], []]),
        ("question", [[1, 2], [2, 3], []]),
        ("from_question", [[1, 2, 3, 4], [2, 3, 4], []]),
        ((0, 1), [[2, 3], [4], [5]]),
        ((-3, 2), [[4], [1], []]),
        ((3,), [[], [], []]),
    ],
)
def test_words_and_steps(positions, expected):
    mask = position_mask(MASK, *SPANS, positions, LABELS)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == expected


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("thought", [[2], [], []]), ("answer", [[3, 4], [4], [5]]), ("decode", [[3, 4], [], []])],
)
def test_a_thought_and_the_answer_proper_part_what_predicts_the_answers_tokens(positions, expected):
    mask = position_mask(MASK, *SPANS, positions, LABELS, (1, 0, 0))
    assert [row.nonzero()[:, 0].tolist() for row in mask] == expected
    if positions == "thought":
        for nobody in ((), (1, None, 0)):
            with pytest.raises(MoELensError, match="nobody said what tells it: give a template with answer_after"):
                position_mask(MASK, *SPANS, positions, LABELS, nobody)
    else:
        assert position_mask(MASK, *SPANS, positions, LABELS, (None,) * 3).equal(
            position_mask(MASK, *SPANS, positions, LABELS)
        )


def test_without_an_answer_the_last_token_is_the_last_position():
    mask = position_mask(MASK, *SPANS, (-1, 0, 1))
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [[4, 5]] * 3


def test_steps_know_where_they_are_and_who_has_them():
    steps = (-3, -2, 0, 1, 2, 3)
    positions, present = step_positions(MASK, LABELS, steps)
    for column, step in enumerate(steps):
        mask = position_mask(MASK, *SPANS, (step,), LABELS)
        assert present[:, column].tolist() == mask.any(1).tolist()
        assert positions[present[:, column], column].tolist() == mask.nonzero()[:, 1].tolist()
    assert positions[~present].tolist() == [2, 2, 4, 4, 4, 5, 5, 5, 5, 5]  # of the prompt's last token


def test_decoding_steps_lie_in_the_answer_and_the_prompts_last_token_does_not():
    assert all(map(in_the_answer, ["answer", "decode", (1,), (-1, 0, 1)]))
    assert not any(map(in_the_answer, ["all", "prompt", "last", (0,), (-1, 0)]))


@pytest.mark.parametrize("positions", ["middle", (), (1, 1), (True,), ("last",)])
def test_anything_else_is_refused(positions):
    with pytest.raises(MoELensError, match="must be one"):
        position_mask(MASK, *SPANS, positions, LABELS)
