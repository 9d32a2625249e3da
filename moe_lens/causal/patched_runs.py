"""Patching maps: what another run's values do to answers, put in at one place after the other."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from moe_lens.causal.evaluation import UNMASKED, check_metrics, q_values
from moe_lens.causal.outputs import Run as Asked
from moe_lens.causal.outputs import outputs, scores
from moe_lens.data import Encoded, Example, collate, encode
from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.interventions import Intervention, Patch, Run, check_interventions
from moe_lens.lens.interventions.patching import Align
from moe_lens.lens.interventions.sources import Remembered
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import from_first_process
from moe_lens.lens.positions import Positions, position_mask
from moe_lens.metrics import (
    Interval,
    Metric,
    bootstrap_interval,
    metrics_named,
    permutation_p_values,
    ratio_of_means,
)
from moe_lens.metrics.bounds import Bounds
from moe_lens.metrics.catalogue import Named, expect_single
from moe_lens.metrics.resampling import bounds_of_differences
from moe_lens.results import provenance

Over = Literal["positions", "tokens", "experts"]
DEFAULT_POSITIONS: tuple[Positions, ...] = ("context", "question", "last")
SOURCE = "source"
RESAMPLES = 2000


@dataclass(frozen=True)
class PatchingMap:
    """What patching did.

    effects: one row per cell of the map and example: layer, position, expert (of a map over experts), id; score under
        the patch, unpatched, source, the same scores without a patch and of the source; effect, score - unpatched.
    table: see `patching_map`.
    """

    effects: pd.DataFrame
    table: pd.DataFrame


@dataclass(frozen=True)
class Cell:
    """A place of the map: a layer and the positions that get values, of one expert or of all that the site is."""

    layer: int
    positions: Positions
    expert: int | None = None

    @property
    def position(self) -> str:
        """The positions as one text."""
        several = self.positions if isinstance(self.positions, tuple) else (self.positions,)
        return ",".join(map(str, several))

    @property
    def name(self) -> str:
        of = "" if self.expert is None else f", expert {self.expert}"
        return f"layer {self.layer}{of}, {self.position}"

    def patch(self, source: Run, what: str, align: Align) -> Patch:
        experts = None if self.expert is None else ExpertSet.of({self.layer: [self.expert]})
        return Patch(source, what=what, experts=experts, layers=(self.layer,), positions=self.positions, align=align)


def patching_map(
    lens: MoELens,
    examples: Sequence[Example],
    source: Run,
    *,
    over: Over = "positions",
    what: str | None = None,
    positions: Sequence[Positions] | None = None,
    layers: Sequence[int] | None = None,
    metric: Named = "logit_difference",
    align: Align = "exact",
    max_new_tokens: int = 16,
    batch_size: int | None = None,
    out: Path | None = None,
    made_by: dict[str, Any] | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> PatchingMap:
    """Patches the examples' run from the source's, one cell of layer × positions or layer × expert at a time.

    source: a run of examples of the same ids. *Denoising* runs corrupted examples here and takes a clean source:
        what is enough to restore an answer. *Noising* runs the clean ones and takes a corrupted source: what is needed.
    over: "positions", a column for each of `positions`; "tokens", one for each token of the prompts, counted from
        their last, 0, where an example and its source have equally many; "experts", one for each expert, patched at
        the one `positions`.
    what: one of `SITES`; by default "residual", of experts "expert_outputs", the only one that single experts have.
    positions: by default context, question and last; of experts the whole prompt. layers: by default all that have it.
    metric: a name of `METRICS` or a function, as `evaluate` takes them. The source is scored by the examples' answers.
    align: as in `Patch`. out, made_by, max_new_tokens: as in `evaluate`; finished parts outlive an interruption.

    The table has a row per cell: layer, position, expert (over experts), token (its text, over tokens, where all have
    the same), what, metric; n and missing, examples with and without a score in all runs; unpatched, source, patched,
    their means; effect, the mean of patched - unpatched, with its 95 % interval over examples, NaN where too few or
    equal values tell no spread; normalised, the effect over source - unpatched, a ratio of means, with its interval: 0
    is the unpatched run, 1 the source; p_value, of the paired permutation test of no effect, and q_value, corrected for
    the number of cells (Benjamini-Hochberg). `normalised` is NaN where the two runs do not differ for certain, the
    interval of their difference holding 0.

    Raises MoELensError for what `Patch` and `evaluate` refuse, and for ids that repeat.
    """
    [scored] = metrics_named([metric])
    _check(lens, examples, scored)
    shown = lens.progress if progress is None else progress
    size = lens.batch_size if batch_size is None else batch_size
    known = made_by or (_provenance(lens, examples) if out else {})
    asked = Asked(max_new_tokens, size, out, known, shown, batches=1)
    what = what or ("expert_outputs" if over == "experts" else "residual")
    tokens = _tokens(lens, examples, source) if over == "tokens" else {}
    cells = list(_cells(lens, over, what, positions, layers, tokens))
    if not cells:
        raise MoELensError(f"nothing is to be patched: expected layers and positions; got {layers} and {positions}")
    there = _there(lens, examples, frozenset(cell.positions for cell in cells), tokens)
    patches = _patches(lens, cells, source, what, align)
    found = outputs(lens, examples, {UNMASKED: (), **patches}, [scored.reads], asked)
    theirs = _source_outputs(source, examples, scored, asked)

    def finish() -> PatchingMap:
        read = {name: values for (name, _), values in found.items()} | {SOURCE: theirs}
        found_of = {name: scores(scored, values, examples, lens.template) for name, values in read.items()}
        effects = _effects(cells, examples, found_of, there)
        if effects["effect"].isna().all():
            raise MoELensError(
                f"{scored.name} is defined for none of the examples in all runs; choose another metric, or other data"
            )
        return PatchingMap(effects, _table(effects, what, scored, _token_texts(lens, tokens), seed))

    return from_first_process(finish)


def _cells(
    lens: MoELens,
    over: str,
    what: str,
    positions: Sequence[Positions] | None,
    layers: Sequence[int] | None,
    tokens: dict[str, Encoded],
) -> Iterator[Cell]:
    """The map's cells, layer by layer; MoELensError for what makes none."""
    architecture = lens.architecture
    every = range(architecture.n_layers) if what == "residual" else architecture.moe_layers
    chosen = tuple(every if layers is None else dict.fromkeys(layers))
    if over not in ("positions", "tokens", "experts"):
        raise MoELensError(f"a patching map goes over positions, tokens or experts; got {over!r}")
    if over == "tokens":
        if positions is not None:
            raise MoELensError("a map over tokens has all of the prompts'; leave positions= out, or go over positions")
        longest = max(one.prompt_length for one in tokens.values())
        yield from (Cell(layer, (step,)) for layer in chosen for step in range(1 - longest, 1))
    elif over == "experts":
        places = ("prompt",) if positions is None else tuple(positions)
        if len(places) != 1 or what != "expert_outputs":
            raise MoELensError(
                f"a map over experts patches their expert_outputs at one kind of positions; got {what!r} at {places}"
            )
        yield from (Cell(layer, places[0], e) for layer in chosen for e in range(architecture.n_experts))
    else:
        places = DEFAULT_POSITIONS if positions is None else tuple(dict.fromkeys(positions))
        yield from (Cell(layer, place) for layer in chosen for place in places)


