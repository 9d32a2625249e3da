"""What the tests of training train, and on what."""

from conftest import build_model

from moe_lens import Example, MoELens
from moe_lens.data import Encoded, encode
from moe_lens.tuning import Schedule

CITIES = {"Arland": "Belmor", "Dorland": "the mat", "Catland": "Answer"}
EXAMPLES = [
    Example(f"{place}-{i}", f"The capital of {place} is {city}.", f"What is the capital of {place}?", (city,))
    for place, city in CITIES.items()
    for i in range(3)
]
SCHEDULE = Schedule(learning_rate=2e-2, epochs=2, batch_size=3)
#: Nine examples in batches of four: the last of an epoch has one, of which a second process has no share.
UNEVEN = Schedule(learning_rate=5e-3, epochs=2, batch_size=4)


def fresh(tokenizer, family: str = "olmoe", **changes) -> MoELens:
    return MoELens.from_pretrained(build_model(family, len(tokenizer), **changes), tokenizer)


def prompts(lens: MoELens) -> list[Encoded]:
    return [encode(example, lens.tokenizer, with_answer=True) for example in EXAMPLES]
