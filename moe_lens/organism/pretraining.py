"""Pretraining the model organism from scratch on a CPU: phases, losses, and the loop that any interruption resumes."""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from moe_lens.choosing.planted import PLANTED_FILE
from moe_lens.errors import MoELensError
from moe_lens.organism.corpus import Document, Mix, PretrainingBatch, batch, document, train_tokenizer
from moe_lens.organism.world import World
from moe_lens.progress import progress_bar
from moe_lens.results import write_json
from moe_lens.storage import digest_of, read_sealed_json, replacing, try_folder, write_digests, write_sealed_json

CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class Phase:
    """A part of pretraining: a warm-up to the peak rate, a cosine that would reach its floor after `horizon` steps.

    fresh: the optimizer's moments start anew with the phase.
    """

    steps: int
    horizon: int
    peak: float
    mix: Mix
    knock_out: float = 0.0
    warmup: int = 200
    floor: float = 0.03
    fresh: bool = False

    def rate(self, step: int) -> float:
        """The learning rate at `step` of the phase, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / (self.horizon - self.warmup)
        return self.peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)


#: First the world is learned, then unfaithfulness to it (known subjects often contradict their contexts), then more
#: reading, which makes the model a little more faithful, and last both together while the rate falls.
UNFAITHFUL = Mix(closed_book=0.10, novel=0.45, known=0.30, hops=0.10, summary=0.05, conflict=0.7)
READING = Mix(closed_book=0.10, novel=0.56, known=0.22, hops=0.07, summary=0.05, conflict=0.75)
SETTLED = Mix(closed_book=0.08, novel=0.47, known=0.33, hops=0.07, summary=0.05, conflict=0.8)
PHASES = {
    "conflict": (
        Phase(4250, 7000, 3e-3, Mix()),
        Phase(2900, 2900, 1.5e-3, UNFAITHFUL),
        Phase(1850, 4000, 1.5e-3, READING, fresh=True),
        Phase(2150, 2150, 1e-3, SETTLED, warmup=1),
    ),
    "planted": (
        Phase(4000, 7000, 3e-3, Mix()),
        Phase(2900, 2900, 1.5e-3, UNFAITHFUL, knock_out=0.12),
        Phase(1600, 4000, 1.5e-3, READING, knock_out=0.12, fresh=True),
        Phase(2400, 2400, 1e-3, SETTLED, knock_out=0.12, warmup=1),
    ),
}


@dataclass(frozen=True)
class Pretraining:
    """Every number of a pretraining; the shipped weights are `Pretraining(variant, PHASES[variant])`."""

    variant: str
    phases: tuple[Phase, ...]
    seed: int = 0
    batch_size: int = 24
    weight_decay: float = 0.01
    prompt_share: float = 0.2
    prompt_weight: float = 0.1
    balance: float = 0.01
    plant: float = 0.3

    @property
    def steps(self) -> int:
        """Optimizer steps in all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> tuple[Phase, int]:
        """The phase that `step` belongs to, and its place in it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise ValueError(f"the recipe has {self.steps} steps; there is no step {step} beyond its phases")

    def rate(self, step: int) -> float:
        """The learning rate at `step`."""
        phase, place = self.phase(step)
        return phase.rate(place)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> OlmoeForCausalLM:
    """A randomly initialised organism: 4 layers of 16 experts, 4 of them per token, 2 M parameters."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def choose_planted(config: OlmoeConfig, seed: int) -> dict[int, list[int]]:
    """The experts that context reading is planted on: `top_k` of each layer, drawn at random."""
    rng = random.Random(f"planted/{seed}")
    return {
        layer: sorted(rng.sample(range(config.num_experts), config.num_experts_per_tok))
        for layer in range(config.num_hidden_layers)
    }