def _patches(
    lens: MoELens, cells: Sequence[Cell], source: Run, what: str, align: Align
) -> dict[str, tuple[Intervention]]:
    """The patch of each cell by its name, all from one run of the source; MoELensError for what the model lacks."""
    at = frozenset(cell.positions for cell in cells)
    remembered = Remembered(source.lens, source.examples, source.under, source.with_answer, at)
    found: dict[str, tuple[Intervention]] = {cell.name: (cell.patch(remembered, what, align),) for cell in cells}
    for patch in found.values():
        check_interventions(patch, lens.architecture)
    return found


def _tokens(lens: MoELens, examples: Sequence[Example], source: Run) -> dict[str, Encoded]:
    """Each example's prompt by its id; MoELensError where its source has more or fewer tokens."""
    found = {example.id: encode(example, lens.tokenizer, template=lens.template) for example in examples}
    theirs = source.of(found)
    other = cast(MoELens, source.lens)
    for one, example in zip(found.values(), theirs, strict=True):
        length = encode(example, other.tokenizer, template=other.template).prompt_length
        if length != one.prompt_length:
            raise MoELensError(
                f"the prompt of example {one.id!r} has {one.prompt_length} tokens and {length} in the run that values "
                "are taken from, so that tokens do not match; take examples of equal length, or a map over positions"
            )
    return found


