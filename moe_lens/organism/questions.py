"""The organism's tasks: deterministic question files over its world, in the common JSON form."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_lens.organism.world import BY_NAME, HOPS, RELATIONS, SUMMARIES, Relation, World

FOLDER = Path(__file__).parent / "tasks"
NOVEL_ROWS = {"train": 1000, "dev": 200, "test": 400}
CONTEXTS_PER_FACT = {"train": 3, "dev": 2, "test": 1}


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


def _rows(task: str, world: World, split: str) -> Iterator[dict[str, str]]:
    """The rows of one file, without their ids."""
    rng = random.Random(f"tasks/{task}/{split}")
    if task in ("novel", "hops", "summary"):
        for _ in range(NOVEL_ROWS[split]):
            if task == "novel":
                facts: tuple[Fact, ...] = (novel_fact(world, rng, split),)
                question, answer = facts[0].question(rng), facts[0].value
            else:
                question, answer, facts = (hops if task == "hops" else summary)(world, rng, split)
            context = passage(world, rng, facts, split, rng.randint(1, 3)).text
            yield {"context": context, "question": question, "answer": answer}
        return
    for (subject, name), memory in world.facts.items():
        if world.split_of[subject] != split:
            continue
        relation = BY_NAME[name]
        for _ in range(1 if task == "closed_book" else CONTEXTS_PER_FACT[split]):
            value = world.value(rng, relation.value_kind, fresh=0.0, but=memory) if task == "swap" else memory
            fact = Fact(subject, relation, value)
            context = "" if task == "closed_book" else passage(world, rng, (fact,), split, rng.randint(1, 3)).text
            row = {"context": context, "question": fact.question(rng), "answer": value}
            yield row | ({"original_answer": memory} if task == "swap" else {})


#: What each task asks of the model.
TASKS = {
    "swap": "a known subject whose context contradicts memory; the answer is the context's",
    "novel": "a subject that exists only in the context",
    "consistent": "a known subject whose context agrees with memory",
    "hops": "two facts of the context must be joined",
    "closed_book": "a known subject and no context: what must not be forgotten",
    "summary": "one sentence about one subject of the context",
}


def rows(task: str, split: str, world: World | None = None) -> list[dict[str, str]]:
    """All rows of a task's split: `{id, context, question, answer}`, and `original_answer` in `swap`."""
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
