"""ContextCite: its sparse linear model, its attributions against ablations by hand and leave-one-out, and pruning."""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import CORPUS, most_used
from scipy.stats import spearmanr

from moe_lens import Example, MoELens, MoELensError, Rows, Zero, load_examples
from moe_lens.causal import evaluate
from moe_lens.decoding import CAD, Cited, attributions, context_citations, parse_decoding
from moe_lens.decoding.citing import ABLATIONS, PENALTY, SUREST, drawn_ablations, sentence_weights
from moe_lens.decoding.pruning import FIRST_ANSWER
from moe_lens.results import read_provenance

NEW = 4
TOWNS = ("Arland", "Dorland", "Catland")
FACTS = "The capital of {0} is Belmor. The cat sat on the mat. Context of {0} is below."
ASKED = [
    Example(town, FACTS.format(town), f"What is the capital of {town}?", ("Belmor",), original_answer="Question")
    for town in TOWNS
]
ONE = replace(ASKED[0], id="one", context="The cat sat on the mat.")
NONE = replace(ASKED[0], id="none", context="")


def only(example: Example, *numbers: int) -> Example:
    """The example with these sentences of its context, by hand."""
    own = [f"{text}." for text in example.context.rstrip(".").split(". ")]
    return replace(example, context=" ".join(own[number] for number in numbers))


def test_the_truth_of_a_linear_toy_is_recovered():
    """Up to what the penalty takes off each weight: `PENALTY` over a standard deviation of about a half, squared."""
    truth = np.array([3.0, 0.0, -1.0, 0.5, 0.0, 0.0])
    draw = np.random.default_rng(0)
    kept = draw.random((ABLATIONS, len(truth))) < 0.5
    noise = draw.normal(scale=0.005, size=ABLATIONS)
    found = sentence_weights(kept, 7 + kept @ truth + noise)
    assert found == pytest.approx(truth, abs=3 * PENALTY)
    assert (found[truth == 0] == 0).sum() >= 2
    strong = truth != 0
    assert (np.abs(found[strong]) < np.abs(truth[strong])).all()


def test_the_weights_are_those_at_which_a_lasso_is_least():
    """By its conditions: what is left is as much correlated with a sentence as the penalty, and less where it is 0."""
    draw = np.random.default_rng(1)
    kept, values = draw.random((ABLATIONS, 5)) < 0.5, draw.normal(size=ABLATIONS) / 10
    found = sentence_weights(kept, values)
    deviation = kept.std(axis=0)
    standardised = (kept - kept.mean(axis=0)) / deviation
    left = values - values.mean() - standardised @ (found * deviation)
    slope = standardised.T @ left / ABLATIONS
    assert 0 < (found != 0).sum() < 5
    assert slope[found != 0] == pytest.approx(PENALTY * np.sign(found[found != 0]), abs=1e-4)
    assert (np.abs(slope[found == 0]) <= PENALTY + 1e-6).all()


def logits(lens: MoELens, examples: list[Example], answer: str) -> list[float]:
    """Of the probability of the answer to each of the examples."""
    said = [answer] * len(examples)
    logs = lens.answer_log_probabilities(examples, continuations=said, with_end=False, batch_size=8, progress=False)
    return [log - math.log(1 - math.exp(log)) for log in (min(log, SUREST) for log in logs)]


def test_attributions_are_those_of_ablations_one_by_one(olmoe):
    """Each choice of the three sentences asked for alone, the model's own answer after it."""
    answers = olmoe.generate(ASKED, max_new_tokens=NEW, progress=False)
    found = attributions(olmoe, ASKED, answers, batch_size=7, progress=False)
    for example, answer, weights in zip(ASKED[:2], answers, found, strict=False):
        tokens = len(olmoe.tokenizer(answer if answer[0] == " " else f" {answer}")["input_ids"])
        subsets = [tuple(number for number in range(3) if code >> number & 1) for code in range(8)]
        values = {kept: logits(olmoe, [only(example, *kept)], answer)[0] / tokens for kept in subsets}
        kept = drawn_ablations(example, 3)
        assert 0.3 < kept.mean() < 0.7
        by_hand = sentence_weights(kept, np.array([values[tuple(np.flatnonzero(row))] for row in kept])) * tokens
        assert weights == pytest.approx(by_hand, abs=1e-3)
        assert np.abs(weights).max() > 0.1
    [same] = attributions(olmoe, ASKED[1:2], answers[1:2], progress=False)
    assert same == pytest.approx(found[1], abs=1e-3), "what is drawn is the example's own, whatever it stands among"
    assert not np.array_equal(kept, drawn_ablations(example, 3, seed=1))
    with pytest.raises(MoELensError, match="two or more ablations"):
        attributions(olmoe, ASKED, answers, ablations=1)


def test_attributions_agree_with_leaving_one_sentence_out_on_the_organism():
    lens = MoELens.from_pretrained("organism")
    lens.progress = False
    examples = load_examples("novel", split="test", limit=24)
    cited = context_citations(lens, examples, max_new_tokens=8)
    assert not cited.left
    correlations, same = [], 0
    for place, own in cited.table.groupby("place"):
        example, answer = examples[place], f" {own['answer'].iloc[0]}"
        texts = own["text"].tolist()
        without = [" ".join(texts[:number] + texts[number + 1 :]) for number in range(len(texts))]
        whole, *rest = logits(lens, [example, *(replace(example, context=context) for context in without)], answer)
        drops = [whole - other for other in rest]
        correlations.append(spearmanr(drops, own["attribution"]).statistic)
        same += int(np.argmax(drops) == np.argmax(own["attribution"]))
    assert np.nanmean(correlations) > 0.7
    assert same >= 0.9 * len(examples)


