"""What features cost on a pretend device for each layer of a model: how often the host waits, and how many kernels."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
from device_counts import Cost, counting
from device_features import EXAMPLES, OF_SHARED_EXPERTS, STATISTICS, TEXTS, interventions, measured, opened
from placed_models import placed

from moe_lens import ExpertSet, MoELens
from moe_lens.architecture.tiny import tiny_model
from moe_lens.checks.reference import padded
from moe_lens.data import encode
from moe_lens.lens import CAPTURES, MODES
from moe_lens.statistics import router_similarity, weight_similarity
from moe_lens.tuning import Method, Schedule, TuneAll, TuneExperts, TuneRouters, fit

FAMILY, FEW, MORE = "olmoe", 1, 2
NEW_TOKENS = 3

Run = Callable[[MoELens], Any]


@dataclass(frozen=True)
class LayerCost:
    """What one more layer costs. where: the lines that most of it comes from, with their numbers."""

    waits: float
    kernels: float
    where: str


def cost_per_layer(name: str) -> LayerCost:
    """Of one of `COSTED`: by how much a model with more layers costs more, without the bare model's own passes."""
    waits: Counter[Any] = Counter()
    kernels: Counter[Any] = Counter()
    for layers, sign in ((MORE, 1), (FEW, -1)):
        lens = _lens(layers)
        for cost, factor in COSTED[name](lens):
            _add(waits, cost.waits, sign * factor)
            _add(kernels, cost.kernels, sign * factor)
    more = MORE - FEW
    top = [f"{line} {count / more:g} kernels" for line, count in kernels.most_common(6)]
    top = [f"{line} {kind}: {count / more:g} waits" for (kind, line), count in waits.most_common(6) if count > 0] + top
    return LayerCost(waits.total() / more, kernels.total() / more, "\n".join(top))


@cache
def _lens(layers: int) -> MoELens:
    return opened(placed(tiny_model(FAMILY, changes={"num_hidden_layers": layers}), "one"))


def _add(sums: Counter[Any], counted: Mapping[Any, int], factor: int) -> None:
    for key, count in counted.items():
        sums[key] += factor * count


Costed = Callable[[MoELens], list[tuple[Cost, int]]]
"""Costs of runs on a lens, each with the factor by which it counts."""


def _beyond(bare: Run, run: Run, mode: str | None = None) -> Costed:
    """A run, under an intervention perhaps, without what the bare model costs; once in use, so the second time."""

    def cost(lens: MoELens) -> list[tuple[Cost, int]]:
        chosen = () if mode is None else (interventions(lens)[mode],)
        with lens.intervene(*chosen):
            run(lens)
            return [(_counted(run, lens), 1), (_once(bare, lens), -1)]

    return cost


def _step(method: Callable[[MoELens], Method]) -> Costed:
    """A step of training: what two cost more than one."""

    def cost(lens: MoELens) -> list[tuple[Cost, int]]:
        prompts = [encode(example, lens.tokenizer, with_answer=True) for example in EXAMPLES]
        with method(lens).attached(lens) as trained:

            def steps(count: int) -> Run:
                numbers = Schedule(epochs=count, batch_size=len(prompts))
                return lambda lens: fit(lens.module, trained.names, prompts, numbers, pad_id=0)

            return [(_counted(steps(2), lens), 1), (_counted(steps(1), lens), -1)]

    return cost


def _counted(run: Run, lens: MoELens) -> Cost:
    with counting() as cost:
        run(lens)
    return cost


@cache
def _once(bare: Run, lens: MoELens) -> Cost:
    """What a run of the bare model costs, which interventions do not reach."""
    return _counted(bare, lens)


def _nothing(lens: MoELens) -> None: ...


def _bare_forward(lens: MoELens) -> Any:
    with torch.no_grad():
        return lens.module(**padded(lens, TEXTS), use_cache=False)


def _bare_generate(lens: MoELens) -> Any:
    inputs = {name: value for name, value in padded(lens, TEXTS).items() if name != "position_ids"}
    return lens.module.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def _captured(name: str) -> Run:
    return lambda lens: list(lens.records(EXAMPLES, capture=(name,), positions=(0, 1), with_answer=True))


def _logits(lens: MoELens) -> Any:
    return lens.run_with_cache(TEXTS, capture=())


def _generated(lens: MoELens) -> Any:
    return lens.generate(TEXTS, max_new_tokens=NEW_TOKENS)


def _logit_lens(lens: MoELens) -> Any:
    """Every layer's residual stream projected; one row of the stream stands for all."""
    stream = torch.zeros(1, lens.module.config.hidden_size, device=lens.module.device)
    return [lens.project_on_vocab(stream) for _ in lens.architecture.layers]


COSTED: Mapping[str, Costed] = MappingProxyType(
    {
        **{f"capture {name}": _beyond(_bare_forward, _captured(name)) for name in CAPTURES},
        **{f"{mode}, logits": _beyond(_bare_forward, _logits, mode) for mode in (*MODES, "rows")},
        **{f"{mode}, generate": _beyond(_bare_generate, _generated, mode) for mode in (*MODES, "rows")},
        "logit lens": _beyond(_nothing, _logit_lens),
        **{
            name: _beyond(_bare_forward, partial(measured, name))
            for name in STATISTICS
            if name not in OF_SHARED_EXPERTS
        },
        "weight_similarity": _beyond(_nothing, weight_similarity),
        "router_similarity": _beyond(_nothing, router_similarity),
        "tune router": _step(lambda lens: TuneRouters()),
        "tune ceft": _step(lambda lens: TuneExperts(ExpertSet.of({n: [0, 2] for n in lens.architecture.moe_layers}))),
        "tune fft": _step(lambda lens: TuneAll()),
    }
)
"""What is costed, by name; a training step with the model's own passes, all else without."""
