"""The files in which engines leave what routers selected, each read as requests; docs/traces.md has their versions."""

import base64
import binascii
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.architecture import MoEArchitecture
from moe_lens.errors import MoELensError
from moe_lens.lens.record import UNTOLD
from moe_lens.rows_on_disk import parts_of
from moe_lens.storage import nameable
from moe_lens.traces.request import Request

Keys = tuple[str | int, ...]
"""Where a value is in JSON: names, and places in lists."""
EXPERTS: tuple[Keys, ...] = (
    *(("routed_experts",), ("choices", 0, "routed_experts"), ("outputs", 0, "routed_experts")),
    *(("meta_info", "routed_experts"), ("sglext", "routed_experts"), ("choices", 0, "sgl_ext", "routed_experts")),
)
PROMPT: tuple[Keys, ...] = (
    *(("prompt_token_ids",), ("input_ids",), ("choices", 0, "prompt_token_ids")),
    ("meta_info", "input_token_logprobs"),
)
SAID: tuple[Keys, ...] = (
    *(("token_ids",), ("output_ids",), ("choices", 0, "token_ids"), ("outputs", 0, "token_ids")),
    ("meta_info", "output_token_logprobs"),
)
NAMES: tuple[Keys, ...] = (("request_id",), ("id",), ("meta_info", "id"))
NUMPY = b"\x93NUMPY"


