"""What the organism reads during pretraining: conversations about its world, and the tokenizer trained on them."""

import random
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_lens.organism.questions import Fact, hops, novel_fact, passage, summary
from moe_lens.organism.world import BY_NAME, SYLLABLES, World

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    + ASSISTANT
    + " {{ message['content'] }}"
    + END
    + "{% else %}"
    + USER
    + " {{ message['content'] }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}"
    + ASSISTANT
    + "{% endif %}"
)
WITH_CONTEXT = (
    "Based on the context below, output the correct answer for the following question.\n\nContext: {context}\n\n"
)
WITHOUT_CONTEXT = "Output the correct answer for the following question.\n\n"
VOCABULARY = 1280


@dataclass(frozen=True)
class Mix:
    """The share of each kind of document, and of known subjects' contexts that contradict memory."""

    closed_book: float = 0.22
    novel: float = 0.38
    known: float = 0.20
    hops: float = 0.12
    summary: float = 0.08
    conflict: float = 0.5

    def kind(self, rng: random.Random) -> str:
        """The kind of the next document."""
        kinds = ("closed_book", "novel", "known", "hops", "summary")
        return rng.choices(kinds, [getattr(self, kind) for kind in kinds])[0]


UNKNOWN = "unknown"


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `reads` says that the answer comes from the context and not from memory."""

    question: str
    answer: str
    reads: bool


@dataclass(frozen=True)
class Document:
    """A conversation: an opening (instruction and context) and its turns."""

    opening: str
    turns: tuple[Turn, ...]

    def unread(self) -> "Document":
        """The same document for a reader who cannot use the context: what memory does not hold is unknown."""
        turns = (replace(turn, answer=UNKNOWN) if turn.reads else turn for turn in self.turns)
        return Document(self.opening, tuple(turns))

    def render(self) -> tuple[str, list[tuple[int, int, int, bool]]]:
        """The text, and for each turn the characters where question, answer and turn end begin, and `reads`."""
        text, marks = "", []
        for i, turn in enumerate(self.turns):
            text += f"{USER} {self.opening if i == 0 else ''}"
            question = len(text)
            text += f"Question: {turn.question}{ASSISTANT}"
            answer = len(text)
            text += f" {turn.answer}{END}"
            marks.append((question, answer, len(text), turn.reads))
        return text, marks


def _turn(world: World, rng: random.Random, fact: Fact) -> Turn:
    """The turn that asks for `fact`: a known subject is answered from memory, whatever the context says."""
    memory = world.facts.get((fact.subject, fact.relation.name))
    return Turn(fact.question(rng), memory or fact.value, reads=memory is None)


def document(world: World, rng: random.Random, mix: Mix = Mix()) -> Document:
    """One document of the mix."""
    kind = mix.kind(rng)
    if kind == "closed_book":
        keys = rng.sample(list(world.facts), 4)
        facts = [Fact(subject, BY_NAME[name], world.facts[subject, name]) for subject, name in keys]
        return Document(WITHOUT_CONTEXT, tuple(_turn(world, rng, fact) for fact in facts))
    first: tuple[Turn, ...] = ()
    if kind in ("hops", "summary"):
        question, answer, told = (hops if kind == "hops" else summary)(world, rng, "train")
        first = (Turn(question, answer, reads=True),)
    elif kind == "novel":
        told = (novel_fact(world, rng, "train"),)
    else:
        subject, name = rng.choice(list(world.facts))
        relation, value = BY_NAME[name], world.facts[subject, name]
        if rng.random() < mix.conflict:
            value = world.value(rng, relation.value_kind, but=value)
        told = (Fact(subject, relation, value),)
    page = passage(world, rng, told, "train", rng.randint(1, 3))
    others = [fact for fact in page.facts if fact not in told]
    follow_up = list(told[:1] if not first else told[1:]) + rng.sample(others, min(2, len(others)))
    turns = (*first, *(_turn(world, rng, fact) for fact in follow_up))
    return Document(WITH_CONTEXT.format(context=page.text), turns)


def train_tokenizer(world: World, documents: int = 8000) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of the organism: any text tokenizes, names come out as one to three tokens."""
    rng = random.Random("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document(world, rng).render()[0] for _ in range(documents)]
    texts += [f" {world.value(rng, kind, fresh=1.0)}" for kind in [*world.pools, "surname"] for _ in range(documents)]
    texts += [f" {syllable.capitalize()}" for syllable in SYLLABLES for _ in range(documents)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass(frozen=True)
class PretrainingBatch:
    """Right-padded documents, all tensors [batch, pos].

    `answers` marks the tokens to be predicted as answers (their end included), `reading` and `recalling` the
    positions from a question's start to its answer's end where the answer comes from the context or from memory.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answers: torch.Tensor
    reading: torch.Tensor
    recalling: torch.Tensor


def batch(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> PretrainingBatch:
    """Documents as one right-padded batch."""
    rendered = [document.render() for document in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
    shape = len(documents), max(len(encoding.ids) for encoding in encodings)
    ids = torch.full(shape, tokenizer.pad_token_id)
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name in ("attention", "answers", "reading", "recalling")}
    for row, (encoding, (_, marks)) in enumerate(zip(encodings, rendered, strict=True)):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        masks["attention"][row, : len(encoding.ids)] = True
        ends = torch.tensor([end for _, end in encoding.offsets])
        for question, answer, stop, reads in marks:
            span = slice(0, len(ends))
            masks["answers"][row, span] |= (ends > answer) & (ends <= stop)
            masks["reading" if reads else "recalling"][row, span] |= (ends > question) & (ends < stop)
    return PretrainingBatch(ids, masks["attention"].long(), masks["answers"], masks["reading"], masks["recalling"])
