"""A small byte-level BPE tokenizer, trained on the spot, for tests that need real offsets."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message.role }}|>\n{{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SAMPLE = [
    "Based on the context below, output the correct answer for the following question.",
    "The New York Times is read in New York, Paris and Zürich; naïve café talk, 1939–1945.",
]


def byte_level_tokenizer(
    texts: Iterable[str] = SAMPLE, *, chat: bool, trim_offsets: bool = True, vocabulary: int = 700
) -> PreTrainedTokenizerFast:
    """A tokenizer that adds <bos> and has <eos> and <pad>, with or without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), bos])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def text_of(tokenizer, ids) -> str:
    """The exact text of these tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
