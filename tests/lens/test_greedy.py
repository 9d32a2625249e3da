"""Greedy answers are greedy and end at an end of sequence, whatever config, generation config and tokenizer say."""

import copy

import pytest
import torch
from conftest import build_model
from transformers import AddedToken

from moe_lens.causal import evaluate
from moe_lens.checks import CHECKS
from moe_lens.data import Example, encode, load_examples
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]
NEW = 6


def said(lens, **options):
    return lens.generate(TEXTS, max_new_tokens=NEW, progress=False, **options)


def most_likely_ids(lens, text):
    """The most likely tokens one after another, by whole forward passes alone."""
    asked = lens.tokenizer(text)["input_ids"]
    new = []
    for _ in range(NEW):
        with torch.no_grad():
            new.append(int(lens.module(torch.tensor([asked + new]), use_cache=False).logits[0, -1].argmax()))
        if new[-1] in (lens.tokenizer.eos_token_id, lens.module.config.eos_token_id):
            return new[:-1]
    return new


def most_likely(lens, text):
    """The text of the most likely tokens."""
    return lens.tokenizer.decode(most_likely_ids(lens, text), skip_special_tokens=True)


@pytest.fixture
def bent(olmoe):
    """Sets what a generation config says, until the test ends."""
    own = olmoe.module.generation_config
    olmoe.module.generation_config = copy.deepcopy(own)
    olmoe._runner.greedy.told.clear()

    def bend(**settings):
        for name, value in settings.items():
            setattr(olmoe.module.generation_config, name, value)
        return olmoe

    yield bend
    olmoe.module.generation_config = own


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"num_beams": 4, "length_penalty": 3.0},
        {"min_new_tokens": 6},
        {"min_length": 200},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(20, 300))},
        {"begin_suppress_tokens": list(range(20, 300))},
        {"bad_words_ids": [[token] for token in range(20, 300)]},
        {"forced_bos_token_id": 30},
        {"forced_eos_token_id": 30},
        {"sequence_bias": [[[30], 100.0]]},
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
        {"temperature": 0.6},
        {"exponential_decay_length_penalty": (1, 50.0)},
        {"stop_strings": ["e", "a"]},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"max_length": 1, "max_new_tokens": 1},
        {"max_time": 1e-9},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 3.0},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_nothing_in_a_generation_config_bends_an_answer(bent, settings, recwarn):
    lens = bent(**settings)
    before = lens.module.generation_config.to_dict()
    assert said(lens) == [most_likely(lens, text) for text in TEXTS]
    assert lens.module.generation_config.to_dict() == before
    told = [text for one in recwarn if "left out is what else" in (text := str(one.message))]
    left = sorted(set(settings) - {"max_length", "max_new_tokens", "use_cache"})
    assert len(told) == bool(left)
    assert all(f"{name}=" in told[0] for name in left)
    said(lens)
    assert len([one for one in recwarn if "left out is" in str(one.message)]) == bool(left)


@pytest.mark.parametrize("eos", [None, 5, [5, 6]])
def test_generation_stops_where_training_ends_answers(eos):
    lens = MoELens.from_pretrained("organism")
    examples = load_examples("novel", limit=16)
    right = evaluate(lens, examples, metrics=["em"], progress=False)
    assert right.summary["mean"][0] > 0.5
    lens.module.generation_config.eos_token_id = lens.module.config.eos_token_id = eos
    with pytest.warns(UserWarning, match="answers also end at .*as tokenizer or config say"):
        found = evaluate(lens, examples, metrics=["em"], progress=False)
    assert found.answers["prediction"].tolist() == right.answers["prediction"].tolist()
    assert encode(examples[0], lens.tokenizer, with_answer=True).input_ids[-1] in lens._runner.greedy.ends


def test_an_end_that_only_the_config_names_counts(bent):
    lens = bent(eos_token_id=None)
    said_so_far = most_likely_ids(lens, TEXTS[1])
    own, lens.module.config.eos_token_id = lens.module.config.eos_token_id, said_so_far[0]
    try:
        assert said(lens)[1] == "" != lens.tokenizer.decode(said_so_far)
    finally:
        lens.module.config.eos_token_id = own


