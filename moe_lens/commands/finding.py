"""What the command that finds experts does: every score measured with its cost, and how far its choice returns."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from moe_lens.architecture.discovery import pretrained
from moe_lens.choosing.agreement import returning
from moe_lens.choosing.learned import LearnedSet
from moe_lens.choosing.measuring import Models, Opened, is_parted, passes_of, score_tables, tables_on_parts
from moe_lens.choosing.planted import has_planted, planted_experts
from moe_lens.choosing.procedures import Examples, Procedure
from moe_lens.choosing.scores import SCORES, Score
from moe_lens.choosing.selection import Choice, Learned, Selection
from moe_lens.commands import console
from moe_lens.commands.named_experts import Measuring
from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.experts import ExpertSet
from moe_lens.lens.batching import encode_prompt
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import agreed, gathered, own_part
from moe_lens.metrics import auc
from moe_lens.progress import progress_bar
from moe_lens.report.plots import agreement_figure, scores_figure
from moe_lens.results import kept, read_if_made_by, write_table
from moe_lens.storage import as_json, write_bytes

ANSWER = "answer"
"""The target of scores where nobody says what memory answers."""
ANSWERED = ("em", "below_random", "random_p", "rank")
"""How the columns of a masking run begin that are told of each choice."""
LONGEST = 200
"""Bytes of a file's name, without its ending."""
SHOWN = (
    "score", "precision", "auc", "em", "em_low", "em_high", "below_random", "below_random_low", "random_p", "rank",
    "returned", "seconds", "shared_by", "passes",
)  # fmt: skip


def texts_of(
    asked: Sequence[str] | None,
    data: str,
    *,
    against: str | None,
    spare: Sequence[str],
    size: int,
    has_tuned: bool,
    has_memory: bool,
) -> list[str]:
    """What is looked for, as `parse` reads it: each of the scores asked for, cut at `size` where it says no size.

    Without any, all that `SCORES` holds but those that run the model once for every expert, and those of a tuned model
    where there is none; and a learned set. has_memory: whether examples say what memory answers; without it, scores
    that take a target are of the answer alone.
    """
    usual = [score for score in SCORES.values() if _is_usual(score, has_tuned)]
    targets = {score.name: f"{score.name}({ANSWER})" for score in usual if score.takes == "TARGET" and not has_memory}
    names = list(asked or [targets.get(score.name, score.name) for score in usual] + ["set"])
    names += [f"contrast({data};{against})"] if against else []
    names += [f"set:{size};spare={','.join(spare)}"] if spare and not asked else []
    return [sized(name, size) for name in dict.fromkeys(names)]


def sized(name: str, size: int) -> str:
    """A score's name with how many experts it chooses, as `parse` reads it, where it does not say so itself."""
    return name if re.match(r"[\w-]+(\(.*\))?:", name.strip()) else f"{name}:{size}"


def _is_usual(score: Score, has_tuned: bool) -> bool:
    source = score.measured_by()
    return (has_tuned or not score.needs_tuned) and not (isinstance(source, Procedure) and source.per_expert)


@dataclass(frozen=True)
class Ranked:
    """Scores of every expert by name, columns layer, expert, score; and what is known of each, a row by name.

    told: columns seconds (that measuring took), shared_by (the scores measured together in that time), passes (tokens
    that went through the models over those of the examples' prompts), returned (of the chosen experts the share that
    returns on other data, or in other searches), returned_low, returned_high.
    """

    tables: Mapping[str, pd.DataFrame]
    told: pd.DataFrame