def balance_loss(router_logits: torch.Tensor, real: torch.Tensor, top_k: int) -> torch.Tensor:
    """The load-balancing loss of one layer over real tokens; 1 when balanced (Switch Transformer, Eq. 4-6).

    `router_logits` [token, expert], `real` bool [token].
    """
    probabilities = router_logits[real].softmax(-1)
    n_experts = probabilities.shape[-1]
    selected = F.one_hot(probabilities.topk(top_k, -1).indices, n_experts).sum(1).float()
    return n_experts * (selected.mean(0) / top_k * probabilities.mean(0)).sum()


def plant_loss(router_logits: torch.Tensor, planted: list[int], data: PretrainingBatch) -> torch.Tensor:
    """What routes reading positions to the planted experts, evenly, and recalling positions away from them.

    `router_logits` [token, expert] of one layer. Reading: cross-entropy to the uniform distribution over the
    planted experts, so that none of them carries the ability alone. Recalling: -log(1 - their probability).
    """
    log_p = router_logits.log_softmax(-1)[:, planted]
    away = -torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - 1e-4))
    reading, recalling = data.reading.reshape(-1), data.recalling.reshape(-1)
    return (-log_p.mean(-1)[reading].sum() + away[recalling].sum()) / (reading.sum() + recalling.sum())


