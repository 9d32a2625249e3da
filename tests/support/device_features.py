"""All that the package does with a model, by name, to be done on every device and compared with the CPU's."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from moe_lens import Example, ExpertSet, MoELens, MoELensError
from moe_lens.architecture.tiny import tiny_tokenizer
from moe_lens.causal import Attribution, attribution, evaluate
from moe_lens.checks import CHECKS, run_checks
from moe_lens.data import PromptTemplate
from moe_lens.lens import CAPTURES, MODES, Intervention, Rows, Statistic, apply_delta, weights_digest
from moe_lens.lens.delta import restored
from moe_lens.report.views.tokens import attention_of_tokens, experts_of_tokens
from moe_lens.statistics import (
    ActivationRates,
    AnswerProbability,
    AttentionMass,
    CoActivation,
    ExpertPaths,
    ExpertPortraits,
    ExpertSaliency,
    ExpertUsage,
    ExpertVocabulary,
    LogitSpread,
    OutputSimilarity,
    RouterHistograms,
    RouterLoad,
    RouterMargins,
    RoutingTokens,
    RoutingVectors,
    SelectedExperts,
    SharedShare,
    TokenBaseline,
    TopContexts,
    VocabularySpecialisation,
    router_similarity,
    weight_similarity,
)
from moe_lens.tuning import Method, Schedule, TuneAll, TuneExperts, TuneLowRank, TuneRouters, save_trained, tune

Feature = Callable[[MoELens], Any]

EXAMPLES = [
    Example("a", "Belmor is big.", "Where?", ("Belmor",), options=("Belmor", "Rome")),
    Example("b", "The cat sat.", "Who sat?", ("The cat", "cat"), options=("The cat", "cat", "dog")),
    Example("c", "", "Who?", ("dog",), options=("dog", "cat")),
]
TEXTS = ["hello there you", "a", "some longer text"]
SHORT = PromptTemplate("{context} {question}", "{question}", answer_cue=" A:")
POSITIONS = ("all", "prompt", "context", "question", "last", "answer", "decode", (-1, 0, 1))


def opened(model: nn.Module) -> MoELens:
    """A lens on a tiny model, which asks short questions and shows no progress."""
    lens = MoELens(model, tiny_tokenizer(), template=SHORT)
    lens.progress = False
    return lens


def few_experts(lens: MoELens) -> ExpertSet:
    """Experts of every layer that can be removed, as far as the model can do without any."""
    architecture = lens.architecture
    count = max(1, min(2, architecture.n_experts - architecture.top_k - 1))
    return ExpertSet.of({layer: range(count) for layer in architecture.moe_layers})


def interventions(lens: MoELens) -> dict[str, Intervention]:
    """One of each kind on these experts, by its mode; "rows" gives the examples of a batch different ones."""
    few = few_experts(lens)
    alone = {name: kind(few) for name, kind in MODES.items()}
    return alone | {"rows": Rows((alone["zero"], None, alone["renormalize"]))}


def _captured(name: str) -> Feature:
    def run(lens: MoELens) -> Any:
        wanted = {"last", "answer", (-2, 0, 1)}
        records = lens.records(EXAMPLES, capture=(name,), positions=wanted, with_answer=True, batch_size=2)
        return [record.logits if name == "logits" else record.captured[name] for record in records]

    return run


def _at(positions: Any) -> Feature:
    def run(lens: MoELens) -> Any:
        found = []
        capture = ("routing", "residual", "logits")
        for record in lens.records(EXAMPLES, capture=capture, positions=positions, with_answer=True):
            rows, everywhere = record.kept_mask(positions), record.position_mask(positions)
            found.append([stream[rows.to(stream.device)] for stream in record.residual.values()])
            found.append([routing.logits[everywhere.to(routing.logits.device)] for routing in record.routing.values()])
            found.append(record.logits[rows.to(record.logits.device)])
        return found

    return run


def _under(name: str, run: Feature) -> Feature:
    def under(lens: MoELens) -> Any:
        with lens.intervene(interventions(lens)[name]):
            return run(lens)

    return under


def _logits(lens: MoELens) -> Any:
    logits, record = lens.run_with_cache(TEXTS)
    return logits, record.routing, record.routing_before


def _answers(lens: MoELens) -> Any:
    return lens.generate(TEXTS, max_new_tokens=3)


def _evaluated(lens: MoELens) -> Any:
    under = {name: interventions(lens)[name] for name in ("reroute", "rows")}
    found = evaluate(lens, EXAMPLES, under, metrics=("em", "accuracy"), max_new_tokens=2)
    return found.answers, found.summary


def _shown(lens: MoELens) -> Any:
    """What the views of a prompt are drawn from."""
    [record] = lens.records(EXAMPLES[:1], capture=("routing", "attention"))
    return experts_of_tokens(record, lens.tokenizer), attention_of_tokens(record, lens.tokenizer)


def _own_trace(lens: MoELens) -> Any:
    """Accessors read and assigned in a trace of one's own."""
    layer = lens.architecture.moe_layers[-1]
    with torch.no_grad(), lens.model.trace(TEXTS):
        logits = lens.router_logits[layer].save()
        chosen = lens.selected_experts[layer].save()
        weights = lens.gating_weights[layer].save()
        lens.gating_weights[layer] = weights * 0.5
        lens.layers_output[layer] = lens.layers_output[layer] * 0.9
        out = lens.model.output.logits.save()
    return logits, chosen, weights, out


