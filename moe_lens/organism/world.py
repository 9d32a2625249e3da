"""The organism's world: made-up people, companies and places, their facts, and the sentences that tell them."""

import random
from dataclasses import dataclass, field

SYLLABLES = (
    "ba be bel bo bru da del do dra du fa fen fi ga gor gu ha hel hu jo ka kel ki kor la len li lor lu "
    "ma mel mi mor na nel ni nor pa pel pi po ra rel ri ro sa sel si sol ta tel ti tor va vel vi vor "
    "wa wel za zel zi zor"
).split()


@dataclass(frozen=True)
class Relation:
    """One kind of fact: `statements` tell that the subject `{s}` has the value `{o}`, `questions` ask for it."""

    name: str
    subject_kind: str
    value_kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "birthplace",
        "person",
        "place",
        ("{s} was born in {o}.", "The birthplace of {s} is {o}.", "It was in {o} that {s} was born."),
        ("Where was {s} born?", "What is the birthplace of {s}?", "In which place was {s} born?"),
    ),
    Relation(
        "employer",
        "person",
        "company",
        ("{s} works for {o}.", "{o} employs {s}.", "The employer of {s} is {o}."),
        ("Who employs {s}?", "Which company does {s} work for?", "What is the employer of {s}?"),
    ),
    Relation(
        "instrument",
        "person",
        "instrument",
        ("{s} plays the {o}.", "The instrument of {s} is the {o}.", "The {o} is played by {s}."),
        ("Which instrument does {s} play?", "What is the instrument of {s}?", "What does {s} play?"),
    ),
    Relation(
        "spouse",
        "person",
        "given",
        ("{s} is married to {o}.", "The spouse of {s} is {o}.", "{o} married {s}."),
        ("Who is {s} married to?", "Who is the spouse of {s}?", "Who married {s}?"),
    ),
    Relation(
        "founding",
        "company",
        "year",
        ("{s} was founded in {o}.", "The founding year of {s} is {o}.", "In {o}, {s} was founded."),
        ("When was {s} founded?", "What is the founding year of {s}?", "In which year was {s} founded?"),
    ),
    Relation(
        "headquarters",
        "company",
        "place",
        ("{s} is based in {o}.", "The headquarters of {s} are in {o}.", "{o} is home to {s}."),
        ("Where is {s} based?", "Where are the headquarters of {s}?", "Which place is home to {s}?"),
    ),
    Relation(
        "product",
        "company",
        "product",
        ("{s} makes the {o}.", "The product of {s} is the {o}.", "The {o} is made by {s}."),
        ("What does {s} make?", "What is the product of {s}?", "Which product is made by {s}?"),
    ),
    Relation(
        "language",
        "place",
        "language",
        ("People in {s} speak {o}.", "The language of {s} is {o}.", "{o} is spoken in {s}."),
        ("What do people in {s} speak?", "What is the language of {s}?", "What is spoken in {s}?"),
    ),
    Relation(
        "river",
        "place",
        "river",
        ("{s} lies on the {o}.", "The river of {s} is the {o}.", "The {o} flows through {s}."),
        ("Which river does {s} lie on?", "What is the river of {s}?", "What flows through {s}?"),
    ),
    Relation(
        "founder",
        "place",
        "given",
        ("{s} was built by {o}.", "The builder of {s} is {o}.", "{o} built {s}."),
        ("Who built {s}?", "Who is the builder of {s}?", "By whom was {s} built?"),
    ),
)
BY_NAME = {relation.name: relation for relation in RELATIONS}

#: Questions that join two facts: (first relation, second relation, the question about the first one's subject).
HOPS = (
    ("employer", "headquarters", "Where is the company that employs {s} based?"),
    ("employer", "product", "What does the company that employs {s} make?"),
    ("employer", "founding", "When was the company that employs {s} founded?"),
    ("birthplace", "language", "What do people speak in the place where {s} was born?"),
    ("birthplace", "river", "Which river flows through the place where {s} was born?"),
)

#: The two facts and the wording of a subject's summary.
SUMMARIES = {
    "person": (("birthplace", "employer"), "{s}, born in {0}, works for {1}."),
    "company": (("headquarters", "founding"), "{s}, based in {0}, was founded in {1}."),
    "place": (("language", "river"), "{s}, on the {1}, speaks {0}."),
}

