"""Steer: SteerMoE's rule, chosen experts' logits above a token's highest or below its lowest."""

import math
from dataclasses import dataclass

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet, expect_experts
from moe_lens.lens.interventions.deciding import RouterChange
from moe_lens.lens.interventions.protocol import Placed, chosen, expect_known

NOBODY = ExpertSet()


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Placed):
    """Activates experts and deactivates others by their router logits, before the router scores and selects (SteerMoE).

    z_i = max_j z_j + epsilon for activated experts, min_j z_j - epsilon for deactivated ones, over the token's logits z
    as they are after any `Bias`. Theirs are log-softmax scores, which differ from logits by a constant per token, so
    that routers with a softmax do the same; in other routers the logits themselves are set. Several activated experts
    have equal logits. Where a selection bias or groups decide too, one need not be selected: see `Force`.
    """

    activate: ExpertSet = NOBODY
    deactivate: ExpertSet = NOBODY
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        for experts in (self.activate, self.deactivate):
            expect_experts(experts)
        if self.activate & self.deactivate or not self.activate | self.deactivate:
            raise MoELensError(
                "expected experts to activate or to deactivate, and none in both; got "
                f"{self.activate.brief()} and {self.deactivate.brief()}"
            )
        if not 0 < self.epsilon < math.inf:
            raise MoELensError(f"epsilon must be a finite number above 0; got {self.epsilon}")
        object.__setattr__(self, "epsilon", float(self.epsilon))
        super().__post_init__()
        named = (self.activate | self.deactivate).layers
        own = named if self.layers is None else tuple(layer for layer in named if layer in self.layers)
        if not own:
            raise MoELensError(f"its experts and layers={self.layers} never meet, so nothing would be changed")
        object.__setattr__(self, "layers", own)

    def asks(self, layer: int, n_experts: int) -> RouterChange:
        up, down = (chosen(experts[layer], n_experts) for experts in (self.activate, self.deactivate))
        return RouterChange(extreme=self.epsilon * (up.float() - down.float()))

    def check(self, architecture: MoEArchitecture) -> None:
        super().check(architecture)
        expect_known(self.activate | self.deactivate, architecture)
