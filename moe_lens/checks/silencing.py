"""The checks of masked experts: silenced, silenced with the rest rescaled, rerouted, and while text is generated."""

from collections.abc import Sequence

import torch

from moe_lens.checks.comparing import Finding, apart, close, compared, removable, used
from moe_lens.checks.deletion import deleted
from moe_lens.checks.reference import bare_logits, edited_gating, padded, rescaled, without_last_weights, zeroed
from moe_lens.errors import MoELensError
from moe_lens.lens.greedy import Greedy
from moe_lens.lens.holding import measuring
from moe_lens.lens.interventions import Renormalize, Reroute, Zero
from moe_lens.lens.lens import MoELens
from moe_lens.lens.taken import pad_id

NEW_TOKENS = 5


def zero(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Zero equals weights of zero in the experts, bit for bit."""
    experts = used(lens, texts)
    with lens.intervene(Zero(experts)):
        masked, _ = lens.run_with_cache(texts)
    with without_last_weights(lens, experts):
        expected = bare_logits(lens, texts)
    return compared(masked, expected, bare_logits(lens, texts), 0.0, experts)


def renormalize(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Renormalize equals its formula in a torch hook."""
    experts = used(lens, texts)
    with lens.intervene(Renormalize(experts)):
        masked, _ = lens.run_with_cache(texts)
    with edited_gating(lens, experts, rescaled):
        expected = bare_logits(lens, texts)
    if lens.architecture.top_k == 1:
        return Finding(apart(masked, expected), close(lens), "top 1: nothing is left to rescale")
    return compared(masked, expected, bare_logits(lens, texts), close(lens), experts)


def reroute(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Reroute equals a model without the experts: no router rows, no weights."""
    fixed = [site.layer for site in lens.architecture.moe if site.observed.chooses_by_token]
    learned = [layer for layer in lens.architecture.moe_layers if layer not in fixed]
    experts = removable(lens, used(lens, texts).restrict(learned))
    with lens.intervene(Reroute(experts)):
        rerouted, _ = lens.run_with_cache(texts)
    with deleted(lens, experts):
        expected = bare_logits(lens, texts)
    found = compared(rerouted, expected, bare_logits(lens, texts), close(lens), experts)
    note = f"; refused in layers {fixed}, which choose by token id" if fixed else ""
    return Finding(found.error, found.allowed, found.detail + note)


def generate(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Masked greedy generation of a left-padded batch says what the model says under torch hooks."""
    bare_generate = getattr(lens.module, "generate", None)
    if bare_generate is None:
        raise MoELensError(f"{type(lens.module).__name__} cannot generate")
    experts = used(lens, texts)
    with lens.intervene(Zero(experts)):
        masked = lens.generate(texts, max_new_tokens=NEW_TOKENS, batch_size=len(texts), progress=False)
    inputs = padded(lens, texts)
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    greedy, pad = Greedy(lens.module, lens.tokenizer), pad_id(lens.module, lens.tokenizer)
    with (
        edited_gating(lens, experts, zeroed),
        torch.no_grad(),
        measuring(lens.module),
        greedy.decoding(NEW_TOKENS, pad) as settings,
    ):
        ids = bare_generate(**arguments, **settings)
    expected = greedy.texts(ids[:, inputs["input_ids"].shape[1] :])
    differing = sum(a != b for a, b in zip(masked, expected, strict=True))
    return Finding(differing / len(texts), 0.0, f"{NEW_TOKENS} tokens, '{experts}'")
