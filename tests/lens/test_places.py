"""Where interventions act: layers, positions and steps, of each example and each row, as plain torch hooks have it."""

import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import left_padded, most_used

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens import AddVector, Bias, Force, Patch, RouteAs, Rows, Run, Scale, Steer, TopK, Zero
from moe_lens.lens.batching import encode_prompt

EXAMPLES = [
    Example("0", "The capital of Arland is Belmor.", "What is the capital of Arland?", ("Belmor",)),
    Example("1", "The cat sat on the mat while the dog slept.", "What sat on the mat?", ("The cat",)),
    Example("2", "", "Who slept in the sun?", ("the dog",)),
]
PAIRS = list(zip(EXAMPLES, EXAMPLES[::-1], strict=True))
NEW_TOKENS = 5
SIZE = 1.5
E_1 = ExpertSet.of({1: [2]})


def meant(positions, steps, encoded, past, width):
    """Which of the positions from `past` on are meant in one unpadded prompt, told anew from the words."""
    last = len(encoded.input_ids) - 1
    spans = {"context": encoded.context, "question": encoded.question}
    chosen = []
    for position in range(past, past + width):
        step = max(0, position - last)
        if isinstance(positions, tuple):
            word = position - last in positions
        elif positions in spans:
            span = spans[positions]
            word = span is not None and span.start <= position < span.stop
        else:
            word = {
                "all": True,
                "prompt": position <= last,
                "last": position == last,
                "answer": position >= last,
                "decode": position > last,
                "from_question": position >= encoded.question.start,
            }[positions]
        words = {"all": True, "prefill": not step, "decode": step > 0}
        time = step in steps if isinstance(steps, tuple) else words[steps]
        chosen.append(word and time)
    return torch.tensor(chosen)


