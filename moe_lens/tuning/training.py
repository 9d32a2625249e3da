"""tune: a method, a schedule and examples in; a trained lens, and what is known of the training, out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, nan
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import torch

from moe_lens import progress
from moe_lens.causal.evaluation import answer_table
from moe_lens.data import Encoded, Example, collate
from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.lens.batching import run_pieces
from moe_lens.lens.lens import MoELens
from moe_lens.lens.taken import pad_id
from moe_lens.tuning.board import Board, following
from moe_lens.tuning.checkpoint import Checkpoints, Progress
from moe_lens.tuning.loop import DevScore, fit, log_table
from moe_lens.tuning.methods import Method, Trainable
from moe_lens.tuning.objective import ANSWER_LOSS, Objective, answer_loss, answer_tokens
from moe_lens.tuning.preference import DPO, preference
from moe_lens.tuning.prepared import Prepared, encoded, tokens_digest
from moe_lens.tuning.processes import Processes, put, whole
from moe_lens.tuning.routing_watch import RoutingWatch, course
from moe_lens.tuning.schedule import Schedule

MAX_LENGTH = 300
"""The paper's longest training example, in tokens."""

DevMetric = Literal["em", "f1", "log_likelihood"]


@dataclass(frozen=True)
class Tuned:
    """What `tune` did.

    method: its name. trained: what it trained, which now holds the tuned values in the lens's module.
    schedule: with the chosen learning rate.
    log: of that rate's run, as `log_table` says. candidates: learning_rate and dev score of every rate tried.
    dropped: training examples that were longer than the maximum length. unpaired: those without another answer to
        prefer theirs to. seconds: spent training and measuring. routing: what the routers did on some of the dev
        examples at the start and whenever these were measured, as `course` says; empty where they were not.
    """

    method: str
    trained: Trainable
    schedule: Schedule
    log: pd.DataFrame
    candidates: pd.DataFrame
    dropped: int
    seconds: float
    unpaired: int = 0
    routing: pd.DataFrame = field(default_factory=lambda: course(()))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the model's parameters that training changed."""
        return self.trained.changed


