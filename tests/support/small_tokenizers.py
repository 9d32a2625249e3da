"""Small tokenizers of the kinds that models have, built on the spot: sentencepiece-like ones, fast and slow."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend

SAMPLE = [
    "Based on the context below, output the correct answer for the following question. Context: Question: Answer:",
    "The New York Times is read in New York, Paris and Zürich; naïve café talk, 1939–1945.",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def unigram() -> PreTrainedTokenizerFast:
    """Metaspace and unigram with byte fallback, as sentencepiece models of this kind are converted."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    bytes_ = [[name, -20.0] for name in BYTES]
    state["model"] |= {"vocab": vocabulary[:3] + bytes_ + vocabulary[3:], "byte_fallback": True, "unk_id": 0}
    return _finish(Tokenizer.from_str(json.dumps(state)))


def bpe() -> PreTrainedTokenizerFast:
    """BPE with byte fallback over text whose spaces a normalizer replaces, and one more before the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation()])  # for the merges only
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _finish(tokenizer)


def nfkc() -> PreTrainedTokenizerFast:
    """As `unigram`, behind a normalizer that rewrites and drops characters."""
    tokenizer = unigram()
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    return _finish(core)


def merging() -> PreTrainedTokenizerFast:
    """Byte-level BPE over text that nothing parts before, so that ": " and more are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Answer: New York, Answer: Bern"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


class SlowLetters(PythonBackend):
    """A slow tokenizer with a token per letter of a small alphabet and "?" for all others."""

    def __init__(self, **options) -> None:
        self.letters = {letter: place for place, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ")}
        super().__init__(unk_token="?", bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.get(token, self.letters["?"])

    def _convert_id_to_token(self, index: int) -> str:
        return next(letter for letter, place in self.letters.items() if place == index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def slow_bytes() -> PreTrainedTokenizerBase:
    """A slow tokenizer of bytes, which decodes to the very text."""
    return ByT5Tokenizer(extra_ids=0)


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
