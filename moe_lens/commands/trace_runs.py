"""What commands do with traces of serving engines in the place of a model that runs: measured, and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moe_lens.commands import console
from moe_lens.commands.asked_measures import AS_IS, Asked
from moe_lens.commands.options import Opening, Reading
from moe_lens.commands.statistic_passes import Measuring
from moe_lens.commands.statistic_tables import Kept
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.report.page import build_report
from moe_lens.results import claim, data_digest, provenance, write_table
from moe_lens.statistics.measures import MEASURES, ROUTING, WEIGHTS
from moe_lens.storage import digest_of
from moe_lens.traces import Request, TracedModel, trace_agreement


@dataclass(frozen=True)
class Traces:
    """Traces of a model, by their files' names, and where they came from."""

    model: TracedModel
    requests: Mapping[str, Sequence[Request]]
    facts: dict[str, Any]

    @classmethod
    def opened(
        cls,
        opening: Opening,
        files: Sequence[Path],
        data: str | None,
        reading: Reading,
        *,
        split: str,
        limit: int | None,
    ) -> "Traces":
        """The traces as requests of the model, and of the prompts of `data` where that is given.

        Raises MoELensError for a trace of another model or other prompts, and for one file twice.
        """
        if opening.delta is not None:
            raise MoELensError("a trace is of the model that was served; leave --delta out")
        names = _names(files)
        template, remote = opening.asked(), opening.trust_remote_code
        model = TracedModel.from_pretrained(opening.model, template=template, trust_remote_code=remote)
        facts = {"traces": {name: digest_of(file) for name, file in zip(names, files, strict=True) if file.is_file()}}
        examples = None
        if data is not None:
            loaded = reading.load(data, split=split, limit=limit)
            examples = reading.fit(loaded, model, of=f"{data}, {split}").examples
            facts |= {"sets": data_digest(examples), "template": template.facts()}
        found = {name: model.read(file, examples) for name, file in zip(names, files, strict=True)}
        for name, requests in found.items():
            console.say(f"{name}: {len(requests)} requests, {sum(one.told for one in requests)} tokens with experts")
        return cls(model, found, facts)

    @property
    def examples(self) -> Mapping[str, Sequence[Example]]:
        """The requests for those who hand examples on to `as_lens.measure` and do nothing else with them."""
        return cast(Mapping[str, Sequence[Example]], self.requests)

    @property
    def as_lens(self) -> MoELens:
        """The model for those who ask a lens for nothing but its parts, its tokenizer and `measure`."""
        return cast(MoELens, self.model)


def _names(files: Sequence[Path]) -> list[str]:
    """What traces are called: their files' names, with their folders' where these repeat."""
    for names in ([file.stem for file in files], [f"{file.absolute().parent.name}/{file.stem}" for file in files]):
        if len(set(names)) == len(names):
            return names
    raise MoELensError(f"traces are told by the names of files and their folders, which repeat: {', '.join(names)}")


def measure_traces(traces: Traces, asked: Asked, model: str, out: Path) -> None:
    """Writes a table for each measure that needs routing alone, and the page of all."""
    if asked.saved or asked.against is not None:
        raise MoELensError("a trace cannot be put under another model or intervention; give --trace several times")
    unmeasured = [name for name in asked.names() if name in (WEIGHTS, ROUTING) or MEASURES[name].reads == "weights"]
    names = [name for name in asked.names() if name not in unmeasured]
    if unmeasured and not asked.lenient:
        raise MoELensError(f"{', '.join(unmeasured)} needs the model itself; leave it out with --trace")
    if asked.lenient:
        names = asked.possible(names, traces.as_lens, next(iter(traces.examples.values()))[0])
    facts = traces.facts | {"what": names, "positions": asked.positions, "lenient": asked.lenient}
    made_by = provenance(model=model, facts=facts)
    claim(out, made_by)
    measuring = Measuring(names, asked.positions, out, made_by, asked.lenient)
    for name, requests in traces.examples.items():
        measuring.measure(traces.as_lens, AS_IS, name, requests, made_by)
    Kept(measuring, [AS_IS], list(traces.requests), traces.model.architecture.n_experts).leave()


def compare_traces(traces: Traces, model: str, out: Path, *, seed: int = 0) -> None:
    """Writes and shows what two traces of the same prompts select differently."""
    first, second = traces.requests
    made_by = provenance(model=model, seed=seed, facts=traces.facts | {"compared": [first, second]})
    claim(out, made_by)
    tables = trace_agreement(*traces.requests.values(), seed=seed)
    console.show(tables["agreement"], title=f"{first} and {second}, by layer")
    files = {f"{name}-of-traces.parquet": table for name, table in tables.items() if len(table)}
    for file, table in files.items():
        write_table(table, out / file, made_by)
    if not len(tables["near_ties"]):
        console.note("neither trace tells margins, which `measure --what routing` does: near ties are left out")
    apart = tables["divergence"].query("first >= 0")
    console.say(f"{len(apart)} of {len(tables['divergence'])} requests have a token with another expert")
    page = build_report(out, title=f"{first} and {second}")
    console.say(f"written to {out}: {', '.join([*files, page.name])}")
