"""The lens against the bare model: logits, what is recorded, batching, loading and users' own traces."""

import copy

import pytest
import torch
from conftest import build_model, left_padded, most_used
from torch.testing import assert_close

from moe_lens.data import FIGURE_10, Example, encode
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import batching
from moe_lens.lens.accessors import ByLayer
from moe_lens.lens.attention import attention_rows
from moe_lens.lens.interventions import Reroute, Zero
from moe_lens.lens.lens import MoELens
from moe_lens.lens.record import CAPTURES
from moe_lens.statistics import ExpertUsage

TEXTS = ["the cat sat on the mat", "The capital of Arland is", "a dog slept"]
EXAMPLES = [
    Example("long", "The capital of Arland is Belmor, where dogs sleep.", "What is the capital?", ("Belmor",)),
    Example("closed", "", "What is the capital of Arland?", ("Belmor",)),
    Example("short", "The cat sat.", "What sat?", ("cat",)),
]


def hooked(module, texts_input):
    """By plain torch hooks: each router's output, the experts' inputs, and each layer's output."""
    seen = {"router": [], "experts": [], "layer": []}
    handles = []

    def keep(name):
        return lambda *call: seen[name].append(call[-1])

    for layer in module.model.layers:
        handles.append(layer.register_forward_hook(keep("layer")))
        if hasattr(layer.mlp, "experts"):
            handles.append(layer.mlp.gate.register_forward_hook(keep("router")))
            handles.append(layer.mlp.experts.register_forward_pre_hook(keep("experts")))
    try:
        with torch.no_grad():
            module(**texts_input)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_logits_equal_the_bare_models_bit_for_bit(lens):
    with torch.no_grad():
        padded = lens.module(**left_padded(lens, TEXTS)).logits
        ids = torch.tensor([lens.tokenizer(TEXTS[0])["input_ids"]])
        single = lens.module(input_ids=ids).logits
    assert torch.equal(lens.run_with_cache(TEXTS)[0], padded)
    assert torch.equal(lens.run_with_cache(TEXTS[0])[0], single)


def test_wrapping_changes_neither_model_nor_tokenizer(tokenizer):
    model = build_model("mixtral", len(tokenizer))
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    MoELens(model, tokenizer)
    assert tokenizer.padding_side == "right"
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_recorded_routing_is_what_hooks_see(lens):
    seen = hooked(lens.module, left_padded(lens, TEXTS))
    _, record = lens.run_with_cache(TEXTS)
    batch, width = record.input_ids.shape
    assert tuple(record.routing) == lens.architecture.moe_layers
    calls = zip(record.routing.values(), seen["router"], seen["experts"], strict=True)
    for routing, router, experts in calls:
        assert torch.equal(routing.logits, router[0].view(batch, width, -1))
        assert torch.equal(routing.indices, experts[1].view(batch, width, -1))
        assert torch.equal(routing.weights, experts[2].view(batch, width, -1))


def test_recorded_gating_weights_equal_an_independent_recomputation(lens):
    _, record = lens.run_with_cache(TEXTS)
    for routing in record.routing.values():
        assert_close(lens.architecture.scoring.weights(routing.logits, routing.indices), routing.weights)


def test_recorded_residual_is_each_layers_output(lens):
    seen = hooked(lens.module, left_padded(lens, TEXTS))
    _, record = lens.run_with_cache(TEXTS, capture=("residual",))
    assert tuple(record.residual) == tuple(range(lens.architecture.n_layers))
    for residual, output in zip(record.residual.values(), seen["layer"], strict=True):
        assert torch.equal(residual, output)


def test_a_record_holds_only_what_was_asked_for(olmoe):
    [record] = olmoe.records(TEXTS, progress=False)
    assert record.routing
    assert (record.residual, record.attention_rows, record.logits) == ({}, {}, None)
    [record] = olmoe.records(TEXTS, capture=("logits", "residual"), progress=False)
    assert record.routing == {}
    assert record.logits.shape == (3, 1, olmoe.module.config.vocab_size)
    assert record.residual[0].shape == (3, 1, olmoe.architecture.d_model)