def _there(
    lens: MoELens, examples: Sequence[Example], at: Collection[Positions], tokens: dict[str, Encoded]
) -> dict[Positions, list[bool]]:
    """Which of the examples' prompts have a token at each of the positions; MoELensError where none has."""
    if tokens:
        lengths = [prompt.prompt_length for prompt in tokens.values()]
        return {place: [length > -place[0] for length in lengths] for place in at if isinstance(place, tuple)}
    found: dict[Positions, list[bool]] = {place: [] for place in at}
    for example in examples:
        batch = collate([encode(example, lens.tokenizer, template=lens.template)], 0)
        for place, own in found.items():
            mask = position_mask(batch.attention_mask, batch.context_spans, batch.question_spans, place)
            own.append(bool(mask.any()))
    for place, own in found.items():
        if not any(own):
            raise MoELensError(
                f"no prompt has a token at {place!r} to be patched; take positions such as question or last"
            )
    return found


def _source_outputs(source: Run, examples: Sequence[Example], scored: Metric, asked: Asked) -> list[Any]:
    """What the source says to its own prompts, read for the answers of `examples`."""
    prompts = [
        replace(
            theirs,
            answers=ours.answers,
            original_answer=ours.original_answer,
            original_aliases=ours.original_aliases,
            options=ours.options,
        )
        for ours, theirs in zip(examples, source.of(example.id for example in examples), strict=True)
    ]
    lens = cast(MoELens, source.lens)
    run = replace(asked, provenance=asked.provenance | ({"source": source.digest} if asked.out else {}))
    with lens.at_rest():
        return outputs(lens, prompts, {SOURCE: source.under}, [scored.reads], run)[SOURCE, scored.reads]


def _effects(
    cells: Sequence[Cell],
    examples: Sequence[Example],
    scores: dict[str, list[float]],
    there: dict[Positions, list[bool]],
) -> pd.DataFrame:
    """`PatchingMap.effects`, NaN where an example has no such token; scores: by cell's name, UNMASKED and SOURCE."""
    ids = [example.id for example in examples]
    parts = []
    for cell in cells:
        part = pd.DataFrame({"layer": cell.layer, "position": cell.position, "id": ids, "score": scores[cell.name]})
        part["score"] = part["score"].where(there[cell.positions])
        if cell.expert is not None:
            part.insert(2, "expert", cell.expert)
        parts.append(part.assign(unpatched=scores[UNMASKED], source=scores[SOURCE]))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(effect=(table["score"] - table["unpatched"]).where(table["source"].notna()))


