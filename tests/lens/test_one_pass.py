"""One pass over the data feeds all statistics: each comes out as alone, and every batch goes through the model once."""

import pandas as pd
from test_views import EXAMPLE

from moe_lens.data import Example
from moe_lens.statistics import (
    AnswerProbability,
    AttentionMass,
    CoActivation,
    ExpertSaliency,
    ExpertUsage,
    ExpertVocabulary,
    OutputSimilarity,
    RouterLoad,
    RoutingVectors,
    SelectedExperts,
    VocabularySpecialisation,
)

CAT = Example(id="1", context="The cat sat on the mat.", question="What sat on the mat?", answers=("The cat",))
SETTINGS = {"positions": "all", "with_answer": True, "batch_size": 1, "progress": False}


def test_one_pass_feeds_every_statistic(olmoe):
    def every():
        head = olmoe.module.get_submodule(olmoe.architecture.head)
        return (
            AnswerProbability(olmoe.project_on_vocab), AttentionMass(), CoActivation(), ExpertSaliency(), ExpertUsage(),
            ExpertVocabulary(head, top=2), OutputSimilarity(), RouterLoad(), RoutingVectors(), SelectedExperts(),
            VocabularySpecialisation(),
        )  # fmt: skip

    lengths = []  # of what goes through the model
    embedding = olmoe.module.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, output: lengths.append(inputs[0].shape[1]))
    try:
        together = olmoe.measure([EXAMPLE, CAT], *every(), **SETTINGS)
    finally:
        hook.remove()
    assert len([length for length in lengths if length > 8]) == 2  # the logit lens checks itself on 2 tokens
    for found, fresh in zip(together, every(), strict=True):
        [alone] = olmoe.measure([EXAMPLE, CAT], fresh, **SETTINGS)
        pd.testing.assert_frame_equal(found.table(), alone.table(), obj=type(fresh).__name__)