def test_what_is_kept_owns_its_memory(olmoe):
    [record] = olmoe.records(TEXTS, capture=("logits", "residual", "attention"), progress=False)
    for tensor in (record.logits, record.residual[1], record.attention_rows[1]):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_batched_equals_one_by_one(lens):
    capture = ("routing", "residual", "attention", "logits")
    [together] = lens.records(TEXTS, capture=capture, batch_size=3, progress=False)
    for row, name in enumerate(together.ids):
        [alone] = lens.records([TEXTS[int(name)]], capture=capture, progress=False)
        pads = int((together.attention_mask[row] == 0).sum())
        assert_close(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-5)
        for layer, routing in alone.routing.items():
            assert torch.equal(together.routing[layer].indices[row, pads:], routing.indices[0])
            weights = together.routing[layer].weights[row, pads:]
            assert_close(weights, routing.weights[0], rtol=1e-4, atol=1e-5)
        for layer, rows in alone.attention_rows.items():
            assert_close(together.residual[layer][row], alone.residual[layer][0], rtol=1e-4, atol=1e-5)
            assert_close(together.attention_rows[layer][row, ..., pads:], rows[0], rtol=1e-4, atol=1e-5)


def test_records_bucket_by_length_and_name_their_rows(olmoe):
    texts = ["a b c d e", "a", "a b c", "a b c d", "a b"]
    records = list(olmoe.records(texts, batch_size=2, progress=False))
    assert [record.ids for record in records] == [("0", "3"), ("2", "4"), ("1",)]
    assert all(record.attention_mask[:, -1].all() for record in records)


def test_records_read_no_further_ahead_than_a_window(olmoe, monkeypatch):
    monkeypatch.setattr("moe_lens.lens.batching.BATCHES_PER_WINDOW", 2)
    taken = []

    def stream():
        for number in range(100):
            taken.append(number)
            yield "a b"

    next(olmoe.records(stream(), batch_size=3, progress=False))
    assert len(taken) == 6


def test_spans_name_context_question_and_answer_in_padded_positions(olmoe):
    for record in olmoe.records(EXAMPLES, batch_size=3, progress=False):
        for row, name in enumerate(record.ids):
            example = next(example for example in EXAMPLES if example.id == name)
            encoded = encode(example, olmoe.tokenizer, template=FIGURE_10)
            text = {
                "context": record.context_spans[row],
                "question": record.question_spans[row],
            }
            for part, span in text.items():
                expected = getattr(encoded, part)
                if expected is None:
                    assert span is None
                else:
                    assert record.input_ids[row, span].tolist() == list(encoded.input_ids[expected])
            for span in record.answer_spans[row]:
                assert example.answers[0] in olmoe.tokenizer.decode(record.input_ids[row, span])


def test_position_masks_never_hold_pads(olmoe):
    [record] = olmoe.records(EXAMPLES, progress=False)
    for positions in ("all", "context", "question", "last"):
        mask = record.position_mask(positions)
        assert not (mask & (record.attention_mask == 0)).any()
    closed = record.ids.index("closed")
    assert record.position_mask("context").any(1).tolist() == [name != "closed" for name in record.ids]
    assert record.position_mask("question")[closed].any()
    assert record.position_mask("last").sum(1).tolist() == [1, 1, 1]
    with pytest.raises(MoELensError, match=r"all, prompt, context, question, from_question, last, .*; got 'middle'"):
        record.position_mask("middle")


@pytest.mark.parametrize("positions", ["all", "context", "question", "last"])
def test_kept_rows_are_those_of_the_whole_run(olmoe, positions):
    capture = ("logits", "residual", "attention")
    [whole] = olmoe.records(EXAMPLES, capture=capture, positions="all", progress=False)
    [part] = olmoe.records(EXAMPLES, capture=capture, positions=positions, progress=False)
    assert torch.equal(part.kept, whole.position_mask(positions).any(0).nonzero()[:, 0])
    assert_close(part.logits, whole.logits[:, part.kept])
    for layer in range(olmoe.architecture.n_layers):
        assert torch.equal(part.residual[layer], whole.residual[layer][:, part.kept])
        assert_close(part.attention_rows[layer], whole.attention_rows[layer][:, :, part.kept])