def tune(
    lens: MoELens,
    train: Sequence[Example],
    dev: Sequence[Example],
    method: Method,
    schedule: Schedule | None = None,
    *,
    objective: DPO | None = None,
    learning_rates: Sequence[float] = (),
    out: str | Path | None = None,
    score: DevMetric = "em",
    max_length: int | None = MAX_LENGTH,
    max_new_tokens: int = 16,
    checkpoint_seconds: float = 300.0,
    shard: bool = False,
    boards: Sequence[Board] = (),
) -> Tuned:
    """Trains the lens in place, on `train`, and leaves it in the state that did best on `dev`.

    A method that adds to the model leaves that as it was; what it has learnt is `Tuned.trained.added`.

    objective: what training minimises, None for the cross-entropy of the answers (Eq. 6). Under `DPO` examples of which
        it is not known that memory says something else than their answer are left out and counted.
    learning_rates: each is tried from the same start, and the one that does best on `dev` stays (the lowest of
        equals). One rate, or none for the schedule's own, is trained once.
    out: a folder for checkpoints; the same call goes on there after an interruption. Without one nothing is written.
    score: what is measured on `dev`: "em" or "f1" of greedy answers of up to `max_new_tokens`, or "log_likelihood",
        the mean log-probability (nats) of the answers' tokens, which costs least. Without dev data the last stays.
    max_length: longer training examples (prompt and either answer, in tokens) are left out and counted.
    shard: split the model over the processes instead of a copy in each. The lens of the first is what is split, best on
        the CPU; the others' may be on the meta device. Afterwards the first process has the whole, on the CPU, to be
        saved, and the others only shapes, as all have after an exception; no process can run it.
    boards: what shows the log while it grows, a run for each rate, such as `partial(board.tensorboard, folder)`.

    Started by `torchrun` or `accelerate launch`, the processes share every step and the dev data.
    Raises MoELensError inside a `lens.intervene` block, if nothing is left to train on, and what `fit` raises; then a
    lens that was not split is as it was.
    """
    schedule = schedule or Schedule()
    rates = sorted(set(learning_rates or [schedule.learning_rate]))
    schedules = {rate: replace(schedule, learning_rate=rate) for rate in rates}
    if isinstance(method, str | type):
        raise MoELensError(f"expected a method such as TuneRouters() or TuneExperts(experts); got {method!r}")
    _check(lens, rates, dev, score, max_new_tokens, shard=shard)
    data = Prepared.of(lens, train, max_length=max_length, pairs=objective is not None)
    processes = Processes.current()
    if processes.count > 1 and not shard and not getattr(lens.module, "hf_device_map", None):
        lens.module.to(processes.device)
    run = {
        "method": method.facts(),
        "data": data.digest,
        "dev": [tokens_digest(encoded(lens, dev)), score, max_new_tokens],
        **({} if objective is None else objective.facts()),
    }
    blocks = lens.architecture.layers if shard else ()
    starts: dict[float, dict[str, list[float]]] = {}

    def attempt(tried: Schedule, trained: Trainable, loss: Objective) -> Progress:
        facts = run | {"trained": trained.fingerprint} | told(tried)
        measured = None
        if dev:
            watch = None if shard or not processes.is_main else RoutingWatch(lens, dev, trained)
            if watch is not None:
                starts[tried.learning_rate] = watch.start
            measured = dev_score(
                lens, dev, score, max_new_tokens=max_new_tokens, whole_model=not shard, trained=trained, watch=watch
            )
        with following(boards, f"rate-{tried.learning_rate:g}") as follow:
            return fit(
                lens.module,
                trained.names,
                data.prompts,
                tried,
                pad_id=pad_id(lens.module, lens.tokenizer),
                dev=measured,
                checkpoints=None if out is None else Checkpoints(_folder(out, tried), facts, every=checkpoint_seconds),
                shard=blocks,
                around=trained.around,
                objective=loss,
                label=f"{method.name}, rate {tried.learning_rate:g}",
                follow=follow,
            )

    with method.attached(lens) as trained:
        if processes.is_main:
            progress.write(f"{method.name}: {trained}")
            if data.unpaired:
                progress.write(f"{data.unpaired} of {len(train)} examples left out: no other answer of memory is known")
        loss: Objective = ANSWER_LOSS
        if objective is not None:
            split = processes.splits(blocks)
            loss = preference(objective, lens, data.prompts, data.others, trained, split=split)
        if processes.splits(blocks):  # nothing to go back to: what is split is no model any more if training fails
            courses = {rate: attempt(tried, trained, loss) for rate, tried in schedules.items()}
        else:
            courses = _try_all(lens, trained.names, schedules, lambda tried: attempt(tried, trained, loss))
    return _result(method.name, trained, schedules, courses, f"dev_{score}", data, starts)


def _folder(out: str | Path, schedule: Schedule) -> Path:
    """Where the checkpoints of one rate's run are."""
    return Path(out) / "training" / f"rate-{schedule.learning_rate:g}"


def _result(
    method: str,
    trained: Trainable,
    schedules: Mapping[float, Schedule],
    courses: Mapping[float, Progress],
    score: str,
    data: Prepared,
    starts: Mapping[float, dict[str, list[float]]],
) -> Tuned:
    """What the courses, by learning rate, came to."""
    scores = {rate: _score(course) for rate, course in courses.items()}
    best = max(scores, key=scores.__getitem__)
    watched = [(0, starts[best])] if best in starts else []
    watched += [(row["step"], row["routing"]) for row in courses[best].rows if "routing" in row]
    return Tuned(
        method=method,
        trained=trained,
        schedule=schedules[best],
        log=log_table(courses[best]),
        candidates=pd.DataFrame(scores.items(), columns=["learning_rate", score]),
        dropped=data.dropped,
        unpaired=data.unpaired,
        seconds=sum(own.seconds for own in courses.values()),
        routing=course(watched),
    )


def _try_all(
    lens: MoELens, names: Sequence[str], schedules: Mapping[float, Schedule], attempt: Callable[[Schedule], Progress]
) -> dict[float, Progress]:
    """Attempts each schedule from the same start; the values of the best stay, and the start's if one fails."""
    start = _values(lens, names)
    courses: dict[float, Progress] = {}
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    try:
        for rate, schedule in schedules.items():
            if courses:
                _put(lens, start)
            course = courses[rate] = attempt(schedule)
            if len(schedules) > 1 and (best is None or _score(course) > best[0]):
                best = _score(course), _values(lens, names)
    finally:  # a rate that fails, or an interruption, leaves no half-trained model
        if len(courses) < len(schedules):
            _put(lens, start)
    if best is not None:
        _put(lens, best[1])
    return courses


