"""Router tuning (Eq. 6-7): only the routers learn, at the learning rate that answers best on the dev split."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from moe_lens.data import Example, encode
from moe_lens.errors import MoELensError
from moe_lens.evaluation import answer_table
from moe_lens.lens import MoELens
from moe_lens.tuning.loop import Schedule, fit

MAX_LENGTH = 300


@dataclass(frozen=True)
class RouterTuning:
    """What `tune_router` found.

    schedule: with the chosen learning rate. log: step, loss, learning_rate of its run.
    candidates: learning_rate and dev_em of every rate tried, in rising order.
    parameters: names of the trained parameters, which now hold the tuned values in the lens's module.
    dropped: training examples that were longer than the maximum length.
    """

    schedule: Schedule
    log: pd.DataFrame
    candidates: pd.DataFrame
    parameters: tuple[str, ...]
    dropped: int


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
) -> RouterTuning:
    """Tunes the lens's routers in place on `train`.

    learning_rates: each is tried from the same start; the one with the highest EM on `dev` stays (the lowest of
        equals). One rate, or none for the schedule's own, is trained once.
    max_length: longer training examples (prompt and answer, in tokens) are left out and counted.

    Raises MoELensError if nothing is left to train on, and what `fit` raises.
    """
    schedule = schedule or Schedule()
    names = router_parameters(lens, layers)
    encoded = [encode(example, lens.tokenizer, with_answer=True) for example in train]
    kept = [prompt for prompt in encoded if len(prompt.input_ids) <= max_length]
    if not kept:
        raise MoELensError(f"all {len(encoded)} training examples are longer than max_length = {max_length} tokens")
    parameters = dict(lens.module.named_parameters())
    start = {name: parameters[name].detach().clone() for name in names}
    best: tuple[float, Schedule, pd.DataFrame, dict[str, torch.Tensor]] | None = None
    candidates = []
    try:
        for rate in sorted(set(learning_rates or [schedule.learning_rate])):
            attempt = replace(schedule, learning_rate=rate)
            _put(parameters, start)
            label = f"router, rate {rate:g}"
            log = fit(lens.module, names, kept, attempt, pad_id=lens.tokenizer.pad_token_id, label=label)
            em = float(answer_table(lens, dev, max_new_tokens=max_new_tokens)["em"].mean())
            candidates.append((rate, em))
            if best is None or em > best[0]:
                best = em, attempt, log, {name: parameters[name].detach().clone() for name in names}
    finally:  # a rate that fails, or an interruption, leaves no half-trained model
        _put(parameters, start)
    _put(parameters, best[3])
    table = pd.DataFrame(candidates, columns=["learning_rate", "dev_em"])
    return RouterTuning(best[1], best[2], table, names, len(encoded) - len(kept))


def _put(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Gives the named parameters copies of these values."""
    for name, value in values.items():
        parameters[name].data = value.clone()
