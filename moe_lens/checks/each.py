"""All checks of a lens on its model, each against the bare model; here are those of what is recorded."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.quantized import is_plain
from moe_lens.checks.comparing import Finding, apart, close
from moe_lens.checks.reference import (
    bare_logits,
    given_streams,
    watched,
    watching,
)
from moe_lens.checks.silencing import NEW_TOKENS, generate, renormalize, reroute, zero
from moe_lens.checks.strengths import bias, force, patch, replay, route_as, scale, top_k
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.lens import MoELens
from moe_lens.lens.record import CAPTURES, Record, by_capture, read_values, readings
from moe_lens.routing import Routing

Check = Callable[[MoELens, Sequence[str]], Finding]


def capture(lens: MoELens, texts: Sequence[str]) -> Finding:
    """All that is recorded (logits, routing, streams) is, bit for bit, what torch hooks see in the bare model."""
    with watched(lens) as reader:
        plain = bare_logits(lens, texts)
    logits, record, refused = _recorded(lens, texts)
    errors = {"logits": apart(logits, plain)}
    everywhere = OnDevices(torch.arange(plain.shape[1]))
    asked = readings(lens.architecture, record.captured)
    read = read_values(reader(len(texts)), asked, everywhere)
    for name, by_layer in by_capture(record.captured, asked, read).items():
        for layer, value in by_layer.items():
            pairs = zip(_tensors(record.captured[name][layer]), _tensors(value), strict=True)
            errors[f"{name} of layer {layer}"] = max(apart(a, b) for a, b in pairs)
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
        errors.append(apart(routing.weights[used], rule.fitted(*given)))
    return Finding(max(errors), close(lens), str(rule))


def attention(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Recorded attention rows are those of the eager implementation's whole maps, pads left out."""
    paths = {layer: path for layer, path in enumerate(lens.architecture.attentions) if path}
    if not paths:
        raise MoELensError("no attention modules are known in this model")
    # Quantised layers may round the rows of a batch together, pads among them, which eager attention fills otherwise.
    alone = not all(is_plain(parameter) for parameter in lens.module.parameters())
    errors = [_attention_error(lens, batch, paths) for batch in ([[text] for text in texts] if alone else [texts])]
    detail = f"{len(paths)} layers, model runs {pretrained(lens.module).config._attn_implementation}"
    return Finding(max(errors), close(lens), detail + ("; each text alone: the model is quantised" if alone else ""))


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
        apart(record.attention_rows[layer][row][:, real[row]], seen[path][1][row][:, real[row]])
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
        errors.append(apart(summed, whole[site.experts].reshape(summed.shape) - added))
    return Finding(max(errors), close(lens))


def logit_lens(lens: MoELens, texts: Sequence[str]) -> Finding:
    """The logit lens on the last layer's output gives the model's logits."""
    logits, record = lens.run_with_cache(texts, capture=("residual",))
    return Finding(apart(lens.project_on_vocab(record.residual[lens.architecture.n_layers - 1]), logits), close(lens))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        capture,
        weights_rule,
        zero,
        renormalize,
        reroute,
        bias,
        scale,
        force,
        top_k,
        replay,
        route_as,
        patch,
        generate,
        attention,
        expert_outputs,
        logit_lens,
    )
}
"""All checks by name, in the order in which they are run."""

PASSES = {
    "capture": 2, "weights_rule": 1, "zero": 4, "renormalize": 4, "reroute": 4,
    "bias": 5, "scale": 5, "force": 2, "top_k": 3, "replay": 6, "route_as": 4, "patch": 14,
    "generate": 1 + 2 * NEW_TOKENS, "attention": 3, "expert_outputs": 2, "logit_lens": 2,
}  # fmt: skip
"""Forward passes that each check takes, for saying beforehand what they will cost; a refusal takes some more."""