def _table(effects: pd.DataFrame, what: str, scored: Metric, texts: dict[str, str], seed: int) -> pd.DataFrame:
    """`PatchingMap.table`; texts: of tokens, by their positions."""
    keys = [name for name in ("layer", "position", "expert") if name in effects]
    seen = effects[["score", "unpatched", "source"]].to_numpy(np.float64)
    bounds = scored.bounds_of_difference or bounds_of_differences(seen[np.isfinite(seen)])
    groups = effects.groupby(keys, sort=False)
    rows = [dict(zip(keys, key, strict=True)) | _row(part, bounds, seed) for key, part in groups]
    table = pd.DataFrame(rows)
    if texts:
        table.insert(2, "token", table["position"].map(texts))
    for place, (name, value) in enumerate((("what", what), ("metric", scored.name)), len(keys) + bool(texts)):
        table.insert(place, name, value)
    table["p_value"] = _p_values(effects["effect"].to_numpy(np.float64).reshape(len(table), -1).T, seed)
    return table.assign(q_value=q_values(table["p_value"]))


def _row(part: pd.DataFrame, bounds: Bounds, seed: int) -> dict[str, float]:
    """What the table says of one cell."""
    known = part[part["effect"].notna()]
    row: dict[str, float] = {"n": len(known), "missing": len(part) - len(known)}
    if known.empty:
        return row
    row |= {"unpatched": known["unpatched"].mean(), "source": known["source"].mean(), "patched": known["score"].mean()}
    moved, apart = known["effect"].to_numpy(), (known["source"] - known["unpatched"]).to_numpy()
    effect, whole = (
        bootstrap_interval(values, bounds=bounds, resamples=RESAMPLES, seed=seed) for values in (moved, apart)
    )
    row |= {"effect": effect.mean, "effect_low": effect.low, "effect_high": effect.high}
    if not _is_away_from_zero(whole, known):
        return row | {"normalised": np.nan, "normalised_low": np.nan, "normalised_high": np.nan}
    share = ratio_of_means(moved, apart, resamples=RESAMPLES, seed=seed)
    return row | {"normalised": share.mean, "normalised_low": share.low, "normalised_high": share.high}


def _is_away_from_zero(whole: Interval, known: pd.DataFrame) -> bool:
    """Whether the two runs differ for certain: of one example, or where all differ alike, by more than rounding."""
    if np.isnan(whole.low):
        return not np.isclose(known["source"].mean(), known["unpatched"].mean(), rtol=1e-4, atol=1e-4)
    return whole.low * whole.high > 0


def _p_values(effects: np.ndarray, seed: int) -> np.ndarray:
    """Each cell's p-value, NaN without an effect; effects: [example, cell], of the same examples tested at once."""
    found = np.full(effects.shape[1], np.nan)
    there, which = np.unique(~np.isnan(effects), axis=1, return_inverse=True)
    permutations = max(10_000, 100 * effects.shape[1])
    for group, rows in enumerate(there.T):
        cells = which.reshape(-1) == group
        if rows.any():
            found[cells] = permutation_p_values(effects[rows][:, cells], permutations=permutations, seed=seed)
    return found


def _token_texts(lens: MoELens, tokens: dict[str, Encoded]) -> dict[str, str]:
    """The text of each position, counted from the last, at which all prompts that have one have the same token."""
    seen: dict[int, set[int]] = {}
    for one in tokens.values():
        for place, token in enumerate(one.input_ids[: one.prompt_length]):
            seen.setdefault(place + 1 - one.prompt_length, set()).add(token)
    return {str(step): str(lens.tokenizer.decode([*ids])) for step, ids in seen.items() if len(ids) == 1}


def _check(lens: MoELens, examples: Sequence[Example], scored: Metric) -> None:
    """MoELensError for what no map can be made of, before anything is computed."""
    if not examples or len({example.id for example in examples}) < len(examples):
        raise MoELensError("a patching map needs examples, each of an id of its own, by which its source is found")
    if lens.interventions:
        raise MoELensError(
            "a patching map compares with the model as it is; call it outside `with lens.intervene(...)`"
        )
    expect_single(scored)
    check_metrics([scored], examples, None)


def _provenance(lens: MoELens, examples: Sequence[Example]) -> dict[str, Any]:
    """Of parts whose caller gave none."""
    return provenance(model=lens.name, data=examples, facts={"weights": weights_digest(lens.module)})
