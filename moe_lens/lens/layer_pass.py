"""One pass of a running model through one layer, and what interventions do to it, in the order in which it computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lens.architecture import Inputs, MoELayer, Moment
from moe_lens.lens.interventions.acting_routers import ActingRouters
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.layer_values import Site, where
from moe_lens.lens.interventions.place import Here
from moe_lens.lens.interventions.protocol import Intervention
from moe_lens.lens.reader import TraceReader
from moe_lens.routing import Routing

CPU = torch.device("cpu")


class InForce(Protocol):
    """What a pass has to know of the interventions in force."""

    def here(self, layer: int, rows: int, width: int, past: int, prompt: int, device: torch.device) -> Here: ...

    def change(self, layer: int, own: Intervention, device: torch.device = CPU) -> RouterChange: ...


@dataclass
class LayerPass:
    """One pass through `layer` of the model that `reader` reads, of which `past` positions passed before.

    acting: the interventions that act in the layer, outermost first. prompt: positions of the first pass; None in this
    one. records: whether the routing from before the interventions is wanted, which `before` then is.
    _free: what the routers decide where nothing is asked of them, for those whose sums of weights are to be kept.
    """

    in_force: InForce
    layer: int
    reader: TraceReader
    acting: Sequence[Intervention]
    past: int
    prompt: int | None
    records: bool
    before: Routing | None = None
    _blended: Routing | None = None
    _keeps_sum: Tensor | None = None
    _free: Routing | None = None
    _here: Here | None = field(default=None, repr=False)

    def run(self) -> int:
        """Let all of them act; gives the positions of the pass."""
        for _, step in sorted(self._steps(), key=lambda step: step[0]):
            step()
        assert self._here is not None, "something acts in the layer"
        return self._here.width

    def _steps(self) -> Iterator[tuple[float, Callable[[], None]]]:
        """What is done at which moment of the layer."""
        has_experts = self.layer in self.reader.architecture.moe_layers
        for own in self.acting:
            for site in own.sites:
                if has_experts or not site.of_experts:
                    yield from self._change(own, site)
        if has_experts and any(own.routes for own in self.acting):
            yield Moment.ROUTER_INPUT + 0.5, self._decide
            yield Moment.EXPERTS_INPUT, self._edit_gating

    def _change(self, own: Intervention, site: Site) -> Iterator[tuple[float, Callable[[], None]]]:
        """Reading and replacing what one intervention changes besides the routing."""
        access, found = site.access, []
        at = access.read_at if isinstance(access.read_at, Moment) else access.read_at(self._site)

        def read() -> None:
            old = access.read(self.reader, self.layer, site.chosen(self.layer))
            old = old if at == access.write_at else old.clone()  # blocks may write into it before
            here = self._at(old)
            mask = own.mask(here)  # first: it says where nobody knows the place
            new = own.changed(site, here, old)
            found.append((old, new if mask is None else where(mask, new, old)))

        def write() -> None:
            access.write(self.reader, self.layer, *found[0])

        yield at, read
        yield access.write_at, write

    def _decide(self) -> None:
        """Let the router decide anew, as it is asked to."""
        asking = [own for own in self.acting if self.in_force.change(self.layer, own) or own.selects]
        others = any(own.replaces_routers for own in self.acting)
        if not asking and not others:
            return
        router = self.reader.router(self.layer)
        call = router.inputs
        here = self._at(_hidden(call))
        keeps_sum = any(self.in_force.change(self.layer, own).keeps_sum is not None for own in asking)
        if self.records or keeps_sum:
            self.before = self._routing(self._site.decision(router.output))
        routers = ActingRouters.of(self._site, here, router, self.acting)
        if keeps_sum:
            self._free = self.before
            if others:
                free = routers.decide(call, RouterChange(), top_k=self._site.observed.top_k)
                self._free = self._routing(self._site.decision(free))
        decided = self._decided(here, asking, call, routers)
        if self.before is None and here.batch is not None and not others:
            router.skip(decided)  # who traces the model himself may look into the router, which then has to run
        else:
            router.output = decided

    def _decided(self, here: Here, asking: Sequence[Intervention], call: Inputs, routers: ActingRouters) -> Any:
        """The routers' output when they decide as all of these ask."""
        own_k, masks = self._site.observed.top_k, [own.mask(here) for own in asking]
        if any(mask is not None for mask in masks) or any(own.selects for own in asking):
            together, sizes = self._together(here, asking, masks)
        else:
            together, sizes = here.once(("asked", self.layer, here.width), lambda: self._together(here, asking, masks))
        if together.keeps_sum is not None:
            self._keeps_sum = self.reader.by_position(together.keeps_sum)
        free = replace(together, selected=None)  # of the tokens that get another number, none has a selection
        asked = {k: together if k == own_k else free for k in sorted(sizes or {own_k})}
        outputs = {k: routers.decide(call, change, top_k=k) for k, change in asked.items()}
        if len(outputs) > 1 and together.top_k is not None:
            wanted = self.reader.by_position(together.top_k)[..., 0]
            for k, output in outputs.items():
                of_k = self._routing(self._site.decision(output))
                at_k = (wanted == k) | (wanted == 0) if k == own_k else wanted == k
                self._blended = of_k if self._blended is None else self._blended.where(at_k, of_k)
        return outputs[max(outputs)]

    def _together(
        self, here: Here, asking: Sequence[Intervention], masks: Sequence[Tensor | None]
    ) -> tuple[RouterChange, set[int]]:
        """What is asked of the router in all, of each token, and which numbers of experts tokens get, if others."""
        own_k, parts, sizes = self._site.observed.top_k, [], set()
        for own, mask in zip(asking, masks, strict=True):
            top_k = self.in_force.change(self.layer, own).top_k
            change = replace(self.in_force.change(self.layer, own, here.device), selected=own.selection(here, own_k))
            parts.append(change.per_token(here.rows, here.width, mask))
            if top_k is not None:
                sizes |= {int(k) or own_k for k in top_k.flatten()} | ({own_k} if mask is not None else set())
        return RouterChange.together(parts), sizes

    def _edit_gating(self) -> None:
        """Edit what the router decided, one intervention after another."""
        is_told = not self.records or self.before is not None
        adjusted = self._blended is not None or self._keeps_sum is not None
        if self._here is not None and is_told and not adjusted and not any(own.edits for own in self.acting):
            return
        logits, _, _ = self._site.decision(self.reader.router(self.layer).output)
        call, gating = self.reader.gating(self.layer)
        decided = self._blended or self._routing((logits, *gating))
        here, routing = self._at(logits), self._with_old_sums(decided)
        for own in self.acting:
            if own.edits:
                mask, edited = own.mask(here), own(here, routing)
                routing = edited if mask is None else routing.where(mask, edited)
        if self._blended is not None or routing is not decided:
            indices, weights = routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)
            self.reader.set_gating(self.layer, self._site.with_gating(call, indices, weights))
        self.before = self.before or decided

    def _with_old_sums(self, decided: Routing) -> Routing:
        """What the router decided, its weights rescaled where they are to have the sum from before."""
        if self._keeps_sum is None or self._free is None:
            return decided
        old, new = (routing.weights.sum(-1, keepdim=True) for routing in (self._free, decided))
        factor = torch.where(self._keeps_sum, old / new, torch.ones_like(new))
        return replace(decided, weights=decided.weights * factor)

    @property
    def _site(self) -> MoELayer:
        return self.reader.architecture.at(self.layer)

    def _routing(self, decision: tuple[Tensor, Tensor, Tensor]) -> Routing:
        """Logits, indices and weights of tokens as those of positions."""
        return Routing(*map(self.reader.by_position, decision))

    def _at(self, tokens: Tensor) -> Here:
        """Where the run is; tokens: anything of the pass, [token, x] or [batch, pos, x]."""
        if self._here is None or self._here.device != tokens.device:
            rows = self.reader.n_rows()
            width = tokens.shape[:-1].numel() // rows
            prompt = width if self.prompt is None else self.prompt
            self._here = self.in_force.here(self.layer, rows, width, self.past, prompt, tokens.device)
        return self._here


def _hidden(call: Inputs) -> Tensor:
    """What a router is given, [token, d_model] or [batch, pos, d_model]."""
    arguments, named = call
    found: Tensor = arguments[0] if arguments else named["hidden_states"]
    return found
