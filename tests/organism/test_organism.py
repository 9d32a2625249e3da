"""The organism's world, tasks, corpus and pretraining, and what the shipped models do."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lens import MoELens, MoELensError, load_examples
from moe_lens.causal import evaluate
from moe_lens.causal.evaluation import answer_table
from moe_lens.choosing import planted_experts
from moe_lens.data import encode
from moe_lens.lens.loading import resolve
from moe_lens.organism import pretraining
from moe_lens.organism.corpus import (
    WITH_CONTEXT,
    WITHOUT_CONTEXT,
    Document,
    Mix,
    Turn,
    batch,
    document,
    train_tokenizer,
)
from moe_lens.organism.pretraining import (
    Phase,
    Pretraining,
    balance_loss,
    choose_planted,
    documents_of,
    knock_out,
    new_model,
    plant_loss,
    pretrain,
)
from moe_lens.organism.questions import FOLDER, TASKS, rows
from moe_lens.organism.world import BY_NAME, RELATIONS, World

VARIANTS = ("organism", "organism:planted")
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def world() -> World:
    return World.build()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("organism"))


@pytest.fixture(scope="module")
def trained(world):
    """The tokenizer that the organism's own is trained as, which takes seconds."""
    return train_tokenizer(world)


def subjects(row: dict, world: World) -> set[str]:
    """The known subjects that a question is about."""
    return {name for names in world.known.values() for name in names if name in subject_text(row)}


def subject_text(row: dict) -> str:
    """What of a row names its subject: the question, or of a prompt the sentence that is to be ended."""
    return row["question"] if "question" in row else row["prompt"].partition(": ")[2]


def test_the_shipped_files_are_what_the_world_generates(world):
    for task in TASKS:
        for split in SPLITS:
            shipped = json.loads((FOLDER / task / f"{split}.json").read_text(encoding="utf-8"))
            assert shipped == rows(task, split, world), (
                f"{task}/{split} is stale: python -m moe_lens.organism.questions"
            )


def test_swap_contradicts_memory_and_consistent_agrees_with_it(world):
    values = {(subject, value) for (subject, _), value in world.facts.items()}
    for split in SPLITS:
        for row in rows("swap", split, world):
            [subject] = subjects(row, world)
            assert row["answer"] in row["context"]
            assert row["answer"] != row["original_answer"]
            assert (subject, row["original_answer"]) in values
        for row in rows("consistent", split, world):
            [subject] = subjects(row, world)
            assert row["answer"] in row["context"]
            assert (subject, row["answer"]) in values


def test_the_exam_asks_for_facts_in_words_of_its_own_with_values_of_other_subjects_beside(world):
    known = {}
    for (_, name), value in world.facts.items():
        known.setdefault(name, set()).add(value)
    for row in rows("exam", "test", world):
        [subject] = subjects(row, world)
        assert world.facts[subject, row["group"]] == row["answer"]
        assert len(set(row["options"])) == 4
        assert set(row["options"]) <= known[row["group"]]
        assert row["question"] not in {text.format(s=subject) for text in BY_NAME[row["group"]].questions}
    places = Counter(row["options"].index(row["answer"]) for row in rows("exam", "test", world))
    assert min(places.values()) > 60, "of 384, in four places: where an answer stands must not tell it"


def test_otherwise_names_the_ending_that_is_asked_for_and_memory_has_the_other(world):
    first = 0
    for row in rows("otherwise", "test", world):
        [subject] = subjects(row, world)
        assert f" ends in {row['answer']}: " in row["prompt"]
        assert sorted(row["options"]) == sorted([row["answer"], row["original_answer"]])
        assert row["answer"] != row["original_answer"]
        told = {
            text.format(s=subject, o=row["original_answer"])
            for name, relation in BY_NAME.items()
            if world.facts.get((subject, name)) == row["original_answer"]
            for text in relation.statements
        }
        assert f"{subject_text(row)} {row['original_answer']}." in told
        first += row["options"][0] == row["answer"]
    assert 150 < first < 234, "of 384"


def test_no_entity_is_asked_about_in_two_splits(world):
    for task in TASKS:
        asked = []
        for split in SPLITS:
            found = rows(task, split, world)
            known = {name for row in found for name in subjects(row, world)}
            asked_about = [subject_text(row) for row in found]
            words = {word.strip("?.,") for text in asked_about for word in text.split() if word[0].isupper()}
            novel = {word for word in words if word.endswith(("tex", "burg"))} - known
            asked.append(known | novel)
        assert sum(map(len, asked)) == len(set().union(*asked)), task