def _checked(name: str) -> Feature:
    def run(lens: MoELens) -> Any:
        [row] = run_checks(lens, TEXTS, names=[name]).itertuples()
        if row.outcome == "refused":
            raise MoELensError(row.detail)
        if row.outcome == "failed":
            raise RuntimeError(f"{row.detail}; {row.error:.2g} apart")
        return row.outcome

    return run


def _measured(name: str) -> Feature:
    return lambda lens: measured(name, lens).table()


def _attributed(*effects: str) -> Feature:
    """The attribution of the answers to every expert."""

    def run(lens: MoELens) -> list[pd.DataFrame]:
        return attribution(lens, EXAMPLES, *(Attribution(effect, target="answer") for effect in effects))

    return run


def measured(name: str, lens: MoELens) -> Statistic:
    """One of `STATISTICS` of the examples, before its table is made."""
    [found] = lens.measure(EXAMPLES, STATISTICS[name](lens))
    return found


def _tuned(method: Callable[[MoELens], Method], **schedule: Any) -> Feature:
    """Trained, saved and applied to the base again: the course; a crash unless the model is the same after both.

    Its logits are not compared with the CPU's: Adam makes whole steps of gradients that are 0 but for rounding.
    """

    def run(lens: MoELens) -> Any:
        every = [name for name, _ in lens.module.named_parameters(remove_duplicate=False)]
        numbers = Schedule(learning_rate=1e-3, epochs=1, batch_size=2, micro_batch=1, **schedule)
        with TemporaryDirectory() as folder:
            with restored(lens.module, every):
                tuned = tune(lens, EXAMPLES, EXAMPLES, method(lens), numbers, score="log_likelihood", out=folder)
                save_trained(lens.module, tuned.trained, f"{folder}/delta", facts={})
                after = _said(lens)
            with restored(lens.module, every):
                apply_delta(lens.module, f"{folder}/delta")
                applied = _said(lens)
        if not torch.equal(after, applied):
            raise RuntimeError("the base with the saved delta does not say what the trained model said")
        course = tuned.log[["loss", "dev_log_likelihood"]]
        return [course, tuned.log[["gradient_norm"]].head(1)]  # after a step, rounding decides whom a router takes

    return run


def _said(lens: MoELens) -> Tensor:
    """The logits of the bare model."""
    ids = torch.tensor([[5, 9, 200, 3], [7, 7, 7, 1]], device=lens.module.device)
    with torch.no_grad():
        return lens.module(input_ids=ids).logits


def _some_experts(lens: MoELens) -> TuneExperts:
    return TuneExperts(ExpertSet.of({layer: [0, 2] for layer in lens.architecture.moe_layers}))


STATISTICS: dict[str, Callable[[MoELens], Statistic]] = {
    "ExpertUsage": lambda lens: ExpertUsage(),
    "ExpertUsage token gate": lambda lens: ExpertUsage("token", value="gate"),
    "ExpertUsage gating_weight": lambda lens: ExpertUsage(positions="context", value="gating_weight"),
    "ActivationRates": lambda lens: ActivationRates(),
    "RouterLoad": lambda lens: RouterLoad(),
    "LogitSpread": lambda lens: LogitSpread(),
    "RouterMargins": lambda lens: RouterMargins(),
    "RouterHistograms": lambda lens: RouterHistograms(),
    "CoActivation": lambda lens: CoActivation(),
    "ExpertPaths": lambda lens: ExpertPaths(),
    "TokenBaseline": lambda lens: TokenBaseline(),
    "TopContexts": lambda lens: TopContexts(),
    "SelectedExperts": lambda lens: SelectedExperts(),
    "RoutingTokens": lambda lens: RoutingTokens(),
    "RoutingVectors": lambda lens: RoutingVectors(),
    "VocabularySpecialisation": lambda lens: VocabularySpecialisation(),
    "VocabularySpecialisation predicted": lambda lens: VocabularySpecialisation("predicted"),
    "ExpertSaliency": lambda lens: ExpertSaliency(),
    "ExpertVocabulary": lambda lens: ExpertVocabulary(lens.module.get_submodule(lens.architecture.head)),
    "ExpertPortraits": lambda lens: ExpertPortraits(lens),
    "OutputSimilarity": lambda lens: OutputSimilarity(),
    "SharedShare": lambda lens: SharedShare(),
    "AttentionMass": lambda lens: AttentionMass(("context", "answer", "question", "first", "sink"), steps=(0, 1)),
    "AnswerProbability": lambda lens: AnswerProbability(lens.project_on_vocab),
    "AnswerProbability moe_output": lambda lens: AnswerProbability(lens.project_on_vocab, stream="moe_output"),
}
"""Every statistic, and those with settings that compute in another way, made for a lens."""
OF_SHARED_EXPERTS = {"SharedShare"}
"""Those that a model without shared experts refuses."""