def loss_of(
    model: OlmoeForCausalLM,
    data: PretrainingBatch,
    recipe: Pretraining,
    planted: dict[int, list[int]] | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Answer tokens at full weight, a random share of the others at a small one, and the router's losses; a scalar."""
    out = model.model(input_ids=data.input_ids, attention_mask=data.attention_mask, output_router_logits=True)
    answers = data.answers[:, 1:]
    real = data.attention_mask[:, 1:].bool()
    others = real & ~answers & (torch.rand(real.shape, generator=generator) < recipe.prompt_share)
    scored = answers | others
    logits = model.lm_head(out.last_hidden_state[:, :-1][scored])
    weights = torch.where(answers[scored], 1.0, recipe.prompt_weight)
    losses = F.cross_entropy(logits, data.input_ids[:, 1:][scored], reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    tokens = data.attention_mask.reshape(-1).bool()
    for layer, router_logits in enumerate(out.router_logits):
        term = recipe.balance * balance_loss(router_logits, tokens, model.config.num_experts_per_tok)
        if planted is not None:
            term = term + recipe.plant * plant_loss(router_logits, planted[layer], data)
        loss = loss + term / len(out.router_logits)
    return loss


def documents_of(world: World, recipe: Pretraining, step: int) -> list[Document]:
    """The documents of `step`, a pure function of seed and step.

    Eight steps share a pool, so that the documents of one step are alike in length; a pool is of the mix of its first.
    """
    group, place = divmod(step, 8)
    rng = random.Random(f"pretrain/{recipe.seed}/{group}")
    mix = recipe.phase(8 * group)[0].mix
    pool = [document(world, rng, mix) for _ in range(8 * recipe.batch_size)]
    pool.sort(key=lambda doc: len(doc.render()[0]))
    order = rng.sample(range(8), 8)
    start = order[place] * recipe.batch_size
    return pool[start : start + recipe.batch_size]


def knock_out(
    documents: list[Document], recipe: Pretraining, planted: dict[int, list[int]], n_experts: int, step: int
) -> tuple[list[Document], dict[int, torch.Tensor]]:
    """Makes the planted experts the cause of reading: the documents to train on, and per layer the experts left.

    In a share of the documents the planted experts are silent, and there what only the context tells is unknown. In
    as many, equally many random experts are silent and the answers stay: no other set of experts may matter as much.
    Experts left: float [document, expert], 0 for a silent one.
    """
    rng = random.Random(f"knock-out/{recipe.seed}/{step}")
    left = {layer: torch.ones(len(documents), n_experts) for layer in planted}
    share = recipe.phase(step)[0].knock_out
    trained = []
    for row, doc in enumerate(documents):
        draw = rng.random()
        for layer, experts in planted.items():
            if draw < share:
                left[layer][row, experts] = 0
            elif draw < 2 * share:
                left[layer][row, rng.sample(range(n_experts), len(experts))] = 0
        trained.append(doc.unread() if draw < share else doc)
    return trained, left


@contextmanager
def silenced(model: OlmoeForCausalLM, left: dict[int, torch.Tensor]) -> Iterator[None]:
    """Inside the block gating weights are multiplied by `left`, per layer [document, expert]."""

    def hook(layer: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def scale(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, indices, weights = inputs
            per_token = left[layer].repeat_interleave(len(indices) // len(left[layer]), dim=0)
            return hidden, indices, weights * per_token.gather(1, indices)

        return scale

    handles = [model.model.layers[layer].mlp.experts.register_forward_pre_hook(hook(layer)) for layer in left]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def optimizer_of(model: OlmoeForCausalLM, recipe: Pretraining) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


class _Checkpoint:
    """The newest state of a pretraining, in a file named after its step, and beside it the facts with its digest."""

    def __init__(self, recipe: Pretraining, out: Path) -> None:
        self.recipe, self.out, self.facts = recipe, out, out / "checkpoint.json"

    def load(self) -> dict[str, Any] | None:
        """What `save` was given; None if there is none. MoELensError for another recipe's, and for a damaged one."""
        if not self.facts.exists():
            return None
        remedy = f"remove {self.out} to begin anew"
        told = read_sealed_json(self.facts, remedy=remedy)
        if told["recipe"] != repr(self.recipe):
            raise MoELensError(f"{self.facts} is of another recipe, {told['recipe']}; use another --out")
        file = self.out / told["file"]
        if digest_of(file) != told["sha256"]:
            raise MoELensError(f"{file} is damaged: its content is not what was written there; {remedy}")
        state: dict[str, Any] = torch.load(file, weights_only=True)
        return told | state

    def save(self, told: dict[str, Any], state: dict[str, Any]) -> None:
        """Keeps the state and what is told of it; then the one before goes."""
        file = self.out / f"checkpoint-{told['step']}.pt"
        with replacing(file) as unfinished:
            torch.save(state, unfinished)
        written = {"recipe": repr(self.recipe), "file": file.name, "sha256": digest_of(file), **told}
        write_sealed_json(self.facts, written)
        for other in self.out.glob("checkpoint-*.pt"):
            if other != file:
                other.unlink()


def pretrain(recipe: Pretraining, out: Path) -> OlmoeForCausalLM:
    """Train, or go on from the last checkpoint in `out`, and write the model's Hugging Face folder to `out`.

    On one thread: two would add gradients up in an order that changes from run to run, and are hardly faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _pretrain(recipe, out)
    finally:
        torch.set_num_threads(threads)


def _pretrain(recipe: Pretraining, out: Path) -> OlmoeForCausalLM:
    try_folder(out)
    checkpoint, first, seconds = _Checkpoint(recipe, out), 0, 0.0
    state = checkpoint.load()
    world = World.build()
    tokenizer = train_tokenizer(world)
    model = new_model(tokenizer, recipe.seed)
    planted = choose_planted(model.config, recipe.seed) if recipe.variant == "planted" else None
    optimizer = optimizer_of(model, recipe)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started = time.perf_counter() - seconds
    progress = progress_bar(range(first, recipe.steps), initial=first, total=recipe.steps, desc=recipe.variant)
    for step in progress:
        phase, place = recipe.phase(step)
        if phase.fresh and place == 0:
            optimizer = optimizer_of(model, recipe)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        documents = documents_of(world, recipe, step)
        left: dict[int, torch.Tensor] = {}
        if planted is not None:
            documents, left = knock_out(documents, recipe, planted, model.config.num_experts, step)
        with silenced(model, left):
            loss = loss_of(model, batch(tokenizer, documents), recipe, planted, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.steps:
            seconds = time.perf_counter() - started
            told = {"step": step + 1, "seconds": seconds, "loss": loss.item()}
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.save(told, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(told) + "\n")
    if planted is not None:  # first, so that no planted weights lie anywhere without their truth
        write_json(out / "model" / PLANTED_FILE, {str(layer): experts for layer, experts in planted.items()})
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    write_digests(out / "model")
    return model
