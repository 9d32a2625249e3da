"""What `make gpu-check` does on a device, in parts; each part gives its rows as they come."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import opened
import torch
from accelerate import dispatch_model
from torch import nn
from training_cost import Case, random_batch, stepping
from turns import Row, in_turns, in_words, is_accelerator, synchronize, timed

from moe_lens import MoELens, MoELensError
from moe_lens.architecture.tiny import FAMILIES, tiny_model, tiny_tokenizer
from moe_lens.checks import CHECKS, PROMPTS, run_checks
from moe_lens.checks.reference import bare_logits
from moe_lens.checks.suite import CRASHES
from moe_lens.data import Batch
from moe_lens.lens.loading import load_skeleton
from moe_lens.tuning.objective import answer_loss

TO_RUN, TO_TRAIN = 3, 20
"""Bytes per parameter: in bfloat16, some to spare; float32 values, gradients, two moments, and a bfloat16 copy."""
CHECKED_AS = (torch.float32, torch.bfloat16)
METHODS = ("stock", "fft", "ceft", "router")


@dataclass(frozen=True)
class Scale:
    """How much a part does with a model of a size.

    batch, tokens: of what is run at once. new_tokens: generated. long: lengths of the prompts whose attention is read,
    the first of them at all positions. examples: that statistics see. sweep_layers: of the model that is swept.
    turns: of each way. blocks: how often each method trains, `steps` timed ones each time.
    """

    batch: int = 8
    tokens: int = 256
    new_tokens: int = 16
    long: tuple[int, int] = (2048, 8192)
    examples: int = 16
    sweep_layers: int = 2
    turns: int = 7
    blocks: int = 3
    steps: int = 3


SCALES = {
    "olmoe": Scale(),
    "mid": Scale(4, 64, 4, (256, 512), 8, 1, turns=3),
    "tiny": Scale(2, 24, 2, (48, 64), 4, 1, turns=2, blocks=2, steps=1),
}


@dataclass(frozen=True)
class Where:
    """On which device, with a model of which size, and for which families."""

    device: str
    size: str
    families: tuple[str, ...] = FAMILIES

    @property
    def scale(self) -> Scale:
        return SCALES[self.size]

    def lens(self, layers: int | None = None) -> MoELens:
        """A random model of the size, opened. layers: None for as many as there is memory to run."""
        return opened.random_lens(self.size, layers=layers or self.layers_at(TO_RUN), device=self.device)

    def layers_at(self, cost: int) -> int:
        """How many of its layers fit the memory, at a cost in bytes per parameter; MoELensError where not one does."""
        one, two = (opened.parameters_of(self.size, layers) for layers in (1, 2))
        whole = torch.cuda.mem_get_info()[0] if is_accelerator(self.device) else _memory_of_the_cpu()
        fitting = 1 + (int(0.85 * whole) // cost - one) // (two - one)
        if fitting < 1:
            raise MoELensError(f"expected memory for a layer, {one:,} parameters; there is {whole / 2**30:.1f} GiB")
        return min(fitting, opened.layers_of(self.size))


def _memory_of_the_cpu() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def families(where: Where, share: int, shares: int) -> Iterator[Row]:
    """Every check on a tiny model of each family, in float32 and bfloat16; this process takes each `shares`-th."""
    tokenizer = tiny_tokenizer()
    for family in where.families[share::shares]:
        for dtype in CHECKED_AS:
            model = tiny_model(family, dtype=dtype).to(where.device)
            what = f"families in {str(dtype).removeprefix('torch.')}"
            yield from checks_of(family, what, partial(MoELens, model, tokenizer))
            synchronize(where.device)  # raises where a kernel has left the device unusable, which ends this process


def checks_of(family: str, what: str, opening: Callable[[], MoELens]) -> Iterator[Row]:
    """A row for each check of a lens with its outcome and detail; "no model" where the bare model does not run."""
    try:
        lens = opening()
        bare_logits(lens, PROMPTS)
    except MoELensError as refusal:
        found = {check: ("refused", str(refusal)) for check in CHECKS}
    except CRASHES as crash:
        found = {check: ("no model", f"the bare model ends in {in_words(crash)}") for check in CHECKS}
    else:
        found = {
            row.check: (row.outcome, f"error {row.error:.2g}, allowed {row.allowed:.2g}; {row.detail}")
            for row in run_checks(lens, PROMPTS).itertuples()
        }
    for check, (outcome, detail) in found.items():
        yield {"what": what, "way": check, "family": family, "outcome": outcome, "detail": detail}


def passes(where: Where, share: int, shares: int) -> Iterator[Row]:
    """Forward passes and generation: plain, captured and masked."""
    lens, scale = where.lens(), where.scale
    examples = opened.examples_of(lens, scale.batch, scale.tokens)
    what = f"forward, {scale.batch} × {scale.tokens} tokens"
    yield from told(what, opened.checked(lens, examples))
    yield from told(what, in_turns(opened.passes(lens, examples), scale.turns, where.device))
    ways = opened.generation(lens, examples, scale.new_tokens)
    what = f"{scale.new_tokens} tokens generated, batch of {scale.batch}"
    yield from told(what, in_turns(ways, scale.turns, where.device))


def attention(where: Where, share: int, shares: int) -> Iterator[Row]:
    """Attention rows of long prompts."""
    lens = where.lens()
    for tokens in where.scale.long:
        ways = opened.attention(lens, tokens, all_rows=tokens == where.scale.long[0])
        yield from told(f"attention, one prompt of {tokens} tokens", in_turns(ways, where.scale.turns, where.device))


def statistics(where: Where, share: int, shares: int) -> Iterator[Row]:
    """Each statistic."""
    lens, scale = where.lens(), where.scale
    ways = opened.statistics(lens, opened.examples_of(lens, scale.examples, scale.tokens), scale.batch)
    what = f"statistics, {scale.examples} × {scale.tokens} tokens"
    yield from told(what, in_turns(ways, scale.turns, where.device))


def sweep(where: Where, share: int, shares: int) -> Iterator[Row]:
    """Single experts' effects, of a few layers."""
    lens, scale = where.lens(where.scale.sweep_layers), where.scale
    ways = opened.sweep(lens, opened.examples_of(lens, scale.batch, scale.tokens))
    what = f"sweep, {lens.architecture.n_layers} layers, {scale.batch} × {scale.tokens} tokens"
    yield from told(what, in_turns(ways, scale.turns, where.device))


