"""The patching maps of a command: pairs of examples, the run that is patched and its source, and what is left."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from moe_lens.commands import console
from moe_lens.commands.options import Doing, Opening, Reading, place_named
from moe_lens.data.counterparts import COUNTERPARTS, counterparts_from
from moe_lens.errors import MoELensError

if TYPE_CHECKING:
    from moe_lens.causal import PatchingMap

SHOWN = (
    "layer", "position", "token", "expert", "n", "patched", "effect", "effect_low", "effect_high", "normalised",
    "normalised_low", "normalised_high", "q_value",
)  # fmt: skip
MOST = 12
"""Rows of a map that are printed."""


@dataclass(frozen=True)
class Patching:
    """What is patched from which run, and over what the map goes."""

    patch: Annotated[
        str | None,
        Option(
            help="Instead of masking: a map of what another run's values do, put in at each place (activation "
            "patching). The other half of each pair: memory (the context says what memory says), no_context, or data "
            "with the same ids as --data; scored by --data's answers."
        ),
    ] = None
    direction: Annotated[
        Literal["denoising", "noising"],
        Option(
            help="With --patch. denoising: the other half runs and gets values of --data's run, which may restore the "
            "answer. noising: the other way round."
        ),
    ] = "denoising"
    over: Annotated[
        Literal["positions", "tokens", "experts"],
        Option(
            help="With --patch, the map is layer by: positions (those of --positions, with commas; default "
            "context,question,last), tokens (every one, counted from the last), or experts (at one of --positions; "
            "default prompt)."
        ),
    ] = "positions"
    what: Annotated[
        str | None,
        Option(
            help="With --patch: residual, moe_output, shared_output, expert_outputs or router_input. Default residual, "
            "over experts expert_outputs."
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.patch is None and (self.direction, self.over, self.what) != ("denoising", "positions", None):
            raise MoELensError("--direction, --over and --what say how --patch is done; give --patch too")

    def expect_alone(self, others: dict[str, Any], doing: Doing) -> None:
        """MoELensError for options that say something of masking; others: some by name."""
        of_doing = {
            "--mode": doing.mode != "zero",
            "--steps": doing.steps != "all",
            "--intervention": doing.intervention,
        }
        given = [name for name, value in (others | of_doing).items() if value]
        if given:
            raise MoELensError(f"--patch is done instead of masking; leave {', '.join(given)} out")

    def positions(self, text: str) -> tuple[Any, ...] | None:
        """The places of --positions; None where the map's own are meant."""
        return None if text == "all" or self.over == "tokens" else tuple(map(place_named, text.split(",")))

    def compared(self, places: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        """Where halves of a pair must have equally many tokens; None for what both have of context and question."""
        if self.over == "positions":
            return places
        return ("prompt",) if self.over == "tokens" or places is None else places


@dataclass(frozen=True)
class MapRun:
    """What a map needs of a command besides its pairs."""

    opening: Opening
    reading: Reading
    data: str
    split: str
    limit: int | None
    positions: str
    layers: tuple[int, ...] | None
    metrics: str | None
    max_new_tokens: int
    batch_size: int
    out: Path
    seed: int

    def leave(self, patching: Patching) -> None:
        """Make the map, write its tables and figure to `out`, and print its strongest cells."""
        from moe_lens.causal import patching_map
        from moe_lens.lens import Run
        from moe_lens.lens.parallel import connected, from_first_process
        from moe_lens.results import claim

        places = patching.positions(self.positions)
        loaded = self.reading.load(self.data, split=self.split, limit=self.limit)
        processes = connected()
        lens = self.opening.of_process(processes).load()
        lens.batch_size, lens.progress = self.batch_size, processes.is_main_process
        fitted = self.reading.fit(loaded, lens, of=f"{self.data}, {self.split}")
        others = self._others(patching, fitted.examples)
        own, other = matching(lens, fitted.examples, others, patching.compared(places))
        if places is None and patching.over == "positions":
            places = ("context", "question", "last") if own[0].context and other[0].context else ("question", "last")
        ours, theirs = (other, own) if patching.direction == "denoising" else (own, other)
        metric = self.metrics or ("logit_difference" if any(one.memory for one in ours) else "answer_log_probability")
        facts = self.opening.facts(lens) | self.reading.facts(fitted) | {"positions": places, "metric": metric}
        made_by = self._made_by(patching, own, other, facts)
        from_first_process(lambda: claim(self.out, made_by))  # before another one writes
        found = patching_map(
            lens,
            ours,
            Run(lens, theirs),
            over=patching.over,
            what=patching.what,
            positions=places,
            layers=self.layers,
            metric=metric,
            max_new_tokens=self.max_new_tokens,
            out=self.out,
            made_by=made_by,
            seed=self.seed,
        )
        if processes.is_main_process:
            self._write(found, made_by)

    def _made_by(
        self, patching: Patching, own: Sequence[Any], other: Sequence[Any], facts: dict[str, Any]
    ) -> dict[str, Any]:
        """The provenance; facts: of the model, of how data were read, and of what was settled for these."""
        from moe_lens.results import data_digest, portable, provenance

        facts = asdict(patching) | facts | {"patch": portable(str(patching.patch)), "counterparts": data_digest(other)}
        facts |= {"layers": self.layers, "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        model, delta = self.opening.model, self.opening.delta
        return provenance(model=model, delta=delta, data=own, seed=self.seed, facts=facts)

    def _write(self, found: "PatchingMap", made_by: dict[str, Any]) -> None:
        """The tables and the figure, and the strongest cells on the console."""
        from moe_lens.report.plots import patching_figure
        from moe_lens.results import write_table

        write_table(found.table, self.out / "patching.parquet", made_by)
        write_table(found.effects, self.out / "patching_effects.parquet", made_by)
        pages = console.save_figure(patching_figure(found.table), self.out / "patching.html")
        rows = found.table.loc[found.table["effect"].abs().sort_values(ascending=False, kind="stable").index]
        what = found.table["what"].iloc[0]
        title = f"What patching {what} does to {made_by['metric']}: the strongest of {len(rows)} places"
        console.show(rows.head(MOST), [name for name in SHOWN if name in rows], title=title)
        files = ["patching.parquet", "patching_effects.parquet", *(path.name for path in pages)]
        console.say(f"written to {self.out}: {', '.join(files)}")

    def _others(self, patching: Patching, loaded: Sequence[Any]) -> list[Any]:
        """The other half of each example's pair; None where it has none."""
        name = str(patching.patch)
        if name in COUNTERPARTS:
            return [COUNTERPARTS[name](example) for example in loaded]
        return counterparts_from(self.reading.load(name, split=self.split), loaded)


def matching(
    lens: Any, examples: Sequence[Any], others: Sequence[Any], places: Sequence[Any] | None
) -> tuple[list[Any], list[Any]]:
    """The pairs whose halves have equally many tokens at each of the places, or, for None, in what both have.

    How many are left out is printed. MoELensError where none is left.
    """
    from moe_lens.data import collate, encode
    from moe_lens.lens.positions import position_mask

    def counts(example: Any, both: bool) -> list[int]:
        batch = collate([encode(example, lens.tokenizer, template=lens.template)], 0)
        spans = batch.attention_mask, batch.context_spans, batch.question_spans
        wanted: Sequence[Any] = places or (("context", "question") if both else ("question",))
        return [int(position_mask(*spans, place).sum()) for place in wanted]

    pairs = [(own, other) for own, other in zip(examples, others, strict=True) if other is not None]
    kept = [
        (own, other)
        for own, other in pairs
        if len({tuple(counts(one, bool(own.context and other.context))) for one in (own, other)}) == 1
    ]
    out = len(examples) - len(kept)
    if not pairs:
        raise MoELensError(
            f"none of {len(examples)} examples has another half: memory needs an original_answer and an answer in the "
            "context, no_context a context"
        )
    if not kept:
        raise MoELensError(
            f"none of {len(examples)} examples has another half with equally many tokens where it is patched; take "
            "other --positions, such as question,last or last"
        )
    if out:
        unlike = len(pairs) - len(kept)
        console.say(
            f"{len(kept)} pairs; left out {out}: {out - unlike} without another half, {unlike} of other lengths"
        )
    return [own for own, _ in kept], [other for _, other in kept]
