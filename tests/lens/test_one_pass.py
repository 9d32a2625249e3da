"""One pass over the data feeds all statistics: each comes out as alone, and every batch goes through the model once."""

import inspect
from dataclasses import replace

import pandas as pd
import pytest

from moe_lens import statistics
from moe_lens.data import Example, encode
from moe_lens.errors import MoELensError
from moe_lens.lens import Needs, Statistic
from moe_lens.statistics import (
    AnswerProbability,
    AttentionMass,
    ExpertPortraits,
    ExpertSaliency,
    ExpertUsage,
    ExpertVocabulary,
    SelectedExperts,
    SharedShare,
    VocabularySpecialisation,
)

EXAMPLES = [
    Example("0", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("1", "The cat sat on the mat.", "What sat on the mat?", ("The cat",)),
    Example("2", "", "Who slept in the sun?", ("the dog",)),
]
#: What those need to be made that cannot do without.
ARGUMENTS = {
    AnswerProbability: lambda lens: (lens.project_on_vocab,),
    ExpertPortraits: lambda lens: (lens,),
    ExpertVocabulary: lambda lens: (lens.module.get_submodule(lens.architecture.head),),
}
CLASSES = [kind for name in statistics.__all__ if inspect.isclass(kind := getattr(statistics, name))]
PUBLIC = [kind for kind in CLASSES if not inspect.isabstract(kind)]
#: What models without shared experts have, too.
EVERYWHERE = [kind for kind in PUBLIC if kind is not SharedShare]


def plain(kind: type, lens) -> Statistic:
    """A statistic with its defaults."""
    return kind(*ARGUMENTS.get(kind, lambda lens: ())(lens))


def test_there_are_statistics_to_test():
    assert {ExpertUsage, AnswerProbability, AttentionMass} < set(PUBLIC)
    assert len(PUBLIC) >= 11


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_the_plain_call_of_each_statistic_gives_a_table(lens, kind):
    statistic = plain(kind, lens)
    assert isinstance(statistic, Statistic)
    if kind not in EVERYWHERE and not lens.architecture.n_shared_experts:
        with pytest.raises(MoELensError, match="this model has no shared_output"):
            lens.measure(EXAMPLES, statistic, progress=False)
        return
    [filled] = lens.measure(EXAMPLES, statistic, progress=False)
    assert filled is statistic
    table = filled.table()
    assert len(table) > 0
    assert set(table["layer"]) <= set(range(lens.architecture.n_layers))


#: Statistics of positions that closed-book questions have none of.
OF_CONTEXTS = {
    AttentionMass: lambda lens: AttentionMass(("question", "sink"), steps=(-40,)),
    ExpertPortraits: lambda lens: ExpertPortraits(lens, "context"),
    ExpertVocabulary: lambda lens: ExpertVocabulary(*ARGUMENTS[ExpertVocabulary](lens), positions="context"),
    VocabularySpecialisation: lambda lens: VocabularySpecialisation("predicted", positions="context"),
}


@pytest.mark.parametrize("closed_first", [True, False], ids=["closed-first", "closed-last"])
@pytest.mark.parametrize("kind", sorted(set(EVERYWHERE) - {AnswerProbability}, key=str), ids=lambda kind: kind.__name__)
def test_a_batch_without_any_position_that_counts_adds_nothing(olmoe, kind, closed_first):
    def made() -> Statistic:
        return OF_CONTEXTS.get(kind, lambda lens: kind(positions="context"))(olmoe)

    def filled(examples: list[Example]) -> Statistic:
        statistic = made()
        for example in examples:
            olmoe.measure([example], statistic, progress=False)
        return statistic

    contexts, closed = EXAMPLES[:2], [replace(EXAMPLES[2], question="Who?")]
    expected = filled(contexts).table()
    table = filled([*closed, *contexts] if closed_first else [*contexts, *closed]).table()
    pd.testing.assert_frame_equal(table, expected)
    merged = filled(closed).merge(filled(contexts)) if closed_first else filled(contexts).merge(filled(closed))
    pd.testing.assert_frame_equal(merged.table(), expected)
    with pytest.raises(MoELensError, match=r"has seen no|has any position"):
        filled(closed).table()


def test_one_pass_feeds_every_statistic(olmoe):
    olmoe.project_on_vocab(olmoe.module.model.norm.weight[None])  # it checks itself at its first use
    lengths = []  # of what goes through the model
    embedding = olmoe.module.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, output: lengths.append(inputs[0].shape[1]))
    try:
        together = olmoe.measure(EXAMPLES, *(plain(kind, olmoe) for kind in EVERYWHERE), batch_size=1, progress=False)
    finally:
        hook.remove()
    of_prompts = [len(encode(example, olmoe.tokenizer, with_answer=True).input_ids) for example in EXAMPLES]
    assert sorted(length for length in lengths if length > 1) == sorted(of_prompts)  # the logit lens reads one by one
    for found, kind in zip(together, EVERYWHERE, strict=True):
        [alone] = olmoe.measure(EXAMPLES, plain(kind, olmoe), batch_size=1, progress=False)
        pd.testing.assert_frame_equal(found.table(), alone.table(), atol=1e-5, obj=kind.__name__)


def sorted_table(statistic: Statistic, *key: str) -> pd.DataFrame:
    return statistic.table().sort_values(list(key), ignore_index=True)