TRAINING: dict[str, Feature] = {
    "tune router": _tuned(lambda lens: TuneRouters()),
    "tune ceft": _tuned(_some_experts),
    "tune ceft, checkpointing": _tuned(_some_experts, gradient_checkpointing=True),
    "tune lora": _tuned(lambda lens: TuneLowRank(_some_experts(lens), rank=2)),
    "tune fft": _tuned(lambda lens: TuneAll()),
}
FEATURES: dict[str, Feature] = {
    **{f"capture {name}": _captured(name) for name in CAPTURES},
    **{f"positions {positions}": _at(positions) for positions in POSITIONS},
    "logits": _logits,
    "generate": _answers,
    **{f"{name}, logits": _under(name, _logits) for name in (*MODES, "rows")},
    **{f"{name}, generate": _under(name, _answers) for name in (*MODES, "rows")},
    "answer_log_probabilities": lambda lens: lens.answer_log_probabilities(EXAMPLES),
    "gradients": _attributed("gate", "logit"),
    "gradients, every output": _attributed("output"),
    "evaluate": _evaluated,
    "show": _shown,
    "own trace": _own_trace,
    "weights_digest": lambda lens: weights_digest(lens.module),
    **{f"check {name}": _checked(name) for name in CHECKS},
    **{name: _measured(name) for name in STATISTICS},
    "weight_similarity": weight_similarity,
    "router_similarity": router_similarity,
    **TRAINING,
}
"""Everything, by name; what each gives is compared with what it gives on the CPU."""

SURVEYED = (
    "check capture",
    "check attention",
    "check expert_outputs",
    "check logit_lens",
    "positions (-1, 0, 1)",
    "rows, generate",
    "RouterLoad",
    "ExpertVocabulary",
    "AttentionMass",
    "AnswerProbability moe_output",
    "tune ceft",
)
"""One feature of each way in which a model is touched, for many models."""


@dataclass(frozen=True)
class Outcome:
    """What became of a feature: "done" with its value, "refused" or "crashed" with what was said."""

    kind: Literal["done", "refused", "crashed"]
    value: Any


def outcome(feature: Callable[[], Any]) -> Outcome:
    """What becomes of it; a crash is an outcome here, since it is what the comparison is after."""
    try:
        return Outcome("done", feature())
    except MoELensError as refusal:
        return Outcome("refused", str(refusal))
    except Exception as crash:  # noqa: BLE001
        return Outcome("crashed", f"{type(crash).__name__}: {crash}")


def differs(found: Outcome, expected: Outcome) -> str:
    """In words, how what was found on a device is not what the CPU gave; empty if it is right."""
    if found.kind == "crashed":
        also = " (on the CPU as well)" if expected.kind == "crashed" else ""
        return f"crashed{also}: {found.value}"
    if found.kind != expected.kind:
        return f"{found.kind} ({found.value}), where the CPU {expected.kind} ({expected.value})"
    if found.kind == "refused":
        return "" if found.value == expected.value else f"refused: {found.value}; on the CPU: {expected.value}"
    return apart(found.value, expected.value)


def apart(found: Any, expected: Any, where: str = "") -> str:
    """In words, the first place at which two values are not alike, but for rounding; empty if they are."""
    if isinstance(expected, Tensor):
        found, expected = found.detach().cpu(), expected.detach().cpu()
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"{where}: {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
        size = expected.double().nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0.0
        close = torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-4 * size, equal_nan=True)
        return "" if close else f"{where}: up to {(found.double() - expected.double()).abs().max():.2g} apart"
    if isinstance(expected, dict | pd.DataFrame) and list(found) != list(expected):
        return f"{where}: {list(found)}, not {list(expected)}"
    if isinstance(expected, dict | pd.DataFrame):
        return _first({str(name): (found[name], expected[name]) for name in expected}, where)
    if isinstance(expected, pd.Series) and pd.api.types.is_numeric_dtype(expected):
        return apart(torch.tensor(found.to_numpy()), torch.tensor(expected.to_numpy()), where)
    if isinstance(expected, pd.Series):
        return apart(found.tolist(), expected.tolist(), where)
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{where}: {len(found)} values, not {len(expected)}"
        return _first({str(place): pair for place, pair in enumerate(zip(found, expected, strict=True))}, where)
    if isinstance(expected, float):
        return apart(torch.tensor(found), torch.tensor(expected), where)
    if hasattr(expected, "__dataclass_fields__"):
        return apart(vars(found), vars(expected), where)
    return "" if found == expected else f"{where}: {found!r:.80}, not {expected!r:.80}"


def _first(pairs: dict[str, tuple[Any, Any]], where: str) -> str:
    told = (apart(*pair, f"{where}/{name}") for name, pair in pairs.items())
    return next((words for words in told if words), "")


def outcomes(names: Iterable[str], lens: MoELens) -> dict[str, Outcome]:
    """By feature, what becomes of it on a lens."""
    return {name: outcome(lambda run=FEATURES[name]: run(lens)) for name in names}
