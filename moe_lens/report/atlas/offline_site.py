"""The atlas as files: index.html, and beside it the data that its pages load from the disk."""

import html
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.report.atlas.expert_pages import ExpertPages, records, short
from moe_lens.report.atlas.run_numbers import RunNumbers
from moe_lens.storage import as_json, write_bytes

FOLDER = "atlas"
SHARD = 60_000
"""Characters of tokens' data in one file, about."""
Measure = dict[str, Any]


def write_atlas(
    tables: Mapping[str, pd.DataFrame],
    out: Path,
    made_by: Mapping[str, Any],
    *,
    about: str,
    runs: Mapping[str, RunNumbers] | None = None,
) -> Path:
    """Writes index.html and atlas/ into a folder, and returns the page's path; the same tables give the same bytes.

    tables: by name, as the command makes them. made_by: their provenance, shown at the foot. about: the model in words.
    runs: by name, numbers of single experts. It loads nothing from elsewhere, and shows all text as text.
    """
    pages, folder = ExpertPages(tables, runs or {}), out / FOLDER
    title = f"Atlas of the experts of {made_by['model']}"
    for (layer, expert), page in pages:
        _write(folder, f"expert-{layer}-{expert}", page)
    listed = []
    for number, (shard, entries) in enumerate(_shards(tables.get("tokens"))):
        _write(folder, f"tokens-{number}", shard)
        listed += [[*entry, number] for entry in entries]
    _write(folder, "tokens", listed)
    experts = tables["rates"].groupby("layer")["expert"].max() + 1
    shared = {
        "title": title,
        "about": about,
        "layers": [int(layer) for layer in experts.index],
        "experts": int(experts.max()),
        "data": [str(name) for name in tables["rates"]["data"].unique() if name],
        "measures": list(_measures(tables, pages)),
        "left_out": records(tables["left_out"], "name reason"),
        "made_by": as_json(made_by, indent=2),
    }
    _write(folder, "shared", shared)
    for name in ("atlas.css", "parts.js", "expert.js", "atlas.js"):
        write_bytes(folder / name, (files("moe_lens.report.atlas") / name).read_bytes())
    index = (files("moe_lens.report.atlas") / "index.html").read_text(encoding="utf-8")
    write_bytes(out / "index.html", index.replace("TITLE", html.escape(title)).encode())
    return out / "index.html"


def _write(folder: Path, name: str, data: Any) -> None:
    """Data as a script, since a page that is opened from a disk may read scripts only."""
    content = as_json(data).replace("<", "\\u003c")  # nor would it end a script element that holds it
    write_bytes(folder / f"{name}.js", f'take("{name}",{content});\n'.encode())


def _measures(tables: Mapping[str, pd.DataFrame], pages: ExpertPages) -> Iterator[Measure]:
    """What the grid is coloured by: a name, a sentence, and a value of each expert."""
    rates = tables["rates"]
    every, own = rates[rates["data"] == ""], rates[rates["data"] != ""]
    yield _measure(pages, "rate", "Share of tokens that take the expert, all data together", every, "rate")
    if own["data"].nunique() > 1:
        for name, part in own.groupby("data", sort=False):
            yield _measure(pages, f"rate on {name}", f"Share of the tokens of {name} that take it", part, "rate")
        spread = own.groupby(["layer", "expert"])["rate"].agg(lambda part: part.max() - part.min()).reset_index()
        yield _measure(pages, "spread", "Highest minus lowest rate over the data sets", spread, "rate")
    yield _measure(pages, "weight", "Mean gating weight where it is taken", every, "weight")
    yield _measure(pages, "first", "Of its tokens the share in which it has the highest weight", every, "first")
    if "saliency" in tables:
        about = "REAP: mean of gating weight times norm of its output, over the tokens that take it"
        yield _measure(pages, "reap", about, tables["saliency"], "reap")
    if "baseline" in tables:
        for name, what in (("token", "the token alone tells"), ("bigram", "the token and the one before it tell")):
            about = f"Share of the variance of its use that {what}, in other examples"
            yield _measure(pages, f"told by the {name}", about, tables["baseline"], name)
    for run, numbers in pages.runs.items():
        for name, part in numbers.scores.groupby("name", sort=False):
            yield _measure(pages, f"{run}: {name}", f"The score {name} of the run {run}", part, "score")


def _measure(pages: ExpertPages, name: str, about: str, table: pd.DataFrame, column: str) -> Measure:
    values = table.set_index(["layer", "expert"])[column]
    return {"name": name, "about": about, "values": [short(values.get(key)) for key in pages.experts]}


def _shards(tokens: pd.DataFrame | None) -> Iterator[tuple[dict[str, Any], list[list[Any]]]]:
    """The tokens' data in parts of a size that loads at once: which experts each goes to, and its entry in the list.

    Of a token, by layer: expert and selections, in turn. An entry: token_id, text, occurrences.
    """
    shard: dict[str, Any] = {}
    entries: list[list[Any]] = []
    size = 0
    for token, rows in [] if tokens is None else tokens.groupby("token_id"):
        by_layer = {
            int(layer): part[["expert", "selected"]].to_numpy().ravel().tolist()
            for layer, part in rows.groupby("layer")
        }
        entries.append([int(token), str(rows["text"].iloc[0]), int(rows["tokens"].iloc[0])])
        shard[str(token)] = by_layer
        size += 5 * 2 * len(rows)
        if size > SHARD:
            yield shard, entries
            shard, entries, size = {}, [], 0
    if shard:
        yield shard, entries
