"""The checks of interventions with a strength or a source: what the router decides, and values of another run."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_lens.architecture.discovery import pretrained
from moe_lens.checks.comparing import Finding, apart, close, compared, used, used_in
from moe_lens.checks.reference import (
    bare_logits,
    biased_maps,
    edited_gating,
    given_output,
    given_tensors,
    watching,
    zeroed,
)
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions import SITES, Bias, Force, Patch, Replay, Reroute, RouteAs, Run, Scale, TopK, Zero
from moe_lens.lens.interventions.layer_values import Site
from moe_lens.lens.lens import MoELens
from moe_lens.lens.record import Record
from moe_lens.routing import Routing

ALPHA = 1.0


def bias(lens: MoELens, texts: Sequence[str]) -> Finding:
    """A bias is the same number added to the output of the routers' linear maps; one of 0 is nothing, bit for bit."""
    experts, plain = used(lens, texts), bare_logits(lens, texts)
    with lens.intervene(Bias(experts, 0.0)):
        neutral = apart(lens.run_with_cache(texts)[0], plain)
    with lens.intervene(Bias(experts, ALPHA)):
        biased, record = lens.run_with_cache(texts)
    with biased_maps(lens, experts, ALPHA):
        expected = bare_logits(lens, texts)
    if neutral:
        return Finding(float("inf"), close(lens), "a bias of 0 changes something")
    first = experts.layers[0]
    moved = record.routing[first].logits - record.routing_before[first].logits
    wanted = ALPHA * torch.isin(torch.arange(moved.shape[-1]), torch.tensor(experts[first])).to(moved)
    errors = [apart(_centred(moved), _centred(wanted).expand(moved.shape))]
    found = compared(biased, expected, plain, close(lens), experts)
    return Finding(max(found.error, *errors), found.allowed, found.detail)


def _centred(logits: Tensor) -> Tensor:
    """Logits [..., expert] less their mean: where a router returns probabilities, a constant per token is not known."""
    return logits - logits.mean(-1, keepdim=True)