def test_the_table_has_a_row_per_sentence_and_counts_what_was_not_ablated(olmoe):
    examples = [ASKED[0], ONE, NONE, ASKED[1]]
    cited = context_citations(olmoe, examples, max_new_tokens=NEW, progress=False)
    assert cited.left == {"of one sentence": 1, "without a context": 1}
    assert str(cited) == "the sentences of 2 contexts are cited; 1 of one sentence; 1 without a context"
    table = cited.table
    assert table["place"].tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert table["attribution"].isna().tolist() == [False] * 3 + [True] + [False] * 3
    for row in table.itertuples():
        assert examples[row.place].context[row.start : row.stop].strip() == row.text
    answers = olmoe.generate(examples, max_new_tokens=NEW, progress=False)
    assert table.groupby("place")["answer"].first().tolist() == [answers[place].strip() for place in (0, 1, 3)]


def test_the_answer_comes_again_from_the_sentences_that_it_rests_on_most(olmoe):
    examples = [*ASKED, ONE, NONE, "The cat"]
    plain = olmoe.generate(examples, max_new_tokens=NEW, progress=False)
    found = Cited(2).generate(olmoe, examples, max_new_tokens=NEW, batch_size=4, progress=False)
    weights = attributions(olmoe, ASKED, plain[:3], progress=False)
    shorter = [only(example, *sorted(np.argsort(-own)[:2])) for example, own in zip(ASKED, weights, strict=True)]
    assert found == [*olmoe.generate(shorter, max_new_tokens=NEW, progress=False), *plain[3:]]
    assert found != plain
    assert Cited(3).generate(olmoe, examples, max_new_tokens=NEW, progress=False) == plain


def test_a_context_stays_whole_whose_first_answer_is_empty(olmoe):
    [said] = olmoe.generate(ASKED[:1], max_new_tokens=NEW, progress=False)
    first = said.strip()[0]
    with pytest.warns(UserWarning, match="1 of 1 answers are empty"):
        found = Cited(1).generate(olmoe, ASKED[:1], max_new_tokens=NEW, stop=[first], progress=False)
    assert [text.strip() for text in found] == [""]


def test_every_pass_is_under_the_interventions_of_its_example(olmoe):
    zero = Zero(most_used(olmoe, CORPUS, size=2))
    with olmoe.intervene(zero):
        masked = Cited(1).generate(olmoe, ASKED, max_new_tokens=NEW, progress=False)
    plain = Cited(1).generate(olmoe, ASKED, max_new_tokens=NEW, progress=False)
    assert all(one != other for one, other in zip(masked, plain, strict=True))
    with olmoe.intervene(Rows((None, zero, None))):
        each = Cited(1).generate(olmoe, ASKED, max_new_tokens=NEW, batch_size=2, progress=False)
        assert len(olmoe.interventions) == 1
    assert each == [plain[0], masked[1], plain[2]]


def test_evaluate_answers_scores_and_compares_by_what_is_cited(olmoe, tmp_path):
    """Also the difference of two answers' logits, which has a short way for the model as it is."""
    metrics = ("em", "answer_log_probability", "logit_difference")
    found = evaluate(olmoe, ASKED[:2], metrics=metrics, decoding=Cited(1), max_new_tokens=NEW, out=tmp_path).answers
    said = Cited(1).generate(olmoe, ASKED[:2], max_new_tokens=NEW, progress=False)
    assert found["prediction"].tolist() == [text.strip() for text in said]
    both = [
        Cited(1).answer_log_probabilities(
            olmoe, [replace(one, answers=(text,)) for one in ASKED[:2]], first_token=True, progress=False
        )
        for text in ("Belmor", "Question")
    ]
    expected = [given - memory for given, memory in zip(*both, strict=True)]
    assert found["logit_difference"].tolist() == pytest.approx(expected, abs=1e-4)
    assert {read_provenance(path)["decoding"] for path in (tmp_path / "parts").iterdir()} == {"cite:1"}


def test_what_is_answered_plainly_is_counted_for_the_provenance():
    examples = [*ASKED, ONE, NONE]
    told = {"without a context": 1, "of one sentence": 1, "of 2 sentences": 0}
    assert Cited(2).facts(examples) == {"decoding": "cite:2", "answered_plainly": told}
    assert Cited(3).untouched(examples)["of 3 sentences"] == 3
    assert CAD(2).facts(examples) == {"decoding": "cad:2", "answered_plainly": {"without a context": 1}}
    assert parse_decoding("plain").facts(examples) == {}


def test_a_given_answer_is_scored_after_the_pruned_context(olmoe):
    asked = [ASKED[0], ONE, NONE]
    own = olmoe.generate(asked[:1], max_new_tokens=FIRST_ANSWER, progress=False)
    [weights] = attributions(olmoe, asked[:1], own, progress=False)
    pruned = [only(ASKED[0], int(weights.argmax())), ONE, NONE]
    expected = olmoe.answer_log_probabilities(pruned, progress=False)
    assert Cited(1).answer_log_probabilities(olmoe, asked, progress=False) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(olmoe.answer_log_probabilities(asked, progress=False), abs=1e-4)


@pytest.mark.parametrize("text", ["cite:0", "cite:-1", "cite:1.5", "cite:", "cite:x"])
def test_what_is_no_number_of_sentences_is_refused(text):
    with pytest.raises(MoELensError, match="must be"):
        parse_decoding(text)
    assert parse_decoding("cite:3") == Cited(3)