@pytest.mark.parametrize("positions", ["all", "prompt", "question", "last", (-2, 0)])
def test_an_answers_statistic_beside_it_changes_no_count_of_prompts(lens, positions):
    own = lambda: (ExpertUsage(positions=positions), SelectedExperts(positions))  # noqa: E731
    answers = AnswerProbability(lens.project_on_vocab)
    assert (answers.needs | own()[0].needs).positions == answers.needs.positions, "routing is kept everywhere anyway"
    usage, selected, _ = lens.measure(EXAMPLES, *own(), answers, batch_size=2, progress=False)
    usage_alone, selected_alone = lens.measure(EXAMPLES, *own(), batch_size=2, progress=False)
    pd.testing.assert_frame_equal(usage.table(), usage_alone.table(), rtol=0, atol=1e-12)
    exact = ["id", "layer", "position", "rank", "expert"]
    pd.testing.assert_frame_equal(selected.table()[exact], selected_alone.table()[exact])
    lengths = {example.id: len(encode(example, lens.tokenizer).input_ids) for example in EXAMPLES}
    counted = selected.table().groupby("id")["position"].agg(["min", "max"])
    if positions == "all":
        assert counted["min"].eq(0).all()
    if positions != "question":
        assert counted["max"].to_dict() == {name: length - 1 for name, length in lengths.items()}


def test_answers_asked_for_count_for_all(olmoe):
    answers = AnswerProbability(olmoe.project_on_vocab)
    asked = {"with_answer": True, "batch_size": 2, "progress": False}
    usage, selected, _ = olmoe.measure(EXAMPLES, ExpertUsage("token"), SelectedExperts(), answers, **asked)
    lengths = {e.id: len(encode(e, olmoe.tokenizer, with_answer=True).input_ids) for e in EXAMPLES}
    assert (selected.table().groupby("id")["position"].max() + 1).to_dict() == lengths
    [alone] = olmoe.measure(EXAMPLES, ExpertUsage("token"), **asked)
    pd.testing.assert_frame_equal(usage.table(), alone.table(), rtol=0, atol=1e-12)
    [prompts] = olmoe.measure(EXAMPLES, ExpertUsage("token"), progress=False)
    assert (usage.table()["score"] - prompts.table()["score"]).abs().max() > 1e-3


def test_continuations_count_for_all(olmoe):
    texts = ["Belmor and a dog", "no", "the cat"]
    selected, _ = olmoe.measure(
        EXAMPLES, SelectedExperts(), AttentionMass(steps=(1,)), continuations=texts, progress=False
    )
    lengths = {
        example.id: len(encode(example, olmoe.tokenizer, continuation=text).input_ids)
        for example, text in zip(EXAMPLES, texts, strict=True)
    }
    assert (selected.table().groupby("id")["position"].max() + 1).to_dict() == lengths


def test_statistics_at_different_positions_share_a_pass(olmoe):
    kinds = [
        lambda: AttentionMass(("question",)),
        lambda: AttentionMass(("question",), steps=(-3, 1)),
        lambda: ExpertSaliency("context"),
        lambda: ExpertSaliency("last"),
    ]
    together = olmoe.measure(EXAMPLES, *(make() for make in kinds), batch_size=3, progress=False)
    for found, make in zip(together, kinds, strict=True):
        [alone] = olmoe.measure(EXAMPLES, make(), batch_size=3, progress=False)
        pd.testing.assert_frame_equal(found.table(), alone.table(), rtol=1e-4, atol=1e-6)


def test_a_set_of_positions_keeps_their_union(olmoe):
    capture = ("residual", "logits", "router_input", "moe_output")
    asked = {"capture": capture, "batch_size": 3, "progress": False}
    [record] = olmoe.records(EXAMPLES, positions=frozenset({"last", "context"}), **asked)
    mask = record.position_mask("last") | record.position_mask("context")
    assert record.kept.tolist() == mask.any(0).nonzero()[:, 0].tolist()
    [whole] = olmoe.records(EXAMPLES, positions="all", **asked)
    for name in ("residual", "router_input", "moe_output"):
        for layer, value in record.captured[name].items():
            assert value.equal(whole.captured[name][layer][:, record.kept])
    for positions in ("last", "context"):
        assert record.kept_mask(positions).sum() == record.position_mask(positions).sum()
    with pytest.raises(MoELensError, match="did not keep all positions 'question'"):
        record.kept_mask("question")


def test_needs_add_up_and_know_what_lies_in_an_answer():
    routing, attention = Needs.of({"routing"}, "all"), Needs.of({"attention"}, (0, 1))
    assert not routing.with_answer
    assert attention.with_answer
    both = routing | attention
    assert both == Needs(frozenset({"routing", "attention"}), frozenset({(0, 1)}), with_answer=True)
    assert Needs.of({"routing", "moe_output"}, "all", "last").positions == {"all", "last"}
    assert [Needs.of(set(), one).with_answer for one in ("last", (-1, 0), "decode", "answer", (2,))] == [
        False, False, True, True, True,
    ]  # fmt: skip
    with pytest.raises(MoELensError, match=r"capture can name .*; got rooting"):
        Needs.of({"rooting"})
    with pytest.raises(MoELensError, match=r"positions must be one of .*; got 'first'"):
        Needs.of({"routing"}, "first")


def test_what_is_no_statistic_is_refused(olmoe):
    with pytest.raises(MoELensError, match=r"expected a statistic such as ExpertUsage\(\); got 'usage'"):
        olmoe.measure(EXAMPLES, "usage", progress=False)
    with pytest.raises(MoELensError, match=r"give a statistic to fill, ExpertUsage\(…\), not its class"):
        olmoe.measure(EXAMPLES, ExpertUsage, progress=False)