@dataclass(frozen=True)
class Finder:
    """Measures scores, those of one kind together, and keeps what it has in `out`.

    size: experts per layer of which is said how many return. parts: those that the data are cut into; below 2 for none.
    lenient: whether scores that refuse the data are left out, with a note, instead of ending the command.
    """

    lens: MoELens
    on: Measuring
    out: Path
    size: int
    parts: int
    seed: int
    lenient: bool

    def ranked(self, scores: Sequence[Score]) -> Ranked:
        """All of them."""
        groups: dict[Any, list[Score]] = {}
        for score in scores:
            source = score.measured_by()
            kind = type(source) if isinstance(source, Procedure) else None
            alone = score.name if kind is LearnedSet else score.argument  # others may refuse the data
            groups.setdefault((score.of, kind, alone), []).append(score)
        console.say(self._cost(groups.values()))
        bar = progress_bar(groups.values(), desc="kinds of scores", unit="kind", disable=not self.lens.progress)
        found = [table for group in bar if (table := self._kept(group)) is not None]
        if not found:
            raise MoELensError("no score can be measured on these data; see the notes above, or name some with --score")
        whole = pd.concat(found, ignore_index=True)
        facts = ["seconds", "shared_by", "passes", "returned", "returned_low", "returned_high"]
        told = whole.drop_duplicates("name").set_index("name")[facts]
        by_name = {str(name): own.drop(columns=["name", *facts]) for name, own in whole.groupby("name", sort=False)}
        return Ranked({name: own.dropna(axis="columns", how="all") for name, own in by_name.items()}, told)

    def _cost(self, groups: Iterable[Sequence[Score]]) -> str:
        """What measuring will take, in words; of scores that refuse the data, and those that are there, nothing."""
        whole = 0.0
        for group in groups:
            try:
                if self._file(group)[0].exists():
                    continue
                sides = ([one for one in group if one.needs_base], [one for one in group if one.needs_tuned])
                once = sum(passes_of(side, self.lens, self.on.examples, self.on.load) for side in sides)
            except MoELensError:
                continue  # told when it is measured
            again = self.parts > 1 and not self._is_parted(group) and not isinstance(group[0].measured_by(), LearnedSet)
            whole += once * (2 if again else 1)
        return f"measuring takes about {whole:.1f} passes over {len(self.on.examples)} examples"

    def _is_parted(self, group: Sequence[Score]) -> bool:
        """Whether parts of the data are measured by the passes over all."""
        return 2 <= self.parts <= len(self.on.examples) and all(map(is_parted, group))

    def _file(self, group: Sequence[Score]) -> tuple[Path, dict[str, Any]]:
        """Where the tables of one group are kept, and how they were made."""
        facts = {score.name: [score.about, score.of, _facts(score, self.on)] for score in group}
        made_by = self.on.made_by | {"scores": facts, "size": self.size, "parts": self.parts, "seed": self.seed}
        return self.out / "parts" / f"scores-{sha256(as_json(facts).encode()).hexdigest()[:16]}.parquet", made_by

    def _kept(self, group: Sequence[Score]) -> pd.DataFrame | None:
        """The tables of one group, one below the other, with what is known; None where it refuses the data."""
        part, made_by = self._file(group)
        found = agreed(lambda: read_if_made_by(part, made_by))  # outside of try: a damaged part is an error
        try:
            return self._measured(group, part, made_by) if found is None else found
        except NotFiniteError:
            raise
        except MoELensError as error:
            if not self.lenient:
                raise
            names = [score.name for score in group]
            console.note(f"left out {names[0]}{f' and {len(names) - 1} like it' if names[1:] else ''}: {error}")
            return None

    def _measured(self, group: Sequence[Score], part: Path, made_by: dict[str, Any]) -> pd.DataFrame:
        """These tables by running the models, kept as `part`."""
        counted: Counter[str] = Counter()
        models = Models(_counting(self.on.models.base, counted), _counting(self.on.models.tuned, counted))
        began = time.perf_counter()
        number = self.parts if self._is_parted(group) else 1
        asked: dict[str, Any] = {"batch_size": self.lens.batch_size, "load": self.on.load}
        tables, *parts = tables_on_parts(group, models, self.on.examples, parts=number, **asked)
        facts = {"seconds": time.perf_counter() - began, "shared_by": len(group)}
        facts["passes"] = sum(gathered([counted["tokens"]], own_part(self.lens.module))) / self._tokens()
        parts = parts or self._parts(group)
        rows = []
        for score in group:
            back = self._returned(score, tables[score.name], [part[score.name] for part in parts])
            rows.append(tables[score.name].assign(name=score.name, **facts, **back))
        found = pd.concat(rows)
        return agreed(lambda: kept(part, made_by, lambda: found))

    def _parts(self, group: Sequence[Score]) -> list[dict[str, pd.DataFrame]]:
        """The scores on each part of the data, of those too that a score names itself; none where one refuses it."""
        if self.parts < 2 or isinstance(group[0].measured_by(), LearnedSet):
            return []
        try:
            return [self._part(group, slice(number, None, self.parts)) for number in range(self.parts)]
        except MoELensError as error:
            console.note(
                f"not said how many of {', '.join(score.name for score in group)} return: of one of {self.parts} parts "
                f"of the data, {error}; take fewer --parts, or 0"
            )
            return []

    def _part(self, group: Sequence[Score], own: slice) -> dict[str, pd.DataFrame]:
        """The scores on one part; MoELensError where it has no examples, or a score refuses these."""

        def part(examples: Examples) -> Examples:
            if not examples[own]:
                raise MoELensError("there are no examples left")
            return examples[own]

        load = self.on.load
        return score_tables(
            group,
            self.on.models,
            part(self.on.examples),
            batch_size=self.lens.batch_size,
            load=lambda spec: part(load(spec)),
        )

    def _returned(self, score: Score, table: pd.DataFrame, parts: Sequence[pd.DataFrame]) -> dict[str, float]:
        """How much of the choice returns; of a learned set in its other searches."""
        if isinstance(score.measured_by(), LearnedSet):
            own = table.loc[table["chosen"], "returned"].mean()
            return {"returned": own, "returned_low": np.nan, "returned_high": np.nan}
        shares = returning(parts, self.size, seed=self.seed) if parts else np.array([np.nan])
        low, high = np.quantile(shares, [0.025, 0.975])
        return {"returned": float(shares.mean()), "returned_low": float(low), "returned_high": float(high)}

    def _tokens(self) -> int:
        """Tokens of the examples' prompts."""
        tokenizer, template = self.lens.tokenizer, self.lens.template
        prompts = (encode_prompt(n, one, tokenizer, template=template) for n, one in enumerate(self.on.examples))
        return sum(len(prompt.input_ids) for prompt in prompts)