def scale(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Scaled gating weights equal those of a torch hook, and a factor of 1 is nothing, bit for bit."""
    experts, plain = used(lens, texts), bare_logits(lens, texts)
    with lens.intervene(Scale(experts, 1.0)):
        neutral = apart(lens.run_with_cache(texts)[0], plain)
    with lens.intervene(Scale(experts, -0.5)):
        scaled, _ = lens.run_with_cache(texts)
    with edited_gating(lens, experts, lambda weights, hit: torch.where(hit, -0.5 * weights, weights)):
        expected = bare_logits(lens, texts)
    found = compared(scaled, expected, plain, 0.0, experts)
    return Finding(max(found.error, neutral), found.allowed, found.detail)


def force(lens: MoELens, texts: Sequence[str]) -> Finding:
    """A forced expert is selected everywhere, in the place of one other; tokens that have it stay as they are."""
    experts = used(lens, texts)
    with lens.intervene(Force(experts)):
        _, record = lens.run_with_cache(texts)
    errors = []
    for layer in experts.layers:
        before, after = record.routing_before[layer], record.routing[layer]
        [expert] = experts[layer]
        had, has = (routing.selected()[..., expert] for routing in (before, after))
        others = (before.selected() & after.selected()).sum(-1) >= before.indices.shape[-1] - 1
        if not has.all() or not others.all():
            return Finding(float("inf"), close(lens), f"layer {layer}: a token lacks expert {expert}, or others too")
        if not torch.equal(before.indices[had], after.indices[had]):
            return Finding(float("inf"), close(lens), f"layer {layer}: tokens that select {expert} anyway are changed")
        errors.append(_off_rule(lens, after))
    return Finding(max(errors), close(lens), f"'{experts}'")


def top_k(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Another number of experts: the same and one more or less, their weights by the router's rule; k is nothing."""
    own = lens.architecture.top_k
    k = own - 1 if own > 1 else own + 1
    with lens.intervene(TopK(own)):
        neutral = apart(lens.run_with_cache(texts)[0], bare_logits(lens, texts))
    with lens.intervene(TopK(k)):
        _, record = lens.run_with_cache(texts)
    errors = [neutral]
    for layer, after in record.routing.items():
        shared = (record.routing_before[layer].selected() & after.selected()).sum(-1)
        if after.indices.shape[-1] != k or not (shared == min(k, own)).all():
            return Finding(float("inf"), close(lens), f"layer {layer}: not {k} of the experts that are selected")
        errors.append(_off_rule(lens, after))
    return Finding(max(errors), close(lens), f"{k} instead of {own}")


def _off_rule(lens: MoELens, routing: Routing) -> float:
    """How far gating weights are from the rule of the model's routers."""
    there = (routing.weights != 0).all(-1)
    given = [values[there] for values in (routing.logits, routing.indices, routing.weights)]
    return apart(given[2], lens.architecture.scoring.fitted(*given))


def replay(lens: MoELens, texts: Sequence[str]) -> Finding:
    """The own routing replayed is nothing, bit for bit; another run's is selected at every token."""
    examples = _examples(texts)
    plain = _record(lens, examples)
    with lens.intervene(Replay(Run(lens, examples))):
        neutral = apart(_logits(_record(lens, examples)), _logits(plain))
    under = Reroute(used_in(lens, plain))
    with lens.intervene(under):
        theirs = _record(lens, examples)
    with lens.intervene(Replay(Run(lens, examples, under=(under,)))):
        replayed = _record(lens, examples)
    real, others = plain.attention_mask.bool(), 0
    for layer, routing in replayed.routing.items():
        selected = [it.routing[layer].selected()[real.to(routing.indices.device)] for it in (replayed, theirs, plain)]
        others += int((selected[1] != selected[2]).sum())
        if not torch.equal(selected[0], selected[1]):
            return Finding(float("inf"), 0.0, f"layer {layer} selects otherwise than the run that is replayed")
    return Finding(neutral if others else float("inf"), 0.0, f"{others // 2} selections are another run's")


def route_as(lens: MoELens, texts: Sequence[str]) -> Finding:
    """The own routers at the last position are nothing, bit for bit; others decide as they do within the model."""
    own, plain = RouteAs(lens), bare_logits(lens, texts)
    others = {
        path: tensor.flip(0) if tensor.ndim == 2 and tensor.is_floating_point() else tensor
        for path, tensor in own.held.items()
    }
    with lens.intervene(replace(own, positions="last")):
        neutral = apart(lens.run_with_cache(texts)[0], plain)
    with lens.intervene(RouteAs(others)):
        routed, _ = lens.run_with_cache(texts)
    with given_tensors(lens.module, others):
        expected = bare_logits(lens, texts)
    effect = apart(routed, plain)
    if not effect:
        return Finding(float("inf"), 0.0, "other routers change nothing")
    return Finding(
        max(neutral, apart(routed, expected)), 0.0, f"effect {effect:.2g}, of routers with their rows reversed"
    )


def patch(lens: MoELens, texts: Sequence[str]) -> Finding:
    """Values of the own run are nothing, bit for bit; a residual stream of another is what a torch hook puts in."""
    examples, refused = _examples(texts), []
    plain = _record(lens, examples)
    errors = [apart(_logits(plain), _bare(lens, plain))]
    shared = any(site.shared_experts for site in lens.architecture.moe)
    for what in SITES if shared else [what for what in SITES if what != "shared_output"]:
        try:
            Site(what).check(lens.architecture, None)
            with lens.intervene(Patch(Run(lens, examples), what=what)):
                errors.append(apart(_logits(_record(lens, examples)), _logits(plain)))
        except MoELensError as refusal:
            refused.append(f"{what} is refused: {refusal}")
    layer, experts = lens.architecture.moe_layers[-1], used_in(lens, plain)
    path = lens.architecture.layers[layer]
    with lens.intervene(Patch(Run(lens, examples, under=(Zero(experts),)), layers=[layer], positions="from_question")):
        patched = _record(lens, examples)
    with edited_gating(lens, experts, zeroed), watching(lens.module, [path], "output") as seen:
        _bare(lens, patched)
    mask = patched.position_mask("from_question").to(seen[path][0].device)
    with given_output(lens.module, path, seen[path], mask):
        expected = _bare(lens, patched)
    found = compared(_logits(patched), expected, _logits(plain), 0.0, experts)
    return Finding(max(found.error, *errors), 0.0, "; ".join([found.detail, *refused]))


def _examples(texts: Sequence[str]) -> list[Example]:
    """The texts as questions, which have an id."""
    return [Example(str(place), "", text, ("-",)) for place, text in enumerate(texts)]


def _record(lens: MoELens, examples: Sequence[Example]) -> Record:
    """One batch's routing and logits at all positions."""
    captures = ("routing", "logits")
    [record] = lens.records(examples, capture=captures, positions="all", batch_size=len(examples), progress=False)
    return record


def _logits(record: Record) -> Tensor:
    """Logits of a record, without pads, [token, vocab]."""
    whole = record.logits
    assert whole is not None, "logits are captured"
    return whole[record.attention_mask.bool().to(whole.device)]


def _bare(lens: MoELens, record: Record) -> Tensor:
    """The bare model's logits on a record's batch, without pads, [token, vocab]."""
    mask = record.attention_mask.to(pretrained(lens.module).device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ids = record.input_ids.to(mask.device)
        whole: Tensor = lens.module(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    return whole[mask.bool()]
