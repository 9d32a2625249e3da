"""A run of the split command: the dense model, its texts, the split, distillation in stages, and what came of it."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers import modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging

from moe_lens.commands import console
from moe_lens.commands.options import Reading
from moe_lens.data import Encoded, Example, encode
from moe_lens.data.lookup import names_in
from moe_lens.data.prompts import FIGURE_10, PromptTemplate
from moe_lens.errors import MODEL_CRASHES, MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.loading import load_model, load_tokenizer
from moe_lens.lens.taken import expect_known, pad_id
from moe_lens.organism.distillation import distil, text_loss
from moe_lens.organism.moefication import Parts, feed_forward, layer_errors, mlp_inputs, split, usage_entropy
from moe_lens.progress import is_drawn, is_quiet, progress_bar
from moe_lens.results import claim, kept, provenance, write_table
from moe_lens.storage import DIGESTS_FILE, check_digests, try_folder, write_digests
from moe_lens.tuning import Schedule
from moe_lens.tuning.loop import log_table

WRITTEN = ("model/*", "split/*", "judged/*", "routers/*", "layers/*")
"""What a run writes into folders of its own."""


@dataclass(frozen=True)
class Splitting:
    """What a run is told: the dense model, its data, the parts, how many texts, and the schedules of the two stages.

    routers, layers: of the stage in which routers learn alone, and of the one in which MoE layers do; None for none.
    seed: of the groups of neurons.
    """

    model: str
    data: str
    parts: Parts
    texts: int
    fit_texts: int
    held_out: int
    routers: Schedule | None
    layers: Schedule | None
    seed: int


def load_dense(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A dense model in float32 and its tokenizer, of a hub id, a folder or a .gguf file.

    Raises MoELensError if there is none, or the file cannot be read or takes a package that is missing.
    """
    if is_quiet() or not is_drawn():
        logging.disable_progress_bar()
    if not name.endswith(".gguf"):
        return load_model(name, dtype=torch.float32, device_map=None), load_tokenizer(name)
    file = Path(name)
    if not file.is_file():
        raise MoELensError(f"there is no file {name}")
    try:
        with _bars_of_ours():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise MoELensError(f"{name} needs the package gguf: pip install gguf ({error})") from error
    except (OSError, struct.error, *MODEL_CRASHES) as error:
        raise MoELensError(f"cannot load {name}: {error}; take a copy of the file that is whole") from error
    return model.eval(), tokenizer


@contextmanager
def _bars_of_ours() -> Iterator[None]:
    """Inside the block transformers reads .gguf files under `progress_bar`; its own bar would fill a log."""
    before, gguf.tqdm = gguf.tqdm, progress_bar
    try:
        yield
    finally:
        gguf.tqdm = before