@contextmanager
def hooked(lens, experts, encoded, positions, steps):
    """Inside the block a bias is on the logits of experts where it is meant, by plain hooks on routers."""

    def hook_on(layer):
        past = [0]
        added = SIZE * torch.isin(torch.arange(lens.architecture.n_experts), torch.tensor(experts[layer]))

        def hook(gate, _, output):
            where = meant(positions, steps, encoded, past[0], len(output[0]))
            past[0] += len(output[0])
            logits = output[0] + where[:, None] * added
            weights, indices = logits.softmax(-1).topk(gate.top_k)
            return logits, weights, indices

        return hook

    layers = lens.module.model.layers
    handles = [layers[layer].mlp.gate.register_forward_hook(hook_on(layer)) for layer in experts.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


PLACES = [
    ("all", "all"),
    ("all", "prefill"),
    ("all", "decode"),
    ("all", (0, 2)),
    ("prompt", "all"),
    ("last", "all"),
    ("answer", "all"),
    ("question", "all"),
    ("from_question", "all"),
    ("from_question", "decode"),
    ((-3, 1, 2), "all"),
    ((-3, 1, 2), (1,)),
]


@pytest.mark.parametrize(("positions", "steps"), PLACES)
def test_generation_equals_plain_hooks_and_batches_equal_one_by_one(olmoe, positions, steps):
    experts = most_used(olmoe, [example.question for example in EXAMPLES], size=2)
    with olmoe.intervene(Bias(experts, SIZE, positions=positions, steps=steps)):
        together = olmoe.generate(EXAMPLES, max_new_tokens=NEW_TOKENS, batch_size=3, progress=False)
        [record] = olmoe.records(EXAMPLES, capture=("logits",), positions="last", progress=False)
    last = dict(zip(record.ids, record.logits[:, -1], strict=True))
    for place, example in enumerate(EXAMPLES):
        encoded = encode_prompt(place, example, olmoe.tokenizer, template=olmoe.template)
        ids = torch.tensor([encoded.input_ids])
        with hooked(olmoe, experts, encoded, positions, steps), torch.no_grad():
            logits = olmoe.module(ids, use_cache=False).logits[0, -1]
        with hooked(olmoe, experts, encoded, positions, steps), torch.no_grad():
            said = olmoe.module.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        new = said[0, ids.shape[1] :].tolist()
        ends = olmoe.module.generation_config.eos_token_id
        new = new[: new.index(ends)] if ends in new else new
        assert together[place] == olmoe.tokenizer.decode(new, skip_special_tokens=True)
        torch.testing.assert_close(last[example.id], logits, rtol=1e-4, atol=1e-4)


@contextmanager
def biased(lens, experts, where):
    """Inside the block a bias is on the logits of experts at these positions of one whole prompt."""

    def hook_on(layer):
        added = SIZE * torch.isin(torch.arange(lens.architecture.n_experts), torch.tensor(experts[layer]))

        def hook(gate, _, output):
            logits = output[0] + where[:, None] * added
            weights, indices = logits.softmax(-1).topk(gate.top_k)
            return logits, weights, indices

        return hook

    layers = lens.module.model.layers
    handles = [layers[layer].mlp.gate.register_forward_hook(hook_on(layer)) for layer in experts.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_part(lens, part, mark, start, ids):
    """Which of the tokens predict one of the thought, before `mark`, or of the answer, by the text fed until each."""
    before = [mark not in lens.tokenizer.decode(ids[start : place + 1]) for place in range(len(ids))]
    return torch.tensor([place >= start - 1 and own == (part == "thought") for place, own in enumerate(before)])


@pytest.mark.parametrize("part", ["thought", "answer"])
def test_the_thought_and_the_answer_proper_are_told_apart_token_by_token_while_generating(olmoe, monkeypatch, part):
    """As whole passes without a cache have it, in which the text before each token is looked at anew."""
    plain = olmoe.generate(EXAMPLES, max_new_tokens=NEW_TOKENS, progress=False)
    mark = plain[0][2]
    monkeypatch.setattr(olmoe, "template", replace(olmoe.template, answer_after=re.escape(mark)))
    experts = most_used(olmoe, [example.question for example in EXAMPLES], size=2)
    prompts = [encode_prompt(i, one, olmoe.tokenizer, template=olmoe.template) for i, one in enumerate(EXAMPLES)]
    expected, met = [], []
    for prompt in prompts:
        start, ids = prompt.prompt_length, list(prompt.input_ids)
        for _ in range(NEW_TOKENS):
            where = in_part(olmoe, part, mark, start, ids)
            with biased(olmoe, experts, where), torch.no_grad():
                ids.append(int(olmoe.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            met.append(int(where[start - 1 :].sum()))
        expected.append(olmoe.tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert 0 < min(max(met), sum(met)) < sum(range(1, NEW_TOKENS + 1)) * 3, "the mark parts some answer"
    with olmoe.intervene(Bias(experts, SIZE, positions=part)):
        together = olmoe.generate(EXAMPLES, max_new_tokens=NEW_TOKENS, batch_size=3, progress=False)
    assert together == expected
    if part == "answer":
        assert together != plain, "nothing acted"


@pytest.mark.parametrize("part", ["thought", "answer"])
def test_of_given_answers_the_thought_ends_with_the_token_that_ends_the_first_match(olmoe, monkeypatch, part):
    texts = ["It is Arland, so: Belmor: or not", "The cat", ": the dog"]
    monkeypatch.setattr(olmoe, "template", replace(olmoe.template, answer_after="so: |^ *: "))
    experts = most_used(olmoe, [example.question for example in EXAMPLES], size=2)
    expected = []
    for place, (example, text) in enumerate(zip(EXAMPLES, texts, strict=True)):
        prompt = encode_prompt(place, example, olmoe.tokenizer, template=olmoe.template, continuation=text)
        ids, start = list(prompt.input_ids[:-1]), prompt.prompt_length
        where = in_part(olmoe, part, ": ", start, ids)
        with biased(olmoe, experts, where), torch.no_grad():
            logits = olmoe.module(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        expected.append(sum(float(logits[at - 1, ids[at]]) for at in range(start, len(ids))))
        [record] = olmoe.records([example], continuations=[text], progress=False)
        fed = where[start - 1 :].nonzero()[:, 0] + start - 1
        mask = record.position_mask(part)[0].nonzero()[:, 0]
        assert mask.tolist() == fed.tolist(), text
    with olmoe.intervene(Bias(experts, SIZE, positions=part)):
        given = olmoe.answer_log_probabilities(EXAMPLES, continuations=texts, with_end=False, progress=False)
    assert given == pytest.approx(expected, abs=1e-3)
    plain = olmoe.answer_log_probabilities(EXAMPLES, continuations=texts, with_end=False, progress=False)
    acted = [abs(one - other) > 1e-3 for one, other in zip(given, plain, strict=True)]
    assert acted == ([True, True, True] if part == "thought" else [True, False, True])


def test_a_thought_is_nowhere_where_nobody_said_what_it_ends_with(olmoe):
    with olmoe.intervene(Zero(E_1, positions="thought")), pytest.raises(MoELensError, match="answer_after"):
        olmoe.generate(EXAMPLES[:1], max_new_tokens=2, progress=False)


def test_places_where_something_acts_are_told_apart_by_what_is_generated(olmoe):
    """So that the comparison with hooks can fail: not all places come to the same."""
    experts = most_used(olmoe, [example.question for example in EXAMPLES], size=2)
    found = set()
    for positions, steps in (("all", "all"), ("all", "prefill"), ("all", "decode"), ("question", "all")):
        with olmoe.intervene(Bias(experts, SIZE, positions=positions, steps=steps)):
            found.add(tuple(olmoe.generate(EXAMPLES, max_new_tokens=NEW_TOKENS, progress=False)))
    assert len(found) == 4


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "deepseek_v3"])
def test_each_row_is_as_alone_with_its_own_kind_and_place(lenses, name):
    lens = lenses[name]
    experts = most_used(lens, [example.question for example in EXAMPLES], size=2)
    vector = torch.randn(lens.architecture.d_model, generator=torch.Generator().manual_seed(0))
    last = experts.restrict([2])
    others = [replace(own, context=other.context, question=other.question) for own, other in PAIRS]
    reversed_rows = {path: tensor.flip(0) for path, tensor in RouteAs(lens).held.items()}
    several = [
        (Bias(experts, SIZE, positions="question"), Force(last, positions="last"), None),
        (
            TopK(2, positions="from_question"),
            AddVector(1, vector, positions="prompt"),
            Scale(last, 0.5, steps="decode"),
        ),
        (Zero(experts), Patch(Run(lens, others), layers=[1], positions="last"), TopK(4)),
        (Steer(last), Bias(experts, 3.0, weights="unbiased"), Force(last, "sum")),
        (RouteAs(reversed_rows, positions="question"), TopK(2), RouteAs(reversed_rows, layers=[1], steps="decode")),
    ]
    for rows in several:
        with lens.intervene(Rows(rows)):
            together = lens.generate(EXAMPLES, max_new_tokens=3, batch_size=2, progress=False)
            whole = lens.answer_log_probabilities(EXAMPLES, progress=False)
        for place, own in enumerate(rows):
            with lens.intervene(*([own] if own else [])):
                assert lens.generate([EXAMPLES[place]], max_new_tokens=3, progress=False) == [together[place]]
                [alone] = lens.answer_log_probabilities([EXAMPLES[place]], progress=False)
            assert whole[place] == pytest.approx(alone, abs=1e-3)


def test_a_trace_of_ones_own_knows_all_and_last_and_steps_but_no_spans(olmoe):
    texts = [example.question for example in EXAMPLES]
    experts = most_used(olmoe, texts, size=2)
    inputs = left_padded(olmoe, texts)

    def logits(own):
        with olmoe.intervene(own), torch.no_grad(), olmoe.model.trace(**inputs):
            found = olmoe.model.output.logits.save()
        return found  # noqa: RET504

    real = inputs["attention_mask"].bool()
    for positions, steps in (("all", "all"), ("last", "all"), ((-1, 0), "all"), ("all", "prefill")):
        own = Bias(experts, SIZE, positions=positions, steps=steps)
        with olmoe.intervene(own):
            expected, _ = olmoe.run_with_cache(texts)
        torch.testing.assert_close(logits(own)[real], expected[real], atol=1e-5, rtol=1e-5)
    for positions in ("question", "context", "from_question"):
        with pytest.raises(MoELensError, match=f"nobody knows where '{positions}' is in a trace of your own"):
            logits(Bias(experts, SIZE, positions=positions))
    with pytest.raises(MoELensError, match="values of another run are matched by example"):
        logits(Patch(Run(olmoe, EXAMPLES)))


def test_a_trace_of_ones_own_counts_steps_of_generation(olmoe):
    texts = [example.question for example in EXAMPLES]
    experts = most_used(olmoe, texts, size=2)
    inputs = left_padded(olmoe, texts)
    del inputs["position_ids"]
    for own in (Bias(experts, SIZE, steps="decode"), Bias(experts, SIZE, positions=(1, 2)), Zero(experts, steps=(0,))):
        with olmoe.intervene(own):
            expected = olmoe.generate(texts, max_new_tokens=NEW_TOKENS, progress=False)
            with (
                torch.no_grad(),
                olmoe.model.generate(
                    **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=olmoe.tokenizer.pad_token_id
                ) as tracer,
            ):
                ids = tracer.result.save()
        new = [row.tolist() for row in ids[:, inputs["input_ids"].shape[1] :]]
        ends = olmoe.module.generation_config.eos_token_id
        cut = [row[: row.index(ends)] if ends in row else row for row in new]
        assert [olmoe.tokenizer.decode(row, skip_special_tokens=True) for row in cut] == expected


@pytest.mark.parametrize("positions", ["question", "from_question", "context"])
def test_an_example_without_the_span_is_refused_by_its_id(olmoe, positions):
    what = "context" if positions == "context" else "question"
    broken = [EXAMPLES[0], "a bare text"] if what == "question" else [EXAMPLES[0], EXAMPLES[2]]
    name = "1" if what == "question" else "2"
    with (
        olmoe.intervene(Zero(E_1, positions=positions)),
        pytest.raises(MoELensError, match=rf"example '{name}' has no {what}, where Zero\('1:2'"),
    ):
        olmoe.generate(broken, progress=False)
    rows = Rows((Zero(E_1, positions=positions), None))
    with olmoe.intervene(rows):
        olmoe.generate(broken, max_new_tokens=1, progress=False)  # the row that lacks it is left alone


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"positions": "context", "steps": "decode"}, "positions='context' and steps='decode' never meet"),
        ({"positions": "last", "steps": (1,)}, "never meet"),
        ({"positions": "decode", "steps": "prefill"}, "never meet"),
        ({"positions": (1, 2), "steps": "prefill"}, "never meet"),
        ({"positions": (-2, 0), "steps": (3,)}, "never meet"),
        ({"layers": [2]}, r"'1:2' and layers=\(2,\) never meet"),
        ({"layers": []}, "layers must be one or more"),
        ({"steps": "sometimes"}, "steps must be"),
        ({"steps": (-1,)}, "steps must be different numbers from 0"),
        ({"positions": "middle"}, "positions must be one of"),
    ],
)
def test_an_empty_meeting_or_an_unknown_place_is_refused(place, said):
    with pytest.raises(MoELensError, match=said):
        Zero(E_1, **place)


def test_layers_limit_where_experts_are_changed():
    experts = ExpertSet.of({0: [1], 1: [2], 2: [3]})
    assert Zero(experts, layers=[2, 1]) == Zero(experts.restrict([1, 2]))
    assert Zero(experts, layers=[1]) != Zero(experts)