def test_measuring_is_one_pass_over_the_records(olmoe):
    statistics = ExpertUsage(), ExpertUsage(value="gate")
    usage, gates = olmoe.measure(EXAMPLES, *statistics, batch_size=2, progress=False)
    expected = ExpertUsage()
    for record in olmoe.records(EXAMPLES, batch_size=1, progress=False):
        expected.update(record)
    assert_close(torch.tensor(usage.table()["score"]), torch.tensor(expected.table()["score"]))
    assert gates.counted == len(EXAMPLES)
    assert usage.table().groupby("layer")["score"].sum().tolist() == pytest.approx([1, 1, 1])


def test_records_must_be_read_under_the_interventions_they_were_asked_under(olmoe):
    with olmoe.intervene(Zero(ExpertSet.of({1: [0]}))):
        late = olmoe.records(TEXTS, progress=False)
    with pytest.raises(MoELensError, match="under other interventions"):
        next(late)


def test_interventions_between_records_do_not_disturb_them(olmoe):
    for record in olmoe.records(TEXTS, batch_size=1, progress=False):
        with olmoe.intervene(Zero(ExpertSet.of({1: [0]}))):
            olmoe.run_with_cache("a dog")
        assert record.routing[1] is record.routing_before[1]


def test_accessors_read_what_the_record_holds(lens):
    layer = lens.architecture.moe_layers[-1]
    _, record = lens.run_with_cache(TEXTS, capture=("routing", "residual"))
    encoded = left_padded(lens, TEXTS)
    with torch.no_grad(), attention_rows(lens.module, [-1]), lens.model.trace(**encoded):
        rows = lens.attention_rows[layer].save()
        router = lens.routers[layer].output[0].save()
        logits = lens.router_logits[layer].save()
        selected = lens.selected_experts[layer].save()
        weights = lens.gating_weights[layer].save()
        residual = lens.layers_output[layer].save()
    assert rows.shape == (3, lens.module.config.num_attention_heads, 1, encoded["input_ids"].shape[1])
    assert torch.equal(router.view(logits.shape), logits)
    assert torch.equal(logits, record.routing[layer].logits)
    assert torch.equal(selected, record.routing[layer].indices)
    assert torch.equal(weights, record.routing[layer].weights)
    assert torch.equal(residual, record.residual[layer])


def test_a_users_trace_inside_the_block_is_intervened_on(lens):
    experts = most_used(lens, TEXTS, size=2)
    encoded = left_padded(lens, TEXTS)
    for intervention in (Zero(experts), Reroute(experts.restrict([lens.architecture.moe_layers[-1]]))):
        with lens.intervene(intervention):
            expected, record = lens.run_with_cache(TEXTS)
            layer = intervention.layers[-1]
            with torch.no_grad(), lens.model.trace(**encoded):
                weights = lens.gating_weights[layer].save()
                logits = lens.model.output.logits.save()
        assert torch.equal(weights, record.routing[layer].weights)
        assert torch.equal(logits, expected)


def test_a_trace_stopped_before_the_masked_layer_is_no_error(olmoe):
    with (
        olmoe.intervene(Zero(ExpertSet.of({0: [1], 2: [0]}))),
        torch.no_grad(),
        olmoe.model.trace(**left_padded(olmoe, TEXTS)) as tracer,
    ):
        residual = olmoe.layers_output[0].save()
        tracer.stop()
    assert residual.shape[0] == 3


def test_a_layer_skipped_by_the_user_leaves_later_ones_masked(olmoe):
    experts = most_used(olmoe, TEXTS, size=3)
    with olmoe.intervene(Zero(experts)), torch.no_grad(), olmoe.model.trace(**left_padded(olmoe, TEXTS)):
        block = olmoe.model.model.layers[1]
        block.skip(block.input)
        weights = olmoe.gating_weights[2].save()
    assert (weights == 0).any()


