"""Context-aware decoding against two passes of the bare model, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, most_used
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from training_cases import EXAMPLES

from moe_lens import Example, MoELens, MoELensError, Rows, Zero
from moe_lens.causal import evaluate
from moe_lens.data import encode
from moe_lens.decoding import CAD, AdaCAD, parse_decoding
from moe_lens.decoding.context_aware import jensen_shannon
from moe_lens.lens import AddVector, Bias
from moe_lens.results import read_provenance

NEW = 4
ASKED = EXAMPLES[1:6]
KINDS = [CAD(3), AdaCAD(2.0)]


def alone(example: Example) -> Example:
    return replace(example, context="")


def combined(decoding: CAD | AdaCAD, given: Tensor, without: Tensor) -> Tensor:
    """The logits to go by, [vocab], by the formula."""
    if isinstance(decoding, CAD):
        return (1 + decoding.alpha) * given - decoding.alpha * without
    p, q = (logits.double().softmax(-1).numpy() for logits in (given, without))
    alpha = jensenshannon(p, q) ** 2 + decoding.plus
    return (1 + alpha) * given - alpha * without


def by_hand(lens: MoELens, example: Example, decoding: CAD | AdaCAD) -> str:
    """The answer by two whole passes for each token, without a cache, pads or batches."""
    prompts = [list(encode(one, lens.tokenizer).input_ids) for one in (example, alone(example))]
    said: list[int] = []
    for _ in range(NEW):
        rows = []
        for ids in prompts:
            with torch.no_grad(), lens.model.trace(input_ids=torch.tensor([[*ids, *said]]), use_cache=False):
                logits = lens.model.output.logits[0, -1].save()
            rows.append(logits)
        token = int(combined(decoding, *rows).argmax())
        if token == lens.tokenizer.eos_token_id:
            break
        said.append(token)
    return lens.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("decoding", KINDS, ids=str)
def test_answers_equal_two_passes_by_hand_token_by_token_also_under_interventions(olmoe, decoding):
    for interventions in ((), (Zero(most_used(olmoe, CORPUS, size=1)),)):
        with olmoe.intervene(*interventions):
            found = decoding.generate(olmoe, ASKED, max_new_tokens=NEW, batch_size=3, progress=False)
            assert found == [by_hand(olmoe, example, decoding) for example in ASKED]
        plain = olmoe.generate(ASKED, max_new_tokens=NEW, progress=False)
        assert found != plain


def test_cad_says_what_guidance_of_transformers_says(lens):
    """Its second pass is one more step to whoever counts, so it is a reference only."""
    said = CAD(1.5).generate(lens, ASKED, max_new_tokens=NEW, batch_size=5, progress=False)
    for example, text in zip(ASKED, said, strict=True):
        given, without = (torch.tensor([encode(one, lens.tokenizer).input_ids]) for one in (example, alone(example)))
        ids = lens.module.generate(
            given, max_new_tokens=NEW, do_sample=False, guidance_scale=2.5, negative_prompt_ids=without, pad_token_id=0
        )
        assert text == lens.tokenizer.decode(ids[0, given.shape[1] :], skip_special_tokens=True)


def test_examples_without_a_context_are_answered_plainly_also_among_others(olmoe):
    bare = [alone(example) for example in ASKED]
    plain = olmoe.generate(bare, max_new_tokens=NEW, progress=False)
    assert CAD(3).generate(olmoe, bare, max_new_tokens=NEW, progress=False) == plain
    mixed = [one for both in zip(ASKED, bare, strict=True) for one in both]
    found = CAD(3).generate(olmoe, mixed, max_new_tokens=NEW, batch_size=4, progress=False)
    assert found[1::2] == plain
    assert found[::2] == CAD(3).generate(olmoe, ASKED, max_new_tokens=NEW, progress=False) != plain
    scores = CAD(3).answer_log_probabilities(olmoe, bare, progress=False)
    assert scores == olmoe.answer_log_probabilities(bare, progress=False)
    texts = ["The cat", "a dog"]
    assert CAD(3).generate(olmoe, texts, max_new_tokens=NEW) == olmoe.generate(texts, max_new_tokens=NEW)
    assert CAD(0).generate(olmoe, ASKED, max_new_tokens=NEW) == olmoe.generate(ASKED, max_new_tokens=NEW)


def log_probability(lens: MoELens, example: Example, decoding: CAD | AdaCAD, *interventions: tuple) -> float:
    """Of the answer, from the logits that records hold of the example and of its twin, each under its interventions."""
    found, labels = [], None
    for one, own in zip((example, alone(example)), interventions, strict=True):
        with lens.intervene(*own):
            [record] = lens.records([one], capture=("logits",), positions="answer", with_answer=True, progress=False)
        found.append(record.logits[0].float())
        labels = record.labels[0][record.labels[0] >= 0]
    rows = [combined(decoding, *pair) for pair in zip(*found, strict=True)]
    return sum(row.log_softmax(-1)[label].item() for row, label in zip(rows, labels, strict=True))


@pytest.mark.parametrize("decoding", [CAD(1.5), AdaCAD()], ids=str)
def test_the_pass_without_context_is_under_the_same_interventions_where_it_has_their_positions(olmoe, decoding):
    vector = torch.randn(olmoe.architecture.d_model, generator=torch.Generator().manual_seed(1))
    cases = {
        "from_question": Bias(most_used(olmoe, CORPUS, size=2), -4.0, positions="from_question"),
        "context": AddVector(1, vector, positions="context"),
    }
    for place, intervention in cases.items():
        with olmoe.intervene(intervention):
            found = decoding.answer_log_probabilities(olmoe, ASKED, batch_size=3, progress=False)
        in_twin = () if place == "context" else (intervention,)
        expected = [log_probability(olmoe, example, decoding, (intervention,), in_twin) for example in ASKED]
        assert found == pytest.approx(expected, abs=1e-4)
        other = [log_probability(olmoe, example, decoding, (intervention,), ()) for example in ASKED]
        assert (found == pytest.approx(other, abs=1e-4)) == (place == "context")


def test_each_example_has_its_own_of_several_interventions_in_both_passes(olmoe):
    zero = Zero(most_used(olmoe, CORPUS, size=2))
    with olmoe.intervene(Rows((zero, None, None, zero, None))):
        found = CAD(1).answer_log_probabilities(olmoe, ASKED, batch_size=2, progress=False)
    plain = CAD(1).answer_log_probabilities(olmoe, ASKED, progress=False)
    with olmoe.intervene(zero):
        masked = CAD(1).answer_log_probabilities(olmoe, ASKED, progress=False)
    expected = [masked[0], plain[1], plain[2], masked[3], plain[4]]
    assert found == pytest.approx(expected, abs=1e-4)
    assert plain != pytest.approx(masked, abs=1e-4)


def test_evaluate_answers_and_scores_by_the_decoding_and_keeps_parts_apart(olmoe, tmp_path: Path):
    metrics = ("em", "answer_log_probability")
    found = evaluate(olmoe, ASKED, metrics=metrics, decoding=CAD(2), max_new_tokens=NEW, out=tmp_path)
    plain = evaluate(olmoe, ASKED, metrics=metrics, max_new_tokens=NEW, out=tmp_path)
    assert found.answers["prediction"].tolist() == [
        text.strip() for text in CAD(2).generate(olmoe, ASKED, max_new_tokens=NEW, progress=False)
    ]
    expected = CAD(2).answer_log_probabilities(olmoe, ASKED, with_end=False, progress=False)
    assert found.answers["answer_log_probability"].tolist() == pytest.approx(expected, abs=1e-5)
    assert plain.answers["answer_log_probability"].tolist() != pytest.approx(expected, abs=1e-5)
    told = [read_provenance(path).get("decoding") for path in (tmp_path / "parts").iterdir()]
    assert sorted(told, key=str) == [None, None, "cad:2", "cad:2"]


def test_the_divergence_is_in_nats():
    logits = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0)) * 4
    first, second = logits[:2], logits[2:]
    expected = jensenshannon(first.softmax(-1).numpy(), second.softmax(-1).numpy(), axis=-1) ** 2
    assert jensen_shannon(first, second).numpy() == pytest.approx(expected, abs=1e-6)
    apart = torch.tensor([40.0, 0.0]), torch.tensor([0.0, 40.0])
    assert jensen_shannon(*apart).item() == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("text", ["plain", "cad:0.5", "cad:1", "adacad", "adacad:0.3", "cite:4"])
def test_a_decoding_is_spelled_as_it_is_read(text):
    assert str(parse_decoding(text)) == text


def test_cad_alone_is_the_papers():
    assert parse_decoding("cad") == CAD(1.0)


@pytest.mark.parametrize(
    "text", ["", "greedy", "cad:", "cad:x", "cad:-1", "cad:inf", "cad:1e38", "adacad:nan", "plain:1"]
)
def test_what_is_no_decoding_is_refused(text):
    with pytest.raises(MoELensError, match="must be"):
        parse_decoding(text)
