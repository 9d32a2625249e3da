"""Tiny random models of each router family, and a tiny byte-level tokenizer; nothing is downloaded."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before any import reads it: else a name that is not there is tried for half a minute
)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_lens.architecture.tiny import tiny_model
from moe_lens.experts import ExpertSet
from moe_lens.lens.lens import MoELens
from moe_lens.statistics import ExpertUsage

CORPUS = [
    "Based on the context below, output the correct answer for the following question.",
    "Context: The capital of Arland is Belmor. Question: What is the capital of Arland? Answer: Belmor",
    "The cat sat on the mat while the dog slept in the sun.",
]
SIZE = {"num_hidden_layers": 3, "num_experts_per_tok": 3}
GROUPED = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
FAMILIES = {
    "olmoe": {"norm_topk_prob": False},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "q_lora_rank": None, **GROUPED},
    "deepseek_v3": {"norm_topk_prob": True, "q_lora_rank": None, **GROUPED},
}
#: Whose routing is in parts that of others; tests of every family take them among the slow ones.
LIKE_OTHERS = ("qwen3_moe", "deepseek_v2")
SELECTION_BIAS_FAMILIES = ("deepseek_v3",)


def pytest_collection_finish() -> None:
    """What imports made stays: it is not to be looked through whenever a test, or a halved batch, collects garbage."""
    gc.collect()
    gc.freeze()


def build_model(family: str, vocab_size: int, **changes: object) -> torch.nn.Module:
    """A tiny random model of `family` with three layers and three experts per token."""
    return tiny_model(family, vocab_size=vocab_size, changes=SIZE | FAMILIES.get(family, {}) | changes)


def with_squared_shared_experts(vocab_size: int) -> torch.nn.Module:
    """A model whose blocks add the square of what their shared experts give."""
    model = build_model("deepseek_v3", vocab_size)

    class Squaring(type(model.model.layers[1].mlp)):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            shared = self.shared_experts(hidden_states)
            return super().forward(hidden_states) - shared + shared**2

    for layer in model.model.layers[1:]:
        layer.mlp.__class__ = Squaring
    return model


def left_padded(lens: MoELens, texts: list[str]) -> dict[str, torch.Tensor]:
    """What a bare model takes for these texts: ids, mask, and positions counted from each first token."""
    rows = [lens.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    pad = lens.tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}


def most_used(lens: MoELens, texts: list[str], *, size: int) -> ExpertSet:
    """The experts of each layer that these texts use most, so that masking them must show."""
    [usage] = lens.measure(texts, ExpertUsage(), progress=False)
    return ExpertSet.top(usage.table(), size)


@pytest.fixture
def mmlu_folder(tmp_path: Path) -> Path:
    """MMLU's folders as its authors publish them, with made-up questions of two subjects."""
    right = {
        "dev": {"high_school_physics": "ABCDA", "law": "ABCDAB"},
        "val": {"law": "C"},
        "test": {"high_school_physics": "CA", "law": "BDA"},
    }
    for split, subjects in right.items():
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        for subject, letters in subjects.items():
            lines = [f'{subject} {split} {i}?,w{i},"x, {i}",y{i},z{i},{own}' for i, own in enumerate(letters)]
            (tmp_path / "mmlu" / split / f"{subject}_{split}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "mmlu"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def whole(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with nothing amiss, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    build_model("olmoe", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in FAMILIES],
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def lenses(tokenizer: PreTrainedTokenizerFast) -> dict[str, MoELens]:
    return {name: MoELens.from_pretrained(build_model(name, len(tokenizer)), tokenizer) for name in FAMILIES}


@pytest.fixture
def lens(lenses: dict[str, MoELens], family: str) -> MoELens:
    """A lens on each family in turn; tests that change its weights put them back."""
    return lenses[family]


@pytest.fixture
def olmoe(lenses: dict[str, MoELens]) -> MoELens:
    return lenses["olmoe"]


@pytest.fixture
def most_used_experts(lens: MoELens) -> ExpertSet:
    """The two most used experts of each layer on the fixed corpus."""
    return most_used(lens, CORPUS, size=2)


@pytest.fixture(scope="session")
def judge_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The base URL of a judge's server in a process of its own, and the file of the questions it was asked."""
    pytest.importorskip("openai")
    log = tmp_path_factory.mktemp("judge") / "asked.txt"
    log.touch()
    script = Path(__file__).parent / "support" / "judge_server.py"
    with subprocess.Popen([sys.executable, str(script), str(log)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log
        finally:
            process.terminate()