def test_assigned_weights_and_residuals_take_effect(olmoe):
    experts = most_used(olmoe, TEXTS, size=2)
    with olmoe.intervene(Zero(experts)):
        expected, _ = olmoe.run_with_cache(TEXTS)
    with torch.no_grad(), olmoe.model.trace(**left_padded(olmoe, TEXTS)):
        for layer in experts.layers:
            hit = torch.isin(olmoe.selected_experts[layer], torch.tensor(experts[layer]))
            olmoe.gating_weights[layer] = olmoe.gating_weights[layer].masked_fill(hit, 0)
        masked = olmoe.model.output.logits.save()
    with torch.no_grad(), olmoe.model.trace(**left_padded(olmoe, TEXTS)):
        olmoe.layers_output[2] = torch.zeros_like(olmoe.layers_output[2])
        emptied = olmoe.model.output.logits.save()
    assert torch.equal(masked, expected)
    assert (emptied == 0).all()


def test_gradients_reach_router_weights_through_a_users_trace(olmoe):
    with olmoe.model.trace(**left_padded(olmoe, TEXTS)):
        loss = olmoe.gating_weights[1].square().sum().save()
    weight = olmoe.module.model.layers[1].mlp.gate.weight
    [gradient] = torch.autograd.grad(loss, [weight])
    assert gradient.abs().max() > 0


def test_accessors_refuse_what_would_mislead(olmoe):
    with pytest.raises(MoELensError, match="can only be read"):
        olmoe.router_logits[0] = torch.zeros(1)
    with pytest.raises(MoELensError, match="layer 7 has no routed experts"):
        olmoe.routers[7]
    with pytest.raises(MoELensError, match="attention_rows"), olmoe.model.trace(**left_padded(olmoe, TEXTS)):
        olmoe.attention_rows[0].save()
    with pytest.raises(MoELensError, match="several invokes"), olmoe.model.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            olmoe.gating_weights[0].save()
        with tracer.invoke(TEXTS[1]):
            olmoe.gating_weights[1].save()
    for layer in (-1, olmoe.architecture.n_layers):
        with pytest.raises(MoELensError, match=rf"layers 0 to \d+; got {layer}"):
            olmoe.attention_rows[layer]
    assert isinstance(olmoe.routers, ByLayer)


def test_bad_requests_say_what_is_possible(olmoe):
    with pytest.raises(MoELensError, match=f"{', '.join(sorted(CAPTURES))}; got weights"):
        olmoe.records(TEXTS, capture=("weights",))
    with pytest.raises(MoELensError, match="batch_size=0"):
        olmoe.generate(TEXTS, batch_size=0)
    with pytest.raises(MoELensError, match="text 1 has no tokens"):
        olmoe.generate(["a", ""], progress=False)


def test_loading_from_a_folder_gives_the_same_logits(olmoe, tmp_path):
    olmoe.module.save_pretrained(tmp_path)
    olmoe.tokenizer.save_pretrained(tmp_path)
    loaded = MoELens.from_pretrained(tmp_path)
    assert torch.equal(loaded.run_with_cache(TEXTS)[0], olmoe.run_with_cache(TEXTS)[0])
    half = MoELens.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert half.module.dtype == torch.bfloat16
    placed = MoELens.from_pretrained(tmp_path, olmoe.tokenizer, device_map="cpu")
    assert placed.generate(TEXTS, max_new_tokens=3, progress=False) == olmoe.generate(
        TEXTS, max_new_tokens=3, progress=False
    )


def test_loading_refuses_what_is_not_there(tmp_path, tokenizer):
    with pytest.raises(MoELensError, match=r"cannot load .*nowhere"):
        MoELens.from_pretrained(tmp_path / "nowhere", tokenizer)
    with pytest.raises(MoELensError, match="organism:conflict, organism:planted; got 'organism:wild'"):
        MoELens.from_pretrained("organism:wild")
    with pytest.raises(MoELensError, match="pass tokenizer="):
        MoELens.from_pretrained(build_model("olmoe", len(tokenizer)))


