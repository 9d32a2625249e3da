"""Applying interventions to a layer while the model runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_lens.accessors import TraceReader
from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.interventions import Intervention, WithoutExperts, excluded_by
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False)
class ActiveInterventions:
    """Interventions in force, in the order they act.

    excluded: per layer the experts they remove before the top-k, bool [expert] or [batch, expert].
    """

    interventions: tuple[Intervention, ...]
    excluded: dict[int, Tensor]

    @classmethod
    def of(
        cls, interventions: tuple[Intervention, ...], architecture: MoEArchitecture
    ) -> "ActiveInterventions":
        """The interventions with what they exclude worked out once, not at every step."""
        masks = {
            layer: excluded_by(interventions, layer, architecture.n_experts)
            for layer in _layers(interventions)
        }
        return cls(interventions, {layer: mask for layer, mask in masks.items() if mask is not None})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers any of them acts on, in rising order."""
        return _layers(self.interventions)

    def apply(self, layer: int, reader: TraceReader) -> Routing:
        """Let them act on one pass through `layer` of the running model, and give the routing from before.

        First the router decides anew without the excluded experts, then the experts' gating is edited.
        """
        site = reader.architecture.at(layer)
        router, experts = reader.router(layer), reader.experts(layer)
        if layer in self.excluded:
            arguments, named = router.inputs
            decision = site.decision(router.output)
            before = Routing(*map(reader.by_position, decision))
            logits = decision[0]
            mode = WithoutExperts(
                self._per_token(self.excluded[layer].to(logits.device), logits, reader.n_rows())
            )
            with mode:
                output = router(*arguments, **named)
            mode.check(site.router)
            router.output = output
            logits, _, _ = site.decision(output)
            inputs = experts.inputs
        else:
            logits, _, _ = site.decision(router.output)
            inputs = experts.inputs
            before = Routing(*map(reader.by_position, (logits, *site.gating(inputs))))
        routing = Routing(*map(reader.by_position, (logits, *site.gating(inputs))))
        for intervention in self.interventions:
            if layer in intervention.layers:
                routing = intervention(layer, routing)
        experts.inputs = site.with_gating(
            inputs, routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)
        )
        return before

    @staticmethod
    def _per_token(excluded: Tensor, logits: Tensor, n_rows: int) -> Tensor:
        """`excluded` [expert] or [batch, expert] for each token of the batch, bool [token, expert]."""
        if excluded.ndim == 1:
            return excluded.expand(logits.shape)
        if len(excluded) != n_rows:
            raise MoELensError(
                f"Rows has {len(excluded)} interventions for a batch of {n_rows} rows; expected one per row"
            )
        return excluded.repeat_interleave(len(logits) // n_rows, dim=0)


def _layers(interventions: Sequence[Intervention]) -> tuple[int, ...]:
    return tuple(sorted({layer for own in interventions for layer in own.layers}))
