"""Greedy generation against the bare model and against masks made with plain torch hooks."""

from functools import partial

import pytest
import torch
from conftest import build_model, most_used
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from moe_lens.data import Example, load_examples
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.lens.interventions import Renormalize, Reroute, Rows, Zero
from moe_lens.lens.lens import MoELens

TEXTS = [
    "the cat sat on the mat",
    "The capital of Arland is",
    "a dog slept",
    "the",
    "The cat slept in the sun",
]
NEW_TOKENS = 6


def bare_generation(lens, texts, **options):
    """The bare model's own greedy generation, one text at a time, up to what anyone calls end-of-sequence."""
    of_generation = lens.module.generation_config.eos_token_id
    of_generation = of_generation if isinstance(of_generation, list) else [of_generation]
    ends = [*of_generation, lens.module.config.eos_token_id, lens.tokenizer.eos_token_id]
    ends = torch.tensor([end for end in ends if end is not None])
    continued = []
    for text in texts:
        ids = torch.tensor([lens.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            output = lens.module.generate(
                ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends.tolist(), **options
            )
        new = output[0, ids.shape[1] :]
        length = next((i for i, token in enumerate(new) if torch.isin(token, ends)), len(new))
        continued.append(lens.tokenizer.decode(new[:length], skip_special_tokens=True))
    return continued


def hook_masked_generation(lens, texts, experts, edit, **options):
    """The same with gating weights edited by a torch hook on the experts, without any tracing library."""
    handles = []

    def hook(ids, module, arguments):
        hidden, indices, weights = arguments
        return hidden, indices, edit(weights, torch.isin(indices, ids))

    for layer in experts.layers:
        masking = partial(hook, torch.tensor(experts[layer]))
        handles.append(lens.module.model.layers[layer].mlp.experts.register_forward_pre_hook(masking))
    try:
        return bare_generation(lens, texts, **options)
    finally:
        for handle in handles:
            handle.remove()


def zeroed(weights, hit):
    return weights * ~hit


def rescaled(weights, hit):
    rest = weights * ~hit
    return rest * torch.nan_to_num(weights.sum(-1, keepdim=True) / rest.sum(-1, keepdim=True), posinf=0.0)


def said_third(lens, texts):
    """The third token that the model says after each text."""
    prompts = [lens.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        said = [lens.module.generate(ids, max_new_tokens=3, do_sample=False) for ids in prompts]
    return [ids[0, -1].item() for ids in said]


@pytest.fixture
def whole_texts(lens):
    """Makes the tokens said third after two of the texts the ends of sequence; gives the whole texts."""
    whole, ends = bare_generation(lens, TEXTS), said_third(lens, TEXTS[:2])
    config = lens.module.generation_config
    old, config.eos_token_id = config.eos_token_id, ends
    yield whole
    config.eos_token_id = old


def test_generation_equals_the_bare_models(lens):
    texts = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=2, progress=False)
    assert texts == bare_generation(lens, TEXTS)


@pytest.mark.parametrize(("kind", "edit"), [(Zero, zeroed), (Renormalize, rescaled)], ids=["zero", "renormalize"])
def test_masked_generation_equals_torch_hooks(lens, kind, edit):
    experts = most_used(lens, TEXTS, size=2)
    with lens.intervene(kind(experts)):
        masked = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=3, progress=False)
    assert masked == hook_masked_generation(lens, TEXTS, experts, edit)
    assert masked != bare_generation(lens, TEXTS)


def test_generation_that_ends_early_equals_the_bare_models(lens, whole_texts):
    experts = most_used(lens, TEXTS, size=1)
    plain = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=5, progress=False)
    assert plain == bare_generation(lens, TEXTS)
    assert all(cut != whole for cut, whole in zip(plain[:2], whole_texts, strict=False))
    with lens.intervene(Zero(experts)):
        masked = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=5, progress=False)
        alone = lens.generate(TEXTS[:1], max_new_tokens=NEW_TOKENS, progress=False)
    assert masked == hook_masked_generation(lens, TEXTS, experts, zeroed)
    assert alone == masked[:1]


def test_every_row_ending_before_the_limit_is_no_error(olmoe):
    config = olmoe.module.generation_config
    old = config.eos_token_id
    config.eos_token_id = list(range(olmoe.module.config.vocab_size))
    try:
        with olmoe.intervene(Zero(most_used(olmoe, TEXTS, size=1))):
            nothing = olmoe.generate(TEXTS, max_new_tokens=NEW_TOKENS, progress=False)
    finally:
        config.eos_token_id = old
    assert nothing == [""] * len(TEXTS)