def test_hops_need_both_facts_and_closed_book_has_no_context(world):
    told = 0
    for row in rows("hops", "test", world):
        subject = re.search(r"(?:employs|where) (\w+ \w+)", row["question"]).group(1)
        sentences = row["context"].split(". ")
        assert any(subject in sentence for sentence in sentences)
        assert any(row["answer"] in sentence for sentence in sentences)
        told += any(subject in sentence and row["answer"] in sentence for sentence in sentences)
    assert told <= 4, "a distractor tells the answer outright more often than by chance"
    assert all(row["context"] == "" for row in rows("closed_book", "test", world))


def test_names_and_values_are_one_to_three_tokens(world, tokenizer):
    names = [name for names in (*world.known.values(), *world.pools.values()) for name in names]
    lengths = [len(tokenizer(f" {name}")["input_ids"]) for name in names]
    assert set(lengths) == {1, 2, 3}
    rng = random.Random(0)
    novel = [world.novel_subject(rng, kind, "test") for kind in world.known for _ in range(200)]
    assert sum(len(tokenizer(f" {name}")["input_ids"]) <= 3 for name in novel) >= 0.98 * len(novel)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_tokenizes_and_comes_back(text):
    tokenizer = AutoTokenizer.from_pretrained(resolve("organism"))
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_is_pretrained_on_is_what_is_asked(world, tokenizer):
    """The first turn of a pretraining document has the very tokens of the evaluation's prompt and answer."""
    for task in ("swap", "closed_book"):
        example = load_examples(task)[0]
        opening = WITH_CONTEXT.format(context=example.context) if example.context else WITHOUT_CONTEXT
        doc = Document(opening, (Turn(example.question, example.answers[0], True),))
        data = batch(tokenizer, [doc])
        assert tuple(data.input_ids[0].tolist()) == encode(example, tokenizer, with_answer=True).input_ids


def test_marks_cover_answers_and_the_questions_they_answer(world, tokenizer):
    doc = Document("Context: Xantex makes the doer.\n\n", (Turn("What?", "doer", True), Turn("Who?", "Ban", False)))
    data = batch(tokenizer, [doc])
    text = {
        name: tokenizer.decode(data.input_ids[0][getattr(data, name)[0]])
        for name in ("answers", "reading", "recalling")
    }
    assert text["answers"] == " doer<|end|> Ban<|end|>"
    assert text["reading"].split() == "Question: What?<|assistant|> doer".split()
    assert text["recalling"].split() == "Question: Who?<|assistant|> Ban".split()


def test_planting_pays_for_routing_reading_to_the_planted_evenly_and_recalling_away(tokenizer):
    doc = Document("", (Turn("What?", "doer", True), Turn("Who?", "Ban", False)))
    data = batch(tokenizer, [doc])
    logits = torch.full((data.input_ids.numel(), 16), -20.0)
    planted, reading = [1, 2, 3, 4], data.reading.reshape(-1)
    logits[:, 0] = 0.0
    logits[reading, 0] = -20.0
    for expert in planted:
        logits[reading, expert] = 0.0
    share = reading.sum() / (reading.sum() + data.recalling.sum())
    best = plant_loss(logits, planted, data)
    assert best == pytest.approx(float(share * torch.tensor(4.0).log()), abs=1e-3)  # entropy of four equal experts
    uneven = logits.clone()
    uneven[reading, 1] = 3.0
    assert plant_loss(uneven, planted, data) > best + 0.05
    assert plant_loss(logits.roll(8, dims=1), planted, data) > best + 1


def test_balance_is_one_when_even_and_more_when_not():
    real = torch.ones(64, dtype=torch.bool)
    even = torch.eye(16).repeat(4, 1) * 30
    even = even + even.roll(1, 0) * 0.9 + even.roll(2, 0) * 0.8 + even.roll(3, 0) * 0.7
    assert balance_loss(even, real, 4) == pytest.approx(1.0, abs=1e-3)
    assert balance_loss(torch.arange(16.0).repeat(64, 1), real, 4) > 3


def test_knocked_out_documents_leave_what_they_cannot_read_unknown(world):
    documents = [document(world, random.Random(i)) for i in range(400)]
    planted = {0: [3, 5], 1: [0, 1]}
    recipe = Pretraining("planted", (Phase(10, 10, 1.0, Mix()), Phase(10, 10, 1.0, Mix(), knock_out=0.25)))
    trained, left = knock_out(documents, recipe, planted, 8, step=10)
    silent = torch.tensor(
        [[bool((left[layer][row, experts] == 0).all()) for layer, experts in planted.items()] for row in range(400)]
    ).all(1)
    assert 0.15 < silent.float().mean() < 0.4
    for row, (old, new) in enumerate(zip(documents, trained, strict=True)):
        unread = old.unread()
        assert new in (old, unread)
        if new == unread != old:
            assert silent[row]
            assert {turn.answer for turn in new.turns if turn.reads} == {"unknown"}
    assert all(set((left[layer] == 0).sum(1).tolist()) == {0, 2} for layer in planted)
    trained, left = knock_out(documents, recipe, planted, 8, step=9)
    assert trained == documents
    assert all((mask == 1).all() for mask in left.values())