@pytest.mark.parametrize("device_map", ["cuda:99", "cdua", "disk", 99, {"": "xpu:99"}, torch.device("cuda", 99)])
def test_a_device_that_is_not_there_is_refused_before_loading(device_map):
    with pytest.raises(MoELensError, match=r"there is no device '.*' here; there is cpu"):
        MoELens.from_pretrained("organism", device_map=device_map)


def test_a_lens_is_not_copied_but_its_model_opened_again(olmoe):
    with pytest.raises(MoELensError, match=r"open the model again with MoELens.from_pretrained"):
        copy.deepcopy(olmoe)
    with pytest.raises(MoELensError, match=r"cannot be copied with its model"):
        copy.deepcopy({"lens": olmoe})
    again = MoELens(copy.deepcopy(olmoe.module), olmoe.tokenizer)
    everything = Zero(ExpertSet.of({i: range(olmoe.architecture.n_experts) for i in olmoe.architecture.moe_layers}))
    plain, _ = olmoe.run_with_cache(TEXTS)
    with again.intervene(everything):
        zeroed, _ = again.run_with_cache(TEXTS)
        assert torch.equal(olmoe.run_with_cache(TEXTS)[0], plain)
    assert not torch.allclose(zeroed, plain)
    assert torch.equal(again.run_with_cache(TEXTS)[0], plain)


def test_one_text_or_example_is_refused(olmoe):
    with pytest.raises(MoELensError, match=r"put the one that came into a list: \['the cat'\]"):
        olmoe.generate("the cat", progress=False)
    with pytest.raises(MoELensError, match="expected a list of examples or texts"):
        olmoe.measure(Example("a", "c", "q", ("a",)), ExpertUsage(), progress=False)


CHAT = [{"role": "user", "content": "Who sat?"}]


@pytest.mark.parametrize("slip", [CHAT, CHAT[0]], ids=["list", "dict"])
def test_chat_messages_are_told_how_to_become_texts(olmoe, slip):
    kind = type(slip).__name__
    said = rf"an Example or a text, got {kind} at place 1; turn chat messages into text with tokenizer.apply_chat_templ"
    with pytest.raises(MoELensError, match=said):
        olmoe.generate(["Who sat?", slip], progress=False)
    with pytest.raises(MoELensError, match=said):
        olmoe.measure(["Who sat?", slip], ExpertUsage(), progress=False)
    with pytest.raises(MoELensError, match=r"got int at place 0$"):
        olmoe.generate([3], progress=False)


def test_calls_take_the_lenss_batch_size_unless_they_say_another(olmoe, monkeypatch):
    monkeypatch.setattr(olmoe, "batch_size", 2)
    assert [len(record.ids) for record in olmoe.records(TEXTS, progress=False)] == [2, 1]
    assert [len(record.ids) for record in olmoe.records(TEXTS, batch_size=3, progress=False)] == [3]
    monkeypatch.setattr(olmoe, "batch_size", 0)
    for call in (olmoe.records, olmoe.generate, olmoe.measure):
        with pytest.raises(MoELensError, match="batch_size=0"):
            list(call(TEXTS, progress=False))


def test_calls_show_progress_as_the_lens_says_unless_they_say_otherwise(olmoe, monkeypatch):
    shown = []
    bar = batching.progress_bar
    monkeypatch.setattr(batching, "progress_bar", lambda **asked: shown.append(not asked["disable"]) or bar(**asked))
    for said in (True, False):
        monkeypatch.setattr(olmoe, "progress", said)
        list(olmoe.records(TEXTS))
        olmoe.generate(TEXTS, max_new_tokens=1)
        olmoe.measure(TEXTS, ExpertUsage())
        olmoe.answer_log_probabilities(EXAMPLES)
        assert shown == [said] * 4
        shown.clear()
        list(olmoe.records(TEXTS, progress=not said))
        assert shown == [not said]
        shown.clear()


@pytest.mark.parametrize("name", ["organsm", "organism:plantd", "organism:wild"])
def test_a_misspelt_packaged_model_is_not_looked_for_on_the_hub(name):
    with pytest.raises(MoELensError, match=f"the packaged models are organism, .*; got '{name}'"):
        MoELens.from_pretrained(name)
