"""The checks of a lens on its model, each against the bare model: how far are they apart, and how far may they be?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.quantized import is_plain
from moe_lens.checks.deletion import deleted
from moe_lens.checks.reference import (
    bare_logits,
    edited_gating,
    given_streams,
    padded,
    rescaled,
    watched,
    watching,
    without_last_weights,
    zeroed,
)
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.interventions import Renormalize, Reroute, Zero
from moe_lens.lens.lens import MoELens
from moe_lens.lens.record import CAPTURES, Record, read_layers
from moe_lens.routing import Routing

NEW_TOKENS = 5
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}
CLOSE_IN_LOW_PRECISION = 5e-2


@dataclass(frozen=True)
class Finding:
    """What a check found. error: the largest difference by the largest value; it may be up to `allowed`."""

    error: float
    allowed: float
    detail: str = ""


Check = Callable[[MoELens, Sequence[str]], Finding]


def capture(lens: MoELens, texts: Sequence[str]) -> Finding:
    """All that is recorded (logits, routing, streams) is, bit for bit, what torch hooks see in the bare model."""
    with watched(lens) as reader:
        plain = bare_logits(lens, texts)
    logits, record, refused = _recorded(lens, texts)
    errors = {"logits": _apart(logits, plain)}
    everywhere = OnDevices(torch.arange(plain.shape[1]))
    for name, by_layer in read_layers(reader(len(texts)), record.captured, everywhere).items():
        for layer, value in by_layer.items():
            pairs = zip(_tensors(record.captured[name][layer]), _tensors(value), strict=True)
            errors[f"{name} of layer {layer}"] = max(_apart(a, b) for a, b in pairs)
    worst = max(errors, key=errors.__getitem__)
    said = [*([worst] if errors[worst] else []), *refused]
    return Finding(errors[worst], 0.0, "; ".join(said))


def _recorded(lens: MoELens, texts: Sequence[str]) -> tuple[Tensor, Record, list[str]]:
    """Logits and a record of all captures without a check of their own, and why some of them are refused."""
    names = [name for name in CAPTURES if name not in CHECKS]
    try:
        return *lens.run_with_cache(texts, capture=names), []
    except MoELensError:
        refused = {name: refusal for name in names if (refusal := _refusal(lens, texts, name)) and name != "routing"}
    said = [f"{name} is refused: {refusal}" for name, refusal in refused.items()]
    return *lens.run_with_cache(texts, capture=[name for name in names if name not in refused]), said


def _refusal(lens: MoELens, texts: Sequence[str], name: str) -> str | None:
    """Why the lens does not record this, None if it does."""
    try:
        lens.run_with_cache(texts, capture=(name,))
    except MoELensError as refusal:
        return str(refusal)
    return None


def _tensors(value: Routing | Tensor) -> tuple[Tensor, ...]:
    """What is compared of something that was recorded."""
    return (value.logits, value.indices, value.weights) if isinstance(value, Routing) else (value,)


def weights_rule(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Gating weights follow from the router logits by the rule that was found, but for a factor that it leaves open."""
    _, record = lens.run_with_cache(texts)
    rule, errors = lens.architecture.scoring, []
    for routing in record.routing.values():
        used = (routing.weights != 0).all(-1)  # a skip has no weight
        given = (values[used] for values in (routing.logits, routing.indices, routing.weights))
        errors.append(_apart(routing.weights[used], rule.fitted(*given)))
    return Finding(max(errors), _close(lens), str(rule))