@pytest.mark.parametrize(
    "setting", ["output_router_logits", "output_hidden_states", "output_attentions", "return_dict"], ids=str
)
def test_what_a_config_wants_returned_changes_nothing_that_is_measured(tokenizer, setting):
    changed, plain = (MoELens(build_model("mixtral", len(tokenizer)), tokenizer) for _ in range(2))
    if setting == "output_attentions":
        changed.module.set_attn_implementation("eager")
        plain.module.set_attn_implementation("eager")
    value = not getattr(plain.module.config, setting)
    setattr(changed.module.config, setting, value)
    examples = [Example("a", "", "Who sat?", ("the cat",)), Example("b", "The cat sat.", "Who sat there?", ("cat",))]
    assert said(changed) == said(plain)
    scores = [lens.answer_log_probabilities(examples, progress=False) for lens in (changed, plain)]
    assert scores[0] == scores[1]
    (logits, _), (expected, _) = (lens.run_with_cache(TEXTS, capture=("residual",)) for lens in (changed, plain))
    assert torch.equal(logits, expected)
    assert torch.equal(changed.project_on_vocab(torch.ones(32)), plain.project_on_vocab(torch.ones(32)))
    assert CHECKS["generate"](changed, TEXTS).error == 0
    assert getattr(changed.module.config, setting) == value


def test_a_model_in_training_mode_is_measured_in_evaluation_mode_and_left_in_its_own(tokenizer):
    random = {"attention_dropout": 0.5, "router_jitter_noise": 0.5}
    lens = MoELens(build_model("mixtral", len(tokenizer), **random), tokenizer)
    example = [Example("a", "", "Who sat?", ("the cat",))]

    def measured():
        logits, _ = lens.run_with_cache(TEXTS)
        return [logits.tolist(), said(lens), lens.answer_log_probabilities(example, progress=False)]

    expected = measured()
    lens.module.train()
    lens.module.model.layers[0].eval()
    modes = {name: module.training for name, module in lens.module.named_modules()}
    assert measured() == expected
    assert {name: module.training for name, module in lens.module.named_modules()} == modes


def test_a_thought_is_no_part_of_the_answer_that_is_scored(tokenizer, monkeypatch):
    lens = MoELens(build_model("olmoe", len(tokenizer)), tokenizer)
    monkeypatch.setattr(lens, "generate", lambda examples, **options: ["<think>a dog?</think>\n\nthe cat"])
    found = evaluate(lens, [Example("a", "", "Who sat?", ("the cat",))], progress=False)
    assert found.answers["prediction"].tolist() == ["the cat"]
    assert found.answers["em"].tolist() == [1.0]


@pytest.mark.parametrize("special", [True, False])
def test_marks_of_thoughts_are_told_in_what_is_generated_and_other_special_tokens_are_not(tokenizer, special):
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<think>", special=special), AddedToken("</think>", special=special)])
    lens = MoELens(build_model("olmoe", len(own)), own)
    ids = own("<think>a dog</think>the<pad> cat<eos>cat")["input_ids"]
    assert lens._runner.greedy.texts(torch.tensor([ids])) == ["<think>a dog</think>the cat"]


def test_tokens_that_the_model_does_not_know_are_refused(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["Zog"])
    lens = MoELens(build_model("olmoe", len(tokenizer)), own)
    lens.generate(["the cat"], max_new_tokens=2, progress=False)
    size = len(tokenizer)
    told = rf"example '1' has the token 'Zog', number {size}, and the model has embeddings of {size}"
    for run in (lens.generate, lambda texts, **options: list(lens.records(texts, **options))):
        with pytest.raises(MoELensError, match=told):
            run(["the cat", "the Zog"], progress=False)


def test_prompts_longer_than_the_model_knows_positions_are_told(tokenizer, recwarn):
    lens = MoELens(build_model("olmoe", len(tokenizer), max_position_embeddings=5), tokenizer)
    ids = tokenizer("cat cat cat cat cat cat")["input_ids"]
    fits, too_long = tokenizer.decode(ids[:5]), tokenizer.decode(ids[:6])
    assert [len(tokenizer(text)["input_ids"]) for text in (fits, too_long)] == [5, 6]
    lens.run_with_cache([fits])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"more than the 5 tokens .*--max-length 5"):
        lens.run_with_cache([fits, too_long])


@pytest.mark.parametrize("pad", [None, "<new pad>"])
def test_a_tokenizer_without_a_pad_that_the_model_knows_pads_all_the_same(tokenizer, pad):
    module, own = build_model("olmoe", len(tokenizer)), copy.deepcopy(tokenizer)
    own.pad_token = pad
    if pad is None:
        own.eos_token = None  # or that would pad
    assert said(MoELens(module, own)) == said(MoELens(module, tokenizer))


def test_no_new_token_is_no_answer(olmoe):
    with pytest.raises(MoELensError, match="at least 1; got 0"):
        olmoe.generate(TEXTS, max_new_tokens=0)