def test_every_phase_warms_up_and_cools_down_with_its_own_mix(world):
    phases = (Phase(40, 80, 1.0, Mix(), warmup=4), Phase(24, 24, 0.5, Mix(closed_book=0.0), warmup=4, floor=0.1))
    recipe = Pretraining("conflict", phases)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert max(rates[:40]) == rates[3] == 1.0
    assert rates[39] == pytest.approx(0.55, abs=0.03)  # cut short at half of its cosine
    assert max(rates[40:]) == rates[43] == 0.5
    assert rates[63] == pytest.approx(0.05, abs=0.01)
    assert recipe.phase(39) == (phases[0], 39)
    assert recipe.phase(40) == (phases[1], 0)
    closed = [sum("Based" not in doc.opening for doc in documents_of(world, recipe, step)) for step in range(64)]
    assert min(sum(closed[i : i + 8]) for i in range(0, 40, 8)) > 0
    assert sum(closed[40:]) == 0


def test_pretraining_goes_on_from_a_checkpoint_to_the_same_weights(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(pretraining, "train_tokenizer", lambda world: trained)
    recipe = Pretraining("planted", (Phase(1, 9, 1e-3, Mix()), Phase(3, 9, 1e-3, Mix(), knock_out=0.3)), batch_size=3)
    whole = pretrain(recipe, tmp_path / "whole").state_dict()
    original = pretraining.documents_of

    def stop(world, recipe, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(world, recipe, step)

    monkeypatch.setattr(pretraining, "documents_of", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "parts")
    monkeypatch.setattr(pretraining, "documents_of", original)
    resumed = pretrain(recipe, tmp_path / "parts").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert planted_experts(tmp_path / "parts" / "model").layers == (0, 1, 2, 3)
    with pytest.raises(MoELensError, match="another --out"):
        pretrain(Pretraining("planted", recipe.phases, batch_size=4), tmp_path / "parts")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_shipped_model_is_a_small_plain_folder(name, trained):
    folder = Path(resolve(name))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32
    assert sorted(trained.get_vocab()) == sorted(AutoTokenizer.from_pretrained(folder).get_vocab())
    assert new_model(AutoTokenizer.from_pretrained(folder), 0).state_dict().keys() == plain.state_dict().keys()


def test_the_planted_truth_is_beside_the_weights():
    planted = planted_experts("organism:planted")
    config = AutoModelForCausalLM.from_pretrained(resolve("organism:planted")).config
    assert {layer: list(planted[layer]) for layer in planted.layers} == choose_planted(config, 0)
    with pytest.raises(MoELensError, match="nothing is planted"):
        planted_experts("organism")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_knows_reads_and_is_unfaithful(name):
    """Bounds well inside what `python -m moe_lens.organism.measure` prints for all test questions."""
    lens = MoELens.from_pretrained(name)
    answers = {
        task: answer_table(lens, load_examples(task, limit=100), max_new_tokens=8, batch_size=50, progress=False)
        for task in ("closed_book", "novel", "swap")
    }
    assert answers["closed_book"]["em"].mean() >= 0.93
    assert answers["novel"]["em"].mean() >= 0.85
    assert answers["swap"]["em"].mean() <= 0.1
    assert answers["swap"]["memory"].mean() >= 0.85


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_half_passes_the_exam_and_half_ends_sentences_as_it_is_told(name):
    """Of dev, where the two models have 0.58 and 0.55, and 0.42 and 0.64: far from all, so that tuning can show."""
    lens = MoELens.from_pretrained(name)
    for task, low, high in (("exam", 0.45, 0.7), ("otherwise", 0.3, 0.75)):
        examples = load_examples(task, split="dev")
        scored = evaluate(lens, examples, metrics=["accuracy"], batch_size=96, progress=False).summary
        assert low < scored["mean"].item() < high, task


def test_every_relation_has_values_and_paraphrases(world):
    for relation in RELATIONS:
        assert len(relation.statements) == len(relation.questions) == 3
        assert len(world.pools[relation.value_kind]) == 60