def _facts(score: Score, on: Measuring) -> dict[str, Any]:
    """What tells how a score is measured."""
    source = score.measured_by()
    return source.facts(on.load) if isinstance(source, Procedure) else dict(source.settings)


def _counting(opened: Opened, counted: Counter[str]) -> Opened:
    """The same model, of which every token that goes in is counted."""

    def count(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        counted["tokens"] += next(iter((*arguments, *named.values()))).numel()

    @contextmanager
    def block() -> Iterator[MoELens]:
        with opened() as lens:
            hook = pretrained(lens.module).get_input_embeddings().register_forward_pre_hook(count, with_kwargs=True)
            try:
                yield lens
            finally:
                hook.remove()

    return block


def judged_by(selection: Selection, choice: Choice, lens: MoELens) -> Choice:
    """What is masked to judge a choice: itself, or all others where it is to suffice."""
    if not (isinstance(selection, Learned) and selection.way.wanted.keep):
        return choice
    every = ExpertSet.of({layer: range(lens.architecture.n_experts) for layer in lens.architecture.moe_layers})
    return replace(choice, name=f"all but {choice.name}", experts=every - choice.experts)


def write_sets(chosen: Sequence[Choice], out: Path) -> None:
    """Each set as a file for --experts; of two names that are one as files the second has a digest at its end."""
    taken: set[str] = set()
    for choice in chosen:
        name = file_name(choice.name)
        name = f"{name}-{_digest(choice.name)}" if name in taken else name
        taken.add(name)
        write_bytes(out / "sets" / f"{name}.json", (choice.experts.to_json() + "\n").encode())


def file_name(name: str) -> str:
    """A name as files may have it: without brackets, colons and semicolons, and not too long."""
    plain = re.sub(r"[^\w.=,-]+", "_", name).strip("_")
    return plain if len(plain.encode()) <= LONGEST else f"{plain[:40]}-{_digest(name)}"


def _digest(name: str) -> str:
    """What tells long names, or those that look alike, apart."""
    return sha256(name.encode()).hexdigest()[:8]


def found_table(
    selections: Sequence[Selection],
    chosen: Sequence[Choice],
    judged: Sequence[Choice],
    ranked: Ranked,
    rows: pd.DataFrame,
    model: str,
) -> pd.DataFrame:
    """A row per choice: what ranks, its experts, what masking it leaves, what returns, the cost, and the truth's share.

    rows: those of `mask` on the first task. precision, auc: against the planted experts, where the model has them.
    """
    planted = planted_experts(model) if has_planted(model) else None
    by_name, found = rows.set_index("set"), []
    for selection, choice, masked in zip(selections, chosen, judged, strict=True):
        assert selection.score is not None, "all that is looked for ranks experts"
        table = ranked.tables[selection.score.name]
        row: dict[str, Any] = {"score": choice.name, "about": selection.score.about, "experts": str(choice.experts)}
        if planted is not None:
            row |= {"precision": len(choice.experts & planted) / len(choice.experts), "auc": auc(table, planted)}
        answered = by_name.loc[masked.name]
        row |= {name: answered[name] for name in rows if name == "n" or name.startswith(ANSWERED)}
        found.append(row | ranked.told.loc[selection.score.name].to_dict())
    return pd.DataFrame(found).astype({"shared_by": int})


def leave_found(found: pd.DataFrame, agreement: pd.DataFrame, out: Path, made_by: dict[str, Any]) -> None:
    """Write scores.parquet and agreement.parquet with their figures, and print the first."""
    write_table(found, out / "scores.parquet", made_by)
    files = ["scores.parquet", *(page.name for page in console.save_figure(scores_figure(found), out / "scores.html"))]
    if len(agreement):
        write_table(agreement, out / "agreement.parquet", made_by)
        pages = console.save_figure(agreement_figure(agreement), out / "agreement.html")
        files += ["agreement.parquet", *(page.name for page in pages)]
    console.show(found, [name for name in SHOWN if name in found], title="What was found, and what it leaves masked")
    console.say(f"written to {out}: {', '.join(files)}, sets/")