def test_rerouted_generation_never_uses_the_experts(lens):
    experts = most_used(lens, TEXTS, size=1)
    used = {layer: set() for layer in experts.layers}
    with lens.intervene(Reroute(experts)):
        texts = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, progress=False)
        with torch.no_grad(), lens.model.generate(TEXTS[:3], max_new_tokens=4, do_sample=False) as tracer:
            for _ in tracer.iter[:4]:
                for layer in experts.layers:
                    used[layer] |= set(lens.selected_experts[layer].flatten().tolist())
    assert texts != bare_generation(lens, TEXTS)
    assert all(not used[layer] & set(experts[layer]) for layer in experts.layers)
    assert all(len(used[layer]) >= lens.architecture.top_k for layer in experts.layers)


def test_each_row_generates_under_its_own_intervention(lens):
    experts = most_used(lens, TEXTS, size=2)
    own = (Zero(experts), None, Reroute(experts.restrict(experts.layers[-1:])), None, Renormalize(experts))
    with lens.intervene(Rows(own)):
        together = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=5, progress=False)
    for text, intervention, continued in zip(TEXTS, own, together, strict=True):
        with lens.intervene(*([intervention] if intervention else [])):
            assert lens.generate([text], max_new_tokens=NEW_TOKENS, progress=False) == [continued]


def test_a_users_generate_trace_is_masked_at_every_step(olmoe):
    experts = most_used(olmoe, TEXTS, size=2)
    with olmoe.intervene(Zero(experts)):
        expected = olmoe.generate([TEXTS[0]], max_new_tokens=NEW_TOKENS, progress=False)
        with (
            torch.no_grad(),
            olmoe.model.generate(TEXTS[0], max_new_tokens=NEW_TOKENS, do_sample=False) as tracer,
        ):
            ids = tracer.result.save()
    start = len(olmoe.tokenizer(TEXTS[0])["input_ids"])
    assert [olmoe.tokenizer.decode(ids[0, start:], skip_special_tokens=True)] == expected


def test_beams_are_masked_like_single_sequences(olmoe):
    experts = most_used(olmoe, TEXTS, size=2)
    expected = hook_masked_generation(olmoe, TEXTS[:1], experts, zeroed, num_beams=3)
    with (
        olmoe.intervene(Zero(experts)),
        torch.no_grad(),
        olmoe.model.generate(TEXTS[0], max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=3) as tracer,
    ):
        ids = tracer.result.save()
    start = len(olmoe.tokenizer(TEXTS[0])["input_ids"])
    assert [olmoe.tokenizer.decode(ids[0, start:], skip_special_tokens=True)] == expected


def test_generation_is_plain_again_after_an_exception(lens):
    plain = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, progress=False)
    with pytest.raises(RuntimeError, match="mine"), lens.intervene(Zero(most_used(lens, TEXTS, size=2))):
        raise RuntimeError("mine")
    assert lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, progress=False) == plain


def test_no_examples_give_no_texts(olmoe):
    assert olmoe.generate([], progress=False) == []


def test_rows_that_end_early_show_no_padding():
    letters = Tokenizer(WordLevel({letter: number for number, letter in enumerate("abcdefghijklmnop")}))
    letters.pre_tokenizer = Split("", "isolated")
    lens = MoELens(build_model("olmoe", 16), PreTrainedTokenizerFast(tokenizer_object=letters))
    texts = ["bcd", "fg", "hijk"]
    lens.module.generation_config.eos_token_id = said_third(lens, texts[:1])
    cut = lens.generate(texts, max_new_tokens=NEW_TOKENS, progress=False)
    assert cut == bare_generation(lens, texts)
    assert len(cut[0]) < max(map(len, cut))


def test_records_of_what_was_generated_hold_its_steps():
    lens = MoELens.from_pretrained("organism")
    examples = load_examples("swap")[:4]
    texts = lens.generate(examples, progress=False)
    assert all(text.startswith(" ") for text in texts)
    ask = {"capture": ("logits",), "positions": {"last", "decode"}, "progress": False}
    [record] = lens.records(examples, continuations=texts, **ask)
    row, place = (record.labels != IGNORED_LABEL).nonzero(as_tuple=True)
    at = torch.searchsorted(record.kept, place - 1)
    assert torch.equal(record.logits[row, at].argmax(-1), record.labels[row, place])  # greedy, end of sequence too
    steps = record.position_mask("decode").sum(1).tolist()
    stripped = [len(lens.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]) for text in texts]
    by_id = dict(zip((example.id for example in examples), stripped, strict=True))
    assert steps == [by_id[name] for name in record.ids]


def test_records_of_nothing_generated_have_no_step(olmoe):
    examples = [Example("a", "", "What sat?", ("cat",)), Example("b", "", "What is in the sun?", ("dog",))]
    ask = {"capture": ("residual", "attention", "expert_outputs"), "positions": "decode", "progress": False}
    [some] = olmoe.records(examples, continuations=["", " cat"], **ask)
    steps = dict(zip(some.ids, some.position_mask("decode").sum(1).tolist(), strict=True))
    assert steps["a"] == 0 < steps["b"]
    [none] = olmoe.records(examples, continuations=["", ""], **ask)
    assert len(none.kept) == 0