def training(where: Where, share: int, shares: int) -> Iterator[Row]:
    """Training steps: with as many layers as full fine-tuning has memory for, and of what trains little with all."""
    layers = where.layers_at(TO_TRAIN)
    lens = where.lens(layers)
    yield from steps_in_turns(where, lens, METHODS)
    del lens
    released(where.device)
    if layers < where.layers_at(TO_RUN):
        yield from steps_in_turns(where, where.lens(), ("forward", "ceft", "router"))


def steps_in_turns(where: Where, lens: MoELens, methods: tuple[str, ...]) -> Iterator[Row]:
    """Rows of steps by each method in turns; one that crashes is told with its error, and takes no more."""
    scale, left = where.scale, list(methods)
    batch = random_batch(lens, scale.batch, scale.tokens)
    what = f"training step, {lens.architecture.n_layers} layers, {scale.batch} × {scale.tokens} tokens"
    for block in range(scale.blocks):
        for method in left[:: -1 if block % 2 else 1]:
            try:
                rows = _block(where, lens, method, batch)
            except CRASHES as crash:
                left.remove(method)
                rows = [{"error": in_words(crash)}]
            released(where.device)
            for step, row in enumerate(rows):
                yield {"what": what, "way": method, "plain": methods[0], "turn": block * scale.steps + step, **row}


def _block(where: Where, lens: MoELens, method: str, batch: Batch) -> list[Row]:
    """Some steps by a method, timed after one that is not, since it makes the optimizer's state."""
    if method == "forward":
        around = forward_alone(lens, batch)
    else:
        around = stepping(Case(method, lens.architecture.n_experts, lens.architecture.top_k), lens, batch)
    with around as (step, _):
        step()
        return [timed(step, where.device) for _ in range(where.scale.steps)]


@contextmanager
def forward_alone(lens: MoELens, batch: Batch) -> Iterator[tuple[Callable[[], None], int]]:
    """What takes the forward pass of a training step, and trains no parameter."""

    def step() -> None:
        with torch.no_grad():
            answer_loss(lens.module, batch)

    yield step, 0


def released(device: str) -> None:
    """Give back what is no longer used: a crash's frames and a method's optimizer hold each other in circles."""
    gc.collect()
    if is_accelerator(device):
        torch.cuda.empty_cache()


def devices(where: Where, share: int, shares: int) -> Iterator[Row]:
    """A model whose layers are split over two devices: its checks, its passes and its training."""
    places = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if is_accelerator(where.device) else ["cpu"] * 2
    if len(places) < 2:
        yield {"what": "two devices", "way": "–", "outcome": "left out: there is one"}
        return
    split = split_over(load_skeleton("organism"), *places[:2])
    yield from checks_of("organism", "the organism's checks, over two devices", partial(organism_over, split))
    yield from passes_over(where, *places[:2])
    for row in steps_in_turns(where, organism_over(split), METHODS):
        yield {**row, "what": "the organism's training step, over two devices"}


def organism_over(split: dict[str, str]) -> MoELens:
    """The organism with its layers on these devices, as a user opens it."""
    return MoELens.from_pretrained("organism", device_map=split)


def passes_over(where: Where, first: str, second: str) -> Iterator[Row]:
    """Forward passes of a model on one device, then of the same one split over two: there may be no room for both."""
    what, turns = "forward, over two devices", where.scale.turns
    lens = where.lens()
    examples = opened.examples_of(lens, where.scale.batch, where.scale.tokens)
    whole = "plain, on one device"
    yield from told(what, in_turns({whole: opened.passes(lens, examples)["plain"]}, turns, where.device))
    module = dispatch_model(lens.module, split_over(lens.module, first, second), force_hooks=True)
    lens = MoELens(module, lens.tokenizer)
    yield from told(what, opened.checked(lens, examples))
    for row in in_turns(opened.passes(lens, examples), turns, where.device):
        yield {**row, "what": what, "plain": whole}


def split_over(module: nn.Module, first: str, second: str) -> dict[str, str]:
    """A device for each part of a causal language model: the first half of its layers on the first device."""
    layers = len(module.model.layers)
    early = {"embed_tokens", "rotary_emb", *(f"layers.{i}" for i in range(layers // 2))}
    parts = [name for name, _ in module.model.named_children() if name != "layers"]
    parts += [f"layers.{i}" for i in range(layers)]
    return {f"model.{name}": first if name in early else second for name in parts} | {"lm_head": second}


def told(what: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, each with what it is of."""
    return ({"what": what, **row} for row in rows)
