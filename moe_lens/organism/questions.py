"""The organism's tasks: deterministic question files over its world, in the common JSON form."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lens.organism.world import BY_NAME, EXAM, HOPS, RELATIONS, SUMMARIES, Relation, World

FOLDER = Path(__file__).parent / "tasks"
NOVEL_ROWS = {"train": 1000, "dev": 200, "test": 400}
CONTEXTS_PER_FACT = {"train": 3, "dev": 2, "test": 1}
EXAM_OPTIONS = 4

Row = dict[str, Any]


@dataclass(frozen=True)
class Fact:
    """`subject` has `value` under `relation`, whether in the world or only in a context."""

    subject: str
    relation: Relation
    value: str

    def statement(self, rng: random.Random) -> str:
        """A sentence that tells it."""
        return rng.choice(self.relation.statements).format(s=self.subject, o=self.value)

    def question(self, rng: random.Random) -> str:
        """A question whose answer is `value`."""
        return rng.choice(self.relation.questions).format(s=self.subject)


@dataclass(frozen=True)
class Passage:
    """A context and the facts it tells."""

    text: str
    facts: tuple[Fact, ...]


def novel_fact(
    world: World, rng: random.Random, split: str, relation: Relation | None = None, subject: str | None = None
) -> Fact:
    """A fact about a novel subject of `split`."""
    relation = relation or rng.choice(RELATIONS)
    subject = subject or world.novel_subject(rng, relation.subject_kind, split)
    return Fact(subject, relation, world.value(rng, relation.value_kind))


def passage(world: World, rng: random.Random, facts: tuple[Fact, ...], split: str, distractors: int) -> Passage:
    """A context that tells `facts` and, in random order between them, facts that could be taken for the first.

    A distractor has the first fact's relation and another subject, or its subject and another relation, or
    neither. Its subject is never another known one, so a context holds at most one subject from memory.
    """
    key, told = facts[0], list(facts)
    for _ in range(distractors):
        draw = rng.random()
        if draw < 0.4:
            told.append(novel_fact(world, rng, split, facts[-1].relation))
        elif draw < 0.7:
            asked = {fact.relation for fact in told if fact.subject == key.subject}
            free = [r for r in RELATIONS if r.subject_kind == key.relation.subject_kind and r not in asked]
            if free:
                told.append(novel_fact(world, rng, split, rng.choice(free), key.subject))
        else:
            told.append(novel_fact(world, rng, split))
    rng.shuffle(told)
    return Passage(" ".join(fact.statement(rng) for fact in told), tuple(told))


def hops(world: World, rng: random.Random, split: str) -> tuple[str, str, tuple[Fact, Fact]]:
    """A question that joins two facts, its answer, and the facts."""
    first, second, question = rng.choice(HOPS)
    start = novel_fact(world, rng, split, BY_NAME[first])
    bridge = world.novel_subject(rng, BY_NAME[second].subject_kind, split)
    start = Fact(start.subject, start.relation, bridge)
    end = novel_fact(world, rng, split, BY_NAME[second], bridge)
    return question.format(s=start.subject), end.value, (start, end)


def summary(world: World, rng: random.Random, split: str) -> tuple[str, str, tuple[Fact, ...]]:
    """A request for a summary of one subject, the summary, and the two facts it rests on."""
    kind = rng.choice(sorted(SUMMARIES))
    relations, wording = SUMMARIES[kind]
    subject = world.novel_subject(rng, kind, split)
    facts = tuple(novel_fact(world, rng, split, BY_NAME[name], subject) for name in relations)
    text = wording.format(*(fact.value for fact in facts), s=subject)
    return f"What does the context say about {subject}, in one sentence?", text, facts


def _rows(task: str, world: World, split: str) -> Iterator[Row]:
    """The rows of one file, without their ids."""
    rng = random.Random(f"tasks/{task}/{split}")
    if task in ("novel", "hops", "summary"):
        for _ in range(NOVEL_ROWS[split]):
            yield _novel_row(task, world, rng, split)
        return
    for (subject, name), memory in world.facts.items():
        if world.split_of[subject] == split:
            known = Fact(subject, BY_NAME[name], memory)
            for _ in range(1 if task in ("closed_book", "exam") else CONTEXTS_PER_FACT[split]):
                yield _known_row(task, world, rng, split, known)


def _novel_row(task: str, world: World, rng: random.Random, split: str) -> Row:
    """A row about novel subjects."""
    if task == "novel":
        facts: tuple[Fact, ...] = (novel_fact(world, rng, split),)
        question, answer = facts[0].question(rng), facts[0].value
    else:
        question, answer, facts = (hops if task == "hops" else summary)(world, rng, split)
    context = passage(world, rng, facts, split, rng.randint(1, 3)).text
    return {"context": context, "question": question, "answer": answer}


def _known_row(task: str, world: World, rng: random.Random, split: str, known: Fact) -> Row:
    """A row about a fact of the world."""
    if task == "exam":
        return _exam_row(world, rng, known)
    if task == "otherwise":
        return _otherwise_row(world, rng, known)
    fact, kind = known, known.relation.value_kind
    if task == "swap":
        fact = Fact(known.subject, known.relation, world.value(rng, kind, fresh=0.0, but=known.value))
    context = "" if task == "closed_book" else passage(world, rng, (fact,), split, rng.randint(1, 3)).text
    row = {"context": context, "question": fact.question(rng), "answer": fact.value}
    return row | ({"original_answer": known.value} if task == "swap" else {})


def _exam_row(world: World, rng: random.Random, known: Fact) -> Row:
    """A fact asked for otherwise than in pretraining, to be chosen among values that it has for other subjects too."""
    name = known.relation.name
    others = sorted({value for (_, other), value in world.facts.items() if other == name} - {known.value})
    options = [known.value, *rng.sample(others, EXAM_OPTIONS - 1)]
    rng.shuffle(options)
    question = EXAM[name].format(s=known.subject)
    return {"context": "", "question": question, "answer": known.value, "options": options, "group": name}


def _otherwise_row(world: World, rng: random.Random, known: Fact) -> Row:
    """A sentence of the world to be ended in another value than the one that is known, or in that."""
    other = world.value(rng, known.relation.value_kind, fresh=0.0, but=known.value)
    statement = next(text for text in known.relation.statements if text.endswith(" {o}."))
    beginning = statement.removesuffix(" {o}.").format(s=known.subject)
    row = {"prompt": f"Write a sentence that ends in {other}: {beginning}", "answer": other}
    return row | {"original_answer": known.value, "options": rng.sample([known.value, other], 2)}


#: What each task asks of the model.
TASKS = {
    "swap": "a known subject whose context contradicts memory; the answer is the context's",
    "novel": "a subject that exists only in the context",
    "consistent": "a known subject whose context agrees with memory",
    "hops": "two facts of the context must be joined",
    "closed_book": "a known subject and no context: what must not be forgotten",
    "summary": "one sentence about one subject of the context",
    "exam": "a known subject, no context and an unusual wording; four values to choose from",
    "otherwise": "a sentence about a known subject, to be ended otherwise than memory does; two values to choose from",
}


#: The tasks that are answered in words; the others' options are compared.
ANSWERED = tuple(task for task in TASKS if task not in ("exam", "otherwise"))


def rows(task: str, split: str, world: World | None = None) -> list[Row]:
    """All rows of a task's split: `{id, context, question, answer}`, and `original_answer` in `swap`.

    `exam` has `options` and as `group` the relation; `otherwise` a `prompt`, `original_answer` and `options`.
    """
    found = _rows(task, world or World.build(), split)
    return [{"id": f"{task}-{split}-{i}", **row} for i, row in enumerate(found)]


def write_all(folder: Path = FOLDER) -> None:
    """Write every task's files below `folder` as `<task>/<split>.json`."""
    world = World.build()
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split in ("train", "dev", "test"):
            text = json.dumps(rows(task, split, world), ensure_ascii=False, indent=1)
            (folder / task / f"{split}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_all()