def zero(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Zero equals weights of zero in the experts, bit for bit."""
    experts = _used(lens, texts)
    with lens.intervene(Zero(experts)):
        masked, _ = lens.run_with_cache(texts)
    with without_last_weights(lens, experts):
        expected = bare_logits(lens, texts)
    return _compared(masked, expected, bare_logits(lens, texts), 0.0, experts)


def renormalize(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Renormalize equals its formula in a torch hook."""
    experts = _used(lens, texts)
    with lens.intervene(Renormalize(experts)):
        masked, _ = lens.run_with_cache(texts)
    with edited_gating(lens, experts, rescaled):
        expected = bare_logits(lens, texts)
    if lens.architecture.top_k == 1:
        return Finding(_apart(masked, expected), _close(lens), "top 1: nothing is left to rescale")
    return _compared(masked, expected, bare_logits(lens, texts), _close(lens), experts)


def reroute(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Reroute equals a model without the experts: no router rows, no weights."""
    fixed = [site.layer for site in lens.architecture.moe if site.observed.chooses_by_token]
    learned = [layer for layer in lens.architecture.moe_layers if layer not in fixed]
    experts = _removable(lens, _used(lens, texts).restrict(learned))
    with lens.intervene(Reroute(experts)):
        rerouted, _ = lens.run_with_cache(texts)
    with deleted(lens, experts):
        expected = bare_logits(lens, texts)
    found = _compared(rerouted, expected, bare_logits(lens, texts), _close(lens), experts)
    note = f"; refused in layers {fixed}, which choose by token id" if fixed else ""
    return Finding(found.error, found.allowed, found.detail + note)


def generate(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Masked greedy generation of a left-padded batch says what the model says under torch hooks."""
    bare_generate = getattr(lens.module, "generate", None)
    if bare_generate is None:
        raise MoELensError(f"{type(lens.module).__name__} cannot generate")
    experts = _used(lens, texts)
    with lens.intervene(Zero(experts)):
        masked = lens.generate(texts, max_new_tokens=NEW_TOKENS, batch_size=len(texts), progress=False)
    inputs = padded(lens, texts)
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with edited_gating(lens, experts, zeroed), torch.no_grad():
        ids = bare_generate(
            **arguments,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=lens.tokenizer.pad_token_id or 0,
        )
    new = ids[:, inputs["input_ids"].shape[1] :]
    expected = [lens.tokenizer.decode(row, skip_special_tokens=True) for row in new]
    differing = sum(a != b for a, b in zip(masked, expected, strict=True))
    return Finding(differing / len(texts), 0.0, f"{NEW_TOKENS} tokens, '{experts}'")


def attention(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Recorded attention rows are those of the eager implementation's whole maps, pads left out."""
    paths = {layer: path for layer, path in enumerate(lens.architecture.attentions) if path}
    if not paths:
        raise MoELensError("no attention modules are known in this model")
    # Quantised layers may round the rows of a batch together, pads among them, which eager attention fills otherwise.
    alone = not all(is_plain(parameter) for parameter in lens.module.parameters())
    errors = [_attention_error(lens, batch, paths) for batch in ([[text] for text in texts] if alone else [texts])]
    detail = f"{len(paths)} layers, model runs {pretrained(lens.module).config._attn_implementation}"
    return Finding(max(errors), _close(lens), detail + ("; each text alone: the model is quantised" if alone else ""))


def _attention_error(lens: MoELens, texts: Sequence[str], paths: Mapping[int, str]) -> float:
    """How far recorded rows of one batch are from eager attention's, at worst; paths: attention modules by layer.

    Each layer of the eager model gets the residual stream of the model as it is: in low precision what rounding
    changes in one layer may send a token to other experts in the next.
    """
    _, record = lens.run_with_cache(texts, capture=("attention",))
    with watching(lens.module, lens.architecture.layers, "inputs") as streams:
        bare_logits(lens, texts)
    model = pretrained(lens.module)
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with watching(lens.module, list(paths.values()), "output") as seen, given_streams(lens.module, streams):
            bare_logits(lens, texts)
    finally:
        model.set_attn_implementation(name)
    real = record.attention_mask.bool()
    return max(
        _apart(record.attention_rows[layer][row][:, real[row]], seen[path][1][row][:, real[row]])
        for layer, path in paths.items()
        for row in range(len(texts))
    )


def expert_outputs(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Gating weights times single experts' outputs sum to the experts' output in the bare model."""
    sites = lens.architecture.moe
    with watching(lens.module, [site.experts for site in sites], "output") as whole:
        bare_logits(lens, texts)
    _, record = lens.run_with_cache(texts, capture=("routing", "expert_outputs"))
    errors = []
    for site in sites:
        weights, outputs = record.routing[site.layer].weights.float(), record.expert_outputs[site.layer].float()
        summed = torch.einsum("bpk,bpkd->bpd", weights, outputs)
        added = 0 if site.added is None else lens.module.get_parameter(site.added)
        errors.append(_apart(summed, whole[site.experts].reshape(summed.shape) - added))
    return Finding(max(errors), _close(lens))


def logit_lens(lens: MoELens, texts: Sequence[str]) -> Finding:
    """The logit lens on the last layer's output gives the model's logits."""
    logits, record = lens.run_with_cache(texts, capture=("residual",))
    return Finding(_apart(lens.project_on_vocab(record.residual[lens.architecture.n_layers - 1]), logits), _close(lens))


def _compared(changed: Tensor, expected: Tensor, plain: Tensor, allowed: float, experts: ExpertSet) -> Finding:
    """How far apart they are; as far as can be if the change shows nowhere, so that the comparison says nothing."""
    effect = _apart(changed, plain)
    if effect == 0:
        return Finding(float("inf"), allowed, f"masking '{experts}' changes nothing")
    low = allowed == CLOSE_IN_LOW_PRECISION  # where scores tie, and the place decides
    largest = _apart(changed, expected)
    if not low:
        return Finding(largest, allowed, f"effect {effect:.2g}")
    detail = f"effect {effect:.2g}; without the tenth of the positions that are farthest apart, by up to {largest:.2g}"
    return Finding(_mostly_apart(changed, expected), allowed, detail)


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference by the largest finite value of b; infinite where one is not a number or has no equal."""
    a, b = a.float(), b.float().to(a.device)
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    finite = b.isfinite()
    if not finite.any():
        return 0.0
    return ((a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp(min=1e-30)).item()


def _mostly_apart(a: Tensor, b: Tensor) -> float:
    """As `_apart` of [batch, pos, ...], without the tenth of the positions that are farthest apart."""
    by_position = (a.float() - b.float()).abs().amax(-1).flatten()
    return (by_position.quantile(0.9) / b.float().abs().max().clamp(min=1e-30)).item()


def _close(lens: MoELens) -> float:
    return CLOSE.get(pretrained(lens.module).dtype, CLOSE_IN_LOW_PRECISION)


def _used(lens: MoELens, texts: Sequence[str]) -> ExpertSet:
    """The most used expert of each layer, among those that have weights."""
    _, record = lens.run_with_cache(texts)
    return ExpertSet.of({layer: [_most_used(lens, record, layer)] for layer in lens.architecture.moe_layers})


def _most_used(lens: MoELens, record: Record, layer: int) -> int:
    with_weights = len(lens.architecture.at(layer).output_weights(lens.module))
    chosen = record.routing[layer].indices[record.attention_mask.bool()].flatten()
    return int(torch.bincount(chosen, minlength=with_weights)[:with_weights].argmax())


def _removable(lens: MoELens, experts: ExpertSet) -> ExpertSet:
    """These and one of every other group, so that groups stay equally large."""
    if lens.architecture.groups is None:
        return experts
    size = lens.architecture.n_experts // lens.architecture.groups[0]
    starts = range(0, lens.architecture.n_experts, size)
    return ExpertSet.of({layer: [start + experts[layer][0] % size for start in starts] for layer in experts.layers})


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        capture,
        weights_rule,
        zero,
        renormalize,
        reroute,
        generate,
        attention,
        expert_outputs,
        logit_lens,
    )
}
"""All checks by name, in the order in which they are run."""

PASSES = {
    "capture": 2, "weights_rule": 1, "zero": 4, "renormalize": 4, "reroute": 4,
    "generate": 1 + 2 * NEW_TOKENS, "attention": 3, "expert_outputs": 2, "logit_lens": 2,
}  # fmt: skip
"""Forward passes that each check takes, for saying beforehand what they will cost; a refusal takes some more."""
