"""Router tuning (Eq. 6-7): only the routers learn, at the learning rate that answers best on the dev split."""

from collections.abc import Iterable, Sequence

from moe_lens.data import Example
from moe_lens.lens.lens import MoELens
from moe_lens.tuning.methods import TuneRouters
from moe_lens.tuning.schedule import Schedule
from moe_lens.tuning.training import MAX_LENGTH, Tuned, tune


def tune_router(
    lens: MoELens,
    train: Sequence[Example],
    dev: Sequence[Example],
    schedule: Schedule | None = None,
    *,
    learning_rates: Sequence[float] = (),
    layers: Iterable[int] | None = None,
    max_length: int | None = MAX_LENGTH,
    max_new_tokens: int = 16,
) -> Tuned:
    """`tune` with the routers, of all layers or those given."""
    method = TuneRouters(None if layers is None else tuple(layers))
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