def _score(course: Progress) -> float:
    """How well its best state did on the dev data; NaN without any."""
    return nan if course.best_score is None else course.best_score


def dev_score(
    lens: MoELens,
    dev: Sequence[Example],
    score: DevMetric,
    *,
    max_new_tokens: int,
    whole_model: bool,
    trained: Trainable | None = None,
    watch: RoutingWatch | None = None,
) -> DevScore:
    """How well the lens does on `dev`, which the processes share if each has the whole model.

    trained: with what it adds to the model, if it adds any. watch: what notes the routing.
    """
    processes = Processes.current()
    own = list(dev)[processes.rank :: processes.count] if whole_model else list(dev)

    def answers() -> float:
        with lens.intervene(*(trained.interventions() if trained else ())):
            table = answer_table(lens, own, max_new_tokens=max_new_tokens, progress=False) if own else None
        right, count = processes.sums(0.0 if table is None else float(table[score].sum()), len(own))
        return right / count

    def nats_of(_: Sequence[int], prompts: Sequence[Encoded]) -> float:
        batch = collate(prompts, pad_id(lens.module, lens.tokenizer))
        with trained.around(batch) if trained else nullcontext():
            return answer_loss(lens.module, batch, tokens=1).item()

    def log_likelihood() -> float:
        prompts = encoded(lens, own)
        prompts.sort(key=lambda prompt: len(prompt.input_ids))
        nats = 0.0
        for _, found in run_pieces(_sixteens(prompts), nats_of):
            nats += found
        nats, tokens = processes.sums(nats, answer_tokens(prompts))
        if not isfinite(nats):
            raise NotFiniteError(
                f"the log-likelihood of the dev data is {-nats}; `python -m moe_lens.doctor` says where the model's "
                "numbers stop being finite"
            )
        return -nats / tokens

    measure = log_likelihood if score == "log_likelihood" else answers
    return DevScore(f"dev_{score}", measure, None if watch is None else watch.now)


def _sixteens(prompts: Sequence[Encoded]) -> Iterator[tuple[tuple[int, ...], list[Encoded]]]:
    """Batches of 16 prompts with their places, in this order."""
    for start in range(0, len(prompts), 16):
        batch = list(prompts[start : start + 16])
        yield tuple(range(start, start + len(batch))), batch


def _check(
    lens: MoELens, rates: Sequence[float], dev: Sequence[Example], score: str, max_new_tokens: int, *, shard: bool
) -> None:
    if lens.interventions:
        raise MoELensError(
            "training runs the model without interventions and would measure it under them; call it outside "
            "`with lens.intervene(...)`"
        )
    if score not in get_args(DevMetric):
        raise MoELensError(f"score must be one of {', '.join(get_args(DevMetric))}; got {score!r}")
    if max_new_tokens < 1:
        raise MoELensError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if len(rates) > 1 and not dev:
        raise MoELensError(f"{len(rates)} learning rates were given and no dev data to choose by; give dev examples")
    check_rates(rates, shard=shard)


def check_rates(rates: Sequence[float], *, shard: bool) -> None:
    """MoELensError for several rates where the model is split over processes."""
    if shard and len(set(rates)) > 1:
        raise MoELensError(f"a model split over processes is trained once; give one learning rate, not {len(rates)}")


def told(schedule: Schedule) -> dict[str, object]:
    """What of a schedule tells one run from another; the others change how a step is computed, by rounding only."""
    ways = ("micro_batch", "gradient_checkpointing")
    return {name: value for name, value in asdict(schedule).items() if name not in ways}


def _values(lens: MoELens, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Copies of the named parameters on the CPU, so that the device holds them once."""
    return {name: whole(lens.module.get_parameter(name)) for name in names}


def _put(lens: MoELens, values: Mapping[str, torch.Tensor]) -> None:
    """Gives the named parameters these values."""
    for name, value in values.items():
        put(lens.module.get_parameter(name), value)
