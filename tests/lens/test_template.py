"""One template of a lens: measuring, answering and scoring ask alike, by names, files and templates of one's own."""

import json

import pytest
import torch
from conftest import build_model

from moe_lens.causal import evaluate
from moe_lens.data import FIGURE_10, TEMPLATES, Example, PromptTemplate, encode
from moe_lens.errors import MoELensError
from moe_lens.lens import MoELens
from moe_lens.statistics import ExpertUsage

EXAMPLES = [
    Example("a", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("b", "The cat sat on the mat.", "Where did the cat sit?", ("on the mat", "the mat")),
    Example("c", "", "Who slept?", ("the dog",)),
]
OWN = PromptTemplate("Read: {context} Then say: {question}", "Say: {question}", answer_cue=" =")


@pytest.fixture(params=[TEMPLATES["plain"], OWN, FIGURE_10], ids=["plain", "own", "figure-10"])
def asking(request, olmoe, monkeypatch):
    """A lens that asks by a template."""
    monkeypatch.setattr(olmoe, "template", request.param)
    return olmoe


def texts_of(lens: MoELens) -> list[str]:
    return [lens.template.render(example, lens.tokenizer).text for example in EXAMPLES]


def test_records_hold_the_templates_prompts(asking):
    texts = dict(zip("abc", texts_of(asking), strict=True))
    for record in asking.records(EXAMPLES, batch_size=2, progress=False):
        for row, name in enumerate(record.ids):
            ids = record.input_ids[row, record.starts[row] :]
            assert asking.tokenizer.decode(ids) == texts[name]
            question = asking.tokenizer.decode(record.input_ids[row, record.question_spans[row]])
            assert next(example.question for example in EXAMPLES if example.id == name) in question


def test_measuring_counts_the_templates_tokens(asking):
    [of_examples] = asking.measure(EXAMPLES, ExpertUsage(), progress=False)
    [of_texts] = asking.measure(texts_of(asking), ExpertUsage(), progress=False)
    assert of_examples.table()["score"].tolist() == pytest.approx(of_texts.table()["score"].tolist())


def test_answers_are_those_to_the_templates_texts(asking):
    expected = asking.generate(texts_of(asking), max_new_tokens=5, progress=False)
    assert asking.generate(EXAMPLES, max_new_tokens=5, progress=False) == expected
    scored = evaluate(asking, EXAMPLES, max_new_tokens=5, progress=False).answers
    assert scored["prediction"].tolist() == [text.strip() for text in expected]


def test_answers_are_scored_after_the_templates_prompts(asking):
    expected = []
    for example in EXAMPLES:
        encoded = encode(example, asking.tokenizer, template=asking.template, with_answer=True)
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            each = asking.module(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        expected.append(float(each[encoded.prompt_length - 1 :].sum()))
    assert asking.answer_log_probabilities(EXAMPLES, progress=False) == pytest.approx(expected, abs=1e-4)


def test_templates_differ_in_all_of_these(olmoe, monkeypatch):
    found = []
    for template in (FIGURE_10, OWN):
        monkeypatch.setattr(olmoe, "template", template)
        [usage] = olmoe.measure(EXAMPLES, ExpertUsage(), progress=False)
        said = olmoe.generate(EXAMPLES, max_new_tokens=5, progress=False)
        found.append((usage.table()["score"].tolist(), said, olmoe.answer_log_probabilities(EXAMPLES, progress=False)))
    first, second = found
    assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(OWN.facts()), encoding="utf-8")
    return tmp_path / "own.json"


def test_a_lens_takes_a_template_its_name_or_its_file(tokenizer, file):
    module = build_model("olmoe", len(tokenizer), num_hidden_layers=1)
    assert MoELens(module, tokenizer).template is FIGURE_10
    assert MoELens(module, tokenizer, template=OWN).template is OWN
    assert MoELens(module, tokenizer, template="plain").template is TEMPLATES["plain"]
    assert MoELens(module, tokenizer, template=file).template == OWN
    assert MoELens.from_pretrained(module, tokenizer, template=str(file)).template == OWN
    assert MoELens.from_pretrained(module, tokenizer).template is FIGURE_10


def test_a_template_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, tokenizer):
    for asked, said in (
        ("plane", "a template is one of figure-10, plain, bare, released"),
        (tmp_path / "a.toml", "cannot read a template"),
    ):
        with pytest.raises(MoELensError, match=said):
            MoELens.from_pretrained(tmp_path / "nowhere", template=asked)
        with pytest.raises(MoELensError, match=said):
            MoELens(build_model("olmoe", len(tokenizer), num_hidden_layers=1), tokenizer, template=asked)
