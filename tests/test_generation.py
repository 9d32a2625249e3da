"""Greedy generation against the bare model and against masks made with plain torch hooks."""

import pytest
import torch
from conftest import most_used

from moe_lens.interventions import Renormalize, Reroute, Rows, Zero

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept", "the", "The cat slept in the sun"]
NEW_TOKENS = 8


def bare_generation(lens, texts, **options):
    """The bare model's own greedy generation, one text at a time, cut at end-of-sequence."""
    continued = []
    for text in texts:
        ids = torch.tensor([lens.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            output = lens.module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **options
            )
        continued.append(lens.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return continued


def hook_masked_generation(lens, texts, experts, edit, **options):
    """The same with gating weights edited by a torch hook on the experts, without any tracing library."""
    handles = []
    for layer in experts.layers:

        def hook(module, arguments, ids=torch.tensor(experts[layer])):
            hidden, indices, weights = arguments
            return hidden, indices, edit(weights, torch.isin(indices, ids))

        handles.append(lens.module.model.layers[layer].mlp.experts.register_forward_pre_hook(hook))
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


@pytest.fixture
def end_of_sequence(lens):
    """A token that the model says early and for several texts, made its end-of-sequence."""
    texts = [lens.tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    with torch.no_grad():
        third = [lens.module.generate(ids, max_new_tokens=3, do_sample=False)[0, -1].item() for ids in texts]
    config = lens.module.generation_config
    old = config.eos_token_id
    config.eos_token_id = third[:2]
    yield third[:2]
    config.eos_token_id = old


def test_generation_equals_the_bare_models(lens):
    assert lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=2, progress=False) == bare_generation(
        lens, TEXTS
    )


@pytest.mark.parametrize(("kind", "edit"), [(Zero, zeroed), (Renormalize, rescaled)], ids=["zero", "renormalize"])
def test_masked_generation_equals_torch_hooks(lens, kind, edit):
    experts = most_used(lens, TEXTS, size=2)
    with lens.intervene(kind(experts)):
        masked = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=3, progress=False)
    assert masked == hook_masked_generation(lens, TEXTS, experts, edit)
    assert masked != bare_generation(lens, TEXTS)


def test_generation_that_ends_early_equals_the_bare_models(lens, end_of_sequence):
    experts = most_used(lens, TEXTS, size=1)
    plain = lens.generate(TEXTS, max_new_tokens=NEW_TOKENS, batch_size=5, progress=False)
    assert plain == bare_generation(lens, TEXTS)
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
            one_token = olmoe.generate(TEXTS, max_new_tokens=NEW_TOKENS, progress=False)
    finally:
        config.eos_token_id = old
    assert one_token == [""] * len(TEXTS) or all(len(text) <= 2 for text in one_token)


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
        with torch.no_grad(), olmoe.model.generate(
            TEXTS[0], max_new_tokens=NEW_TOKENS, do_sample=False
        ) as tracer:
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