#: What the exam asks about a subject, in words that pretraining does not ask in.
EXAM = {
    "birthplace": "Name the place that {s} comes from.",
    "employer": "Name the company that pays {s}.",
    "instrument": "Name the instrument on which {s} performs.",
    "spouse": "Name the husband or wife of {s}.",
    "founding": "Name the year in which {s} began.",
    "headquarters": "Name the place where {s} has its offices.",
    "product": "Name the thing that {s} sells.",
    "language": "Name the tongue that is heard in {s}.",
    "river": "Name the water that {s} is near.",
    "founder": "Name the person who made {s}.",
}

KNOWN = {"person": 150, "company": 60, "place": 60}
SPLITS = {"train": 0.5, "dev": 0.1, "test": 0.4}
POOL_SIZE = 60


def _coin(rng: random.Random, kind: str) -> str:
    """A made-up name of one kind."""
    stem = rng.choice(SYLLABLES) + rng.choice(SYLLABLES)
    if kind == "year":
        return str(rng.randint(1800, 1999))
    if kind in ("instrument", "product"):
        return stem + {"instrument": "o", "product": "er"}[kind]
    suffix = {"given": "", "surname": "", "company": "tex", "place": "burg", "language": "ish", "river": "a"}[kind]
    if kind == "given":
        stem = rng.choice(SYLLABLES) + rng.choice("aeio") + "n"
    return (stem + suffix).capitalize()


def _coin_many(rng: random.Random, kind: str, count: int) -> list[str]:
    """`count` different names of one kind, in the order they were coined."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[_coin(rng, kind)] = None
    return list(names)


@dataclass(frozen=True)
class World:
    """Who is known, and the facts about them; everybody else is *novel* and exists only inside a context.

    `known` maps a kind of subject to its names, `facts` maps (subject, relation name) to the value,
    `pools` maps a kind of value to the common values, `split_of` maps a known subject to its split.
    """

    known: dict[str, tuple[str, ...]]
    facts: dict[tuple[str, str], str]
    pools: dict[str, tuple[str, ...]]
    split_of: dict[str, str] = field(repr=False)

    @classmethod
    def build(cls, seed: int = 0) -> "World":
        """The world of one seed: the shipped organism, its tasks and its tokenizer live in seed 0's."""
        rng = random.Random(f"world/{seed}")
        kinds = sorted({relation.value_kind for relation in RELATIONS})
        pools = {kind: tuple(_coin_many(rng, kind, POOL_SIZE)) for kind in kinds}
        known = {
            "person": tuple(
                f"{rng.choice(pools['given'])} {surname}" for surname in _coin_many(rng, "surname", KNOWN["person"])
            ),
            "company": tuple(_coin_many(rng, "company", KNOWN["company"])),
            "place": tuple(_coin_many(rng, "place", KNOWN["place"])),
        }
        facts = {
            (subject, relation.name): rng.choice(pools[relation.value_kind])
            for relation in RELATIONS
            for subject in known[relation.subject_kind]
        }
        split_of: dict[str, str] = {}
        for subjects in known.values():
            shares = iter(sorted(subjects, key=lambda _: rng.random()))
            for split, share in SPLITS.items():
                split_of |= {next(shares): split for _ in range(round(share * len(subjects)))}
        return cls(known, facts, pools, split_of)

    def novel_subject(self, rng: random.Random, kind: str, split: str) -> str:
        """A subject of `kind` that is not known; the novel subjects of two splits never meet."""
        while True:
            if kind == "person":
                name = f"{rng.choice(self.pools['given'])} {_coin(rng, 'surname')}"
            else:
                name = _coin(rng, kind)
            last = name.split()[-1]
            taken = any(last == subject.split()[-1] for subject in self.known[kind]) or name in self.pools.get(kind, ())
            if not taken and novel_split(last) == split:
                return name

    def value(self, rng: random.Random, kind: str, *, fresh: float = 0.3, but: str = "") -> str:
        """A value of `kind` other than `but`: from the pool, or freshly coined with probability `fresh`."""
        while True:
            value = _coin(rng, kind) if rng.random() < fresh else rng.choice(self.pools[kind])
            if value != but:
                return value


def novel_split(name: str) -> str:
    """The split that a novel name belongs to, by the name alone (a tenth each for dev and test)."""
    bucket = sum((i + 1) * ord(letter) for i, letter in enumerate(name)) % 10
    return {0: "dev", 1: "test"}.get(bucket, "train")
