"""Router tuning (Eq. 6-7): only the routers learn, at the learning rate that answers best on the dev split."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens import MoELens
from moe_lens.tuning.schedule import Schedule
from moe_lens.tuning.tuned import MAX_LENGTH, Tuned, tune


@dataclass(frozen=True)
class Router:
    """Router tuning as a method: the routers of these layers, None for all."""

    layers: tuple[int, ...] | None = None
    name: str = "router"

    def parameters(self, lens: MoELens) -> tuple[str, ...]:
        """The names of the routers' parameters."""
        return router_parameters(lens, self.layers)


def router_parameters(lens: MoELens, layers: Iterable[int] | None = None) -> tuple[str, ...]:
    """The names of the routers' parameters, of all MoE layers or those given.

    Raises MoELensError for a layer that has no router, and for a model that cannot learn from its gating
    weights: with one expert per token and weights rescaled to sum to 1, that weight is 1 whatever the router says.
    """
    architecture = lens.architecture
    if architecture.top_k == 1 and architecture.renormalizes:
        raise MoELensError(
            "with top_k = 1 and renormalised weights no gradient reaches the routers; choose another model"
        )
    paths = [architecture.at(layer).router for layer in (architecture.moe_layers if layers is None else layers)]
    return tuple(name for name, _ in lens.module.named_parameters() if any(name.startswith(f"{p}.") for p in paths))


def tune_router(
    lens: MoELens,
    train: Sequence[Example],
    dev: Sequence[Example],
    schedule: Schedule | None = None,
    *,
    learning_rates: Sequence[float] = (),
    layers: Iterable[int] | None = None,
    max_length: int = MAX_LENGTH,
    max_new_tokens: int = 16,
) -> Tuned:
    """`tune` with the routers, of all layers or those given."""
    method = Router(None if layers is None else tuple(layers))
    return tune(
        lens,
        train,
        dev,
        method,
        schedule,
        learning_rates=learning_rates,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
    )