def read_requests(path: str | Path, architecture: MoEArchitecture) -> list[Request]:
    """The requests of a trace of this model: .jsonl of an engine or a tracer, .csv, or routing.parquet of our own.

    Raises MoELensError for what is none, is cut short, or holds what the model's routers cannot have selected.
    """
    path = Path(nameable(path))
    if not path.is_file():
        raise MoELensError(f"there is no trace {path}; expected a file, one of {', '.join(READERS)}")
    if path.suffix not in READERS:
        raise MoELensError(f"expected a trace that ends in one of {', '.join(READERS)}; got {path.name!r}")
    try:
        found = READERS[path.suffix](path, architecture)
    except MoELensError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MoELensError(
            f"{path} is no trace as docs/traces.md has them: {type(error).__name__}: {error}; look at its first lines"
        ) from error
    if not found:
        raise MoELensError(f"{path} holds no request")
    names = [one.id for one in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise MoELensError(f"requests are told by their ids; {twice!r} comes twice in {path}")
    return found


def _lines(path: Path, architecture: MoEArchitecture) -> list[Request]:
    """Requests of JSON lines: responses of an engine, one each, or a tracer's records of a step and layer."""
    objects = list(_objects(path))
    if objects and "top_indices" in objects[0]:
        return _steps(objects, architecture)
    return [_response(one, number, architecture) for number, one in enumerate(objects)]


def _objects(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise MoELensError(f"{path}, line {number} is cut short or no JSON: {error}") from None
            if not isinstance(found, dict):
                raise MoELensError(f"{path}, line {number}: expected a JSON object; got {type(found).__name__}")
            yield found


def _response(told: Mapping[str, Any], number: int, architecture: MoEArchitecture) -> Request:
    """A request of what an engine answered. number: its place, which is its id where it has none."""
    name = _at(told, NAMES)
    name = str(number) if name is None else str(name)
    if len(told.get("choices") or told.get("outputs") or ()) > 1:
        raise MoELensError(f"request {name!r} has several answers; ask for one each (n=1)")
    start = (told.get("meta_info") or {}).get("routed_experts_start_len", 0)
    if start:
        raise MoELensError(f"request {name!r} tells experts from token {start} on only; ask for all (…start_len=0)")
    experts, prompt = _at(told, EXPERTS), _at(told, PROMPT)
    if experts is None or prompt is None:
        what = "routed_experts" if experts is None else "prompt_token_ids"
        raise MoELensError(f"request {name!r} has no {what}; docs/traces.md says how engines are asked for it")
    before = told.get("prompt_routed_experts")
    parts = [_array(part, name, architecture) for part in (before, experts) if part is not None]
    ids, said = _ids(prompt, name), _ids(_at(told, SAID) or [], name)
    layers, own = _moe_layers(np.concatenate(parts), name, architecture)
    return Request(name, (*ids, *said), len(ids), layers, own, architecture.n_experts)


def _at(told: Any, several: Sequence[Keys]) -> Any:
    """The first of these values that is there; None without."""
    for keys in several:
        value = told
        for key in keys:
            inside = isinstance(value, Mapping) if isinstance(key, str) else isinstance(value, list)
            value = value[key] if inside and (not isinstance(value, Mapping) or key in value) and value else None
        if value is not None:
            return value
    return None


def _ids(told: Any, name: str) -> list[int]:
    """Token ids, also of [log-probability, id, text] for each."""
    ids = [one[1] if isinstance(one, list) and len(one) == 3 else one for one in told]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise MoELensError(f"request {name!r} has token ids that are no whole numbers: {str(ids)[:60]}")
    return ids


def _array(told: Any, name: str, architecture: MoEArchitecture) -> np.ndarray:
    """Experts [token, layer, k]: nested lists, or base64 of a .npy or of bare int32 of all layers."""
    try:
        if not isinstance(told, str):
            return np.array(told)
        content = base64.b64decode(told, validate=True)
        if content.startswith(NUMPY):
            found: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
            return found
        return np.frombuffer(content, dtype="<i4").reshape(-1, architecture.n_layers, architecture.top_k)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise MoELensError(
            f"request {name!r} has experts that are no [token, {architecture.n_layers} layers, {architecture.top_k}]: "
            f"{error}; the trace is truncated, or of another model"
        ) from None


def _moe_layers(experts: np.ndarray, name: str, architecture: MoEArchitecture) -> tuple[tuple[int, ...], np.ndarray]:
    """The MoE layers, and the experts in them of what is told of these alone or of all layers."""
    layers = architecture.moe_layers
    fits = experts.ndim == 3 and experts.shape[1] in (architecture.n_layers, len(layers))
    if not fits or experts.shape[2] != architecture.top_k:
        raise MoELensError(
            f"request {name!r}: expected experts [token, {architecture.n_layers} layers, {architecture.top_k}] (or its "
            f"{len(layers)} MoE layers); got {list(experts.shape)}: the trace is of another model, or ragged"
        )
    return layers, experts if experts.shape[1] == len(layers) else experts[:, list(layers)]


def _steps(records: Sequence[Mapping[str, Any]], architecture: MoEArchitecture) -> list[Request]:
    """A request for every step of a tracer that writes a record of each layer, without token ids."""
    own = [one for one in records if one.get("block", "decoder") == "decoder"]
    found = []
    for (rank, step), several in groupby(own, key=lambda one: (one.get("rank"), one.get("step"))):
        name = f"rank{rank}-step{step}"
        by_layer: dict[int, np.ndarray] = {}
        for one in several:
            rows = np.array(one["top_indices"])
            if rows.shape != (one.get("num_tokens"), one.get("topk")):
                raise MoELensError(
                    f"{name}, layer {one.get('layer')}: {list(rows.shape)} experts are not those it says"
                )
            by_layer[one["layer"]] = rows
        if tuple(sorted(by_layer)) != architecture.moe_layers or len({len(rows) for rows in by_layer.values()}) > 1:
            raise MoELensError(
                f"{name} has layers {sorted(by_layer)} with {[len(rows) for rows in by_layer.values()]} tokens; "
                f"expected {list(architecture.moe_layers)}, equally many: truncated, or of one pipeline stage"
            )
        experts = np.stack([by_layer[layer] for layer in architecture.moe_layers], 1)
        layers, experts = _moe_layers(experts, name, architecture)
        found.append(_without_ids(name, layers, experts, architecture))
    return found


def _without_ids(name: str, layers: tuple[int, ...], experts: np.ndarray, architecture: MoEArchitecture) -> Request:
    tokens = (UNTOLD,) * len(experts)
    return Request(name, tokens, len(tokens), layers, experts, architecture.n_experts)


def _activations(path: Path, architecture: MoEArchitecture) -> list[Request]:
    """The one request of a table with a row `layer,expert` for each selection, in the order of the run."""
    try:
        table = pd.read_csv(path, header=None, names=["layer", "expert"], comment="#")
        table = table[pd.to_numeric(table["layer"], errors="coerce").notna()].astype(np.int64)  # without a heading
    except (ValueError, pd.errors.ParserError) as error:
        raise MoELensError(f"{path} is no table of layer,expert: {error}") from None
    k, by_layer = architecture.top_k, {}
    for layer in architecture.moe_layers:
        own = table.loc[table["layer"] == layer, "expert"].to_numpy()
        if not len(own) or len(own) % k:
            raise MoELensError(f"{path}: layer {layer} has {len(own)} selections, no multiple of {k}: it is truncated")
        by_layer[layer] = own.reshape(-1, k)
    layers = architecture.moe_layers
    last, tokens = len(by_layer[layers[-1]]), len(by_layer[layers[0]])
    if last < tokens and len(layers) > 1:
        warnings.warn(
            f"{path}: the last layer was run at {last} of {tokens} tokens, those that are predicted from, and is left "
            "out",
            stacklevel=2,
        )
        layers = layers[:-1]
    if unlike := [layer for layer in layers if len(by_layer[layer]) != tokens]:
        raise MoELensError(f"{path}: layers {unlike} have another number of tokens than {tokens}: it is truncated")
    experts = np.stack([by_layer[layer] for layer in layers], 1)
    _expect_no_permutations(experts[:, 0], path, architecture.n_experts)
    return [_without_ids(path.stem, layers, experts, architecture)]


def _expect_no_permutations(experts: np.ndarray, path: Path, n_experts: int) -> None:
    """MoELensError for tokens that in turn take all experts there are: a sorted list that was read without its gaps."""
    tokens, k = experts.shape
    together = n_experts // k
    if together * k != n_experts or together < 2 or tokens < together:
        return
    groups = np.sort(experts[: tokens // together * together].reshape(-1, n_experts), axis=1)
    if (groups == np.arange(n_experts)).all():
        raise MoELensError(
            f"{path}: every {together} tokens after one another select all {n_experts} experts once, as no router "
            "does: the dump holds whole sorted lists in the place of their beginnings (a view was read without its "
            "gaps); mend the tool that wrote it"
        )


def _own_rows(path: Path, architecture: MoEArchitecture) -> list[Request]:
    """The requests of routing.parquet, which `measure --what routing` writes of all tokens of a data set."""
    table = pd.concat(list(parts_of(path)), ignore_index=True)
    sides = [name for name in ("variant", "data") if name in table and table[name].nunique() > 1]
    if sides:
        told = {name: table[name].unique().tolist() for name in sides}
        raise MoELensError(f"{path} holds several of {told}; a trace is of one: measure each into a folder of its own")
    return [_own_request(str(name), own, path, architecture) for name, own in table.groupby("id", sort=False)]


def _own_request(name: str, rows: pd.DataFrame, path: Path, architecture: MoEArchitecture) -> Request:
    layers, k = architecture.moe_layers, int(rows["rank"].max()) + 1
    rows = rows.sort_values(["position", "layer", "rank"])
    tokens = len(rows) // (len(layers) * k)
    whole = {"position": np.arange(tokens)[:, None, None], "layer": np.array(layers)[None, :, None]}
    whole["rank"] = np.arange(k)[None, None, :]
    shape = (tokens, len(layers), k)
    for column, values in whole.items():
        told = rows[column].to_numpy()
        if len(told) != tokens * len(layers) * k or (told.reshape(shape) != values).any():
            raise MoELensError(
                f"{path}: {name!r} has not all of its tokens, layers {list(layers)} and ranks: it is truncated, of "
                "another model, or was measured at other --positions than all"
            )
    arrays = {column: rows[column].to_numpy().reshape(shape) for column in ("expert", "weight", "token_id")}
    margins = rows["margin"].to_numpy().reshape(shape)[..., 0] if "margin" in rows else None
    ids = tuple(arrays["token_id"][:, 0, 0].tolist())
    told_of = {"weights": arrays["weight"].astype(np.float32), "margins": margins}
    return Request(name, ids, len(ids), layers, arrays["expert"], architecture.n_experts, **told_of)


READERS: dict[str, Callable[[Path, MoEArchitecture], list[Request]]] = {
    ".jsonl": _lines,
    ".csv": _activations,
    ".parquet": _own_rows,
}
"""How a trace is read, by the ending of its file."""
