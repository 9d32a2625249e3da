"""Attention rows against the eager implementation's full maps, on padded batches."""

import copy

import pytest
import torch
from conftest import left_padded
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_lens import MoELens
from moe_lens.architecture.tiny import tiny_model, tiny_tokenizer
from moe_lens.errors import MoELensError
from moe_lens.lens.attention import attention_rows

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]


def eager_maps(lens, texts):
    """Attention of all positions by transformers' eager implementation, per layer [batch, head, pos, pos]."""
    lens.module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return lens.module(**left_padded(lens, texts), output_attentions=True).attentions
    finally:
        lens.module.set_attn_implementation("sdpa")


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=["padded", "single"])
def test_rows_equal_those_of_eager_attention(lens, texts):
    maps = eager_maps(lens, texts)
    _, record = lens.run_with_cache(texts, capture=("attention",))
    real = record.attention_mask.bool()
    assert len(record.attention_rows) == lens.architecture.n_layers
    for layer, rows in record.attention_rows.items():
        for row in range(len(texts)):
            assert_close(rows[row][:, real[row]], maps[layer][row][:, real[row]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["inkling_text", "inkling2_text", "gpt_oss", "gemma4_text", "deepseek_v3"])
def test_single_rows_are_those_of_all_rows(family):
    """Also where attention is given more than a mask: a bias for each query and key, or sinks, of each query too."""
    lens = MoELens(tiny_model(family), tiny_tokenizer())
    lens.batch_size = len(TEXTS)
    _, whole = lens.run_with_cache(TEXTS, capture=("attention",))
    for positions in ("last", "all"):
        [record] = lens.records(TEXTS, capture=("attention",), positions=positions, progress=False)
        order = [int(name) for name in record.ids]  # the longest first
        for layer, rows in record.attention_rows.items():
            assert rows.shape[2] == len(record.kept)
            expected = whole.attention_rows[layer][order][:, :, record.kept]
            assert_close(rows, expected, rtol=1e-4, atol=1e-6)


def test_rows_sum_to_one_and_ignore_pads(lens):
    [record] = lens.records(TEXTS, capture=("attention",), progress=False)
    pads = record.attention_mask == 0
    for rows in record.attention_rows.values():
        assert rows.shape[2] == 1
        assert_close(rows.sum(-1), torch.ones_like(rows.sum(-1)))
        assert (rows.transpose(1, 3)[pads] == 0).all()


def test_outputs_stay_bit_for_bit_those_of_the_model(lens):
    with torch.no_grad():
        plain = lens.module(**left_padded(lens, TEXTS)).logits
        with attention_rows(lens.module, [-1]):
            recorded = lens.module(**left_padded(lens, TEXTS)).logits
    assert torch.equal(recorded, plain)


def test_a_model_with_eager_attention_gives_the_same_rows(olmoe):
    maps = eager_maps(olmoe, TEXTS)
    olmoe.module.set_attn_implementation("eager")
    try:
        [record] = olmoe.records(TEXTS, capture=("attention",), progress=False)
    finally:
        olmoe.module.set_attn_implementation("sdpa")
    order = [int(name) for name in record.ids]
    for layer, rows in record.attention_rows.items():
        assert_close(rows[:, :, 0], maps[layer][order, :, -1])


def test_single_query_steps_with_a_cache_give_the_row_of_the_whole(olmoe):
    encoded = left_padded(olmoe, TEXTS[:1])
    maps = eager_maps(olmoe, TEXTS[:1])
    ids, width = encoded["input_ids"], encoded["input_ids"].shape[1]
    rows = []
    attention = olmoe.module.model.layers[2].self_attn
    hook = attention.register_forward_hook(lambda *call: rows.append(call[-1][1]))
    try:
        with torch.no_grad(), attention_rows(olmoe.module, [-1]):
            cache = olmoe.module(input_ids=ids[:, :-1]).past_key_values
            olmoe.module(input_ids=ids[:, -1:], past_key_values=cache)
    finally:
        hook.remove()
    assert rows[1].shape[-2:] == (1, width)
    assert_close(rows[1][..., 0, :], maps[2][:, :, -1])


def test_the_table_of_attention_functions_is_restored(olmoe):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention_rows(olmoe.module, [-1]):
        outer = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with attention_rows(olmoe.module, [0, 1]):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not outer
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is outer
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before

    def fail():
        with attention_rows(olmoe.module, [-1]):
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_an_attention_function_of_the_users_own_is_put_back(olmoe):
    library = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own = lambda *call, **named: library(*call, **named)  # noqa: E731
    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        with attention_rows(olmoe.module, [-1]):
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is library


def test_no_map_of_all_positions_is_made(olmoe, monkeypatch):
    made = []
    module = __import__(type(olmoe.module).__module__, fromlist=["eager_attention_forward"])
    eager = module.eager_attention_forward

    def watched(*arguments, **options):
        output, weights = eager(*arguments, **options)
        made.append(weights.shape)
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", watched)
    list(olmoe.records(TEXTS, capture=("attention",), progress=False))
    assert made
    assert all(shape[-2] == 1 for shape in made)


def test_refuses_rows_that_are_not_there(olmoe):
    with (
        pytest.raises(MoELensError, match=r"among the \d+ positions"),
        attention_rows(olmoe.module, [99]),
        torch.no_grad(),
    ):
        olmoe.module(**left_padded(olmoe, TEXTS))


def test_refuses_other_implementations(olmoe):
    config = copy.deepcopy(olmoe.module.config)
    config._attn_implementation_internal = "flash_attention_2"

    class Model(torch.nn.Module):
        pass

    model = Model()
    model.config = config
    with pytest.raises(MoELensError, match="runs 'flash_attention_2'"), attention_rows(model, [-1]):
        pass