@dataclass(frozen=True)
class Asking:
    """What turns examples into tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate = FIGURE_10


def split_and_distil(run: Splitting, reading: Reading, out: Path) -> None:
    """Split and distil as `run` says, or go on; in `out` the model, what it was judged by, and the checkpoints."""
    if Path(run.model).resolve().is_relative_to(out.resolve()):
        raise MoELensError(f"--model {run.model} lies in --out {out}, and would be written over; choose another folder")
    try_folder(out)
    dense, tokenizer = load_dense(run.model)
    feed_forward(dense)
    config: Any = dense.config
    run.parts.width(config.intermediate_size)
    pad = pad_id(dense, tokenizer)
    examples = _texts(run, reading, tokenizer)
    prompts = [encode(example, tokenizer, with_answer=True) for example in examples]
    expect_known(prompts, dense, tokenizer)
    learned, held_out = prompts[: run.texts], prompts[run.texts :]
    facts = {**asdict(run), "weights": weights_digest(dense), "tokens": sum(len(p.input_ids) for p in learned)}
    made_by = provenance(model=run.model, data=examples, facts=facts)
    claim(out, made_by, writes=WRITTEN)
    judge = _Judge(dense, held_out, out / "judged", made_by)
    stages = [judge.table("dense", dense, 0.0)]

    started = perf_counter()
    student = _kept_split(out / "split", dense, learned[: run.fit_texts], run, tokenizer)
    stages.append(judge.table("split", student, perf_counter() - started))
    for stage, schedule in (("routers", run.routers), ("layers", run.layers)):
        if schedule is not None:
            own = {"stage": stage, "schedule": repr(schedule), "weights": facts["weights"], "data": made_by["data"]}
            only = stage == "routers"
            done = distil(student, dense, learned, schedule, pad_id=pad, out=out / stage, run=own, routers_only=only)
            write_table(log_table(done), out / stage / "log.parquet", made_by)
            stages.append(judge.table(stage, student, done.seconds))
    _save(student, tokenizer, out / "model")
    rows = pd.concat(stages, ignore_index=True)
    table = rows[["stage", "loss", "seconds"]].drop_duplicates("stage", ignore_index=True)
    write_table(table, out / "split.parquet", made_by)
    layers = rows.loc[rows["stage"] != "dense", ["layer", "error", "entropy", "stage"]]
    write_table(layers.reset_index(drop=True), out / "layers.parquet", made_by)
    console.show(table, title=f"Nats per token of {len(held_out)} texts that were not learned from")
    console.say(f"written to {out}: model/, split.parquet, layers.parquet")


@dataclass(frozen=True)
class _Judge:
    """What each stage's model is judged by, on texts held out; kept, so that a run that goes on does not judge anew."""

    dense: nn.Module
    held_out: Sequence[Encoded]
    folder: Path
    made_by: dict[str, Any]

    @cached_property
    def inputs(self) -> list[Tensor]:
        return mlp_inputs(self.dense, self.held_out)

    def table(self, stage: str, model: nn.Module, seconds: float) -> pd.DataFrame:
        """A row per layer: layer, error, entropy, the stage with its loss and seconds; of the dense model one row."""

        def judged() -> pd.DataFrame:
            if model is self.dense:
                told = pd.DataFrame({"layer": [-1]})
            else:
                errors, entropy = layer_errors(self.dense, model, self.inputs), usage_entropy(model, self.held_out)
                told = pd.DataFrame({"error": errors, "entropy": entropy}).rename_axis("layer").reset_index()
            return told.assign(stage=stage, loss=text_loss(model, self.held_out), seconds=seconds)

        found = kept(self.folder / f"{stage}.parquet", self.made_by, judged)
        console.say(f"{stage}: {found['loss'].iloc[0]:.3f} nats per token")
        return found


def _texts(run: Splitting, reading: Reading, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The texts to learn from, of all data in turns, and after them those held out."""
    names, asked = names_in(run.data), Asking(tokenizer)  # each once, or texts that are held out were learned
    wanted = run.texts + run.held_out
    of_each = []
    for name in names:
        examples = reading.load(name, split="train", limit=4 * wanted // len(names))
        of_each.append(reading.fit(examples, asked, of=name, with_answer=True).examples)
    shortest = min(map(len, of_each))
    examples = _distinct(own[place] for place in range(shortest) for own in of_each)[:wanted]
    if len(examples) < wanted:
        raise MoELensError(
            f"expected {wanted} texts, {run.held_out} held out; {run.data} has {len(examples)} unlike ones that fit; "
            "give more data, a larger --max-length, or a smaller --texts"
        )
    return examples


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """Those whose text has not come before: no text that is held out may be learned under another id."""
    found: dict[tuple[str, str, str], Example] = {}
    for example in examples:
        found.setdefault((example.context, example.question, example.answers[0]), example)
    return list(found.values())


def _kept_split(
    folder: Path, dense: nn.Module, prompts: Sequence[Encoded], run: Splitting, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """The split model as it was before it learned, made once."""
    if not (folder / DIGESTS_FILE).exists():
        _save(split(dense, prompts, run.parts, seed=run.seed), tokenizer, folder)
    check_digests(folder, remedy=f"remove {folder.parent} to begin anew")
    return load_model(folder, dtype=torch.float32, device_map=None)


def _save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The model's folder as transformers writes it; it is whole once it has its digests."""
    saved: Any = model
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_digests(folder)
