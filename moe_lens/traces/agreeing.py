"""How far two traces of the same prompts agree: by layer, by how near the choice was, and from which token on not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.lens.record import UNTOLD
from moe_lens.metrics.resampling import ratio_interval
from moe_lens.traces.request import Request

BINS = 10
"""Into which the tokens of a layer fall by their margin, equally many in each."""


@dataclass(frozen=True, eq=False)
class Compared:
    """One prompt in both traces, at the tokens that both ran alike.

    shared: how many of a token's experts are the same, [token, layer]; k: of so many. margins: [token, layer], of the
    trace that tells them, None where neither does. said_alike: generated tokens until the first unlike one.
    """

    id: str
    layers: tuple[int, ...]
    shared: np.ndarray
    k: int
    margins: np.ndarray | None
    said_alike: int


def trace_agreement(first: Sequence[Request], second: Sequence[Request], *, seed: int = 0) -> dict[str, pd.DataFrame]:
    """What two engines, dtypes or quantisations of one model select differently, as tables by name.

    "agreement", a row per layer: tokens, agreement (the mean share of a token's experts that are the same) and exact
    (the share of tokens of which all are), each with its 95 % interval over requests in _low and _high, and expected,
    the agreement of random choices. "near_ties", a row per layer and tenth of its tokens by margin (see `Request`):
    margin_low, margin_high, tokens, unlike (the share of which an expert differs); no rows where neither trace tells
    margins. "divergence", a row per request: tokens (compared), said_alike (generated tokens before the first that
    differs), first (the first token at which an expert differs, from 0; -1 for none) and layer (the lowest there).

    Requests are matched by their prompts' tokens, or by id where no ids are told, and compared up to the first
    generated token that differs. Raises MoELensError for other prompts, layers or numbers of experts.
    """
    pairs = [_compared(one, other) for one, other in _matched(first, second)]
    if len({pair.layers for pair in pairs}) > 1:
        raise MoELensError("expected requests of one model; these have experts of different layers")
    tables = {"agreement": _by_layer(pairs, first[0].n_experts, seed), "near_ties": _by_margin(pairs)}
    return tables | {"divergence": pd.DataFrame([_divergence(pair) for pair in pairs])}


def _matched(first: Sequence[Request], second: Sequence[Request]) -> list[tuple[Request, Request]]:
    """The requests of one prompt in both, in the first one's order."""
    ours, theirs = _by_prompt(first), _by_prompt(second)
    alone = [mine[key] for mine, its in ((ours, theirs), (theirs, ours)) for key in mine if key not in its]
    if alone:
        raise MoELensError(
            f"expected two traces of the same prompts; {len(alone)} requests are in one only, such as {alone[0].id!r}: "
            "serve the same prompts, and compare what was served with the same template and tokenizer"
        )
    return [(one, theirs[key]) for key, one in ours.items()]


def _by_prompt(requests: Sequence[Request]) -> dict[object, Request]:
    """Requests by what tells them from others in a trace: their prompt and how often it came before."""
    found: dict[object, Request] = {}
    times: dict[object, int] = {}
    for request in requests:
        key: object = request.id if UNTOLD in request.tokens else request.prompt
        times[key] = times.get(key, 0) + 1
        found[key, times[key]] = request
    return found


def _compared(first: Request, second: Request) -> Compared:
    if (first.layers, first.n_experts, first.experts.shape[2]) != (
        second.layers,
        second.n_experts,
        second.experts.shape[2],
    ):
        raise MoELensError(f"request {first.id!r} has other layers, or numbers of experts, in the two traces")
    unlike = (n for n, (one, other) in enumerate(zip(first.tokens, second.tokens, strict=False)) if one != other)
    alike = next(unlike, min(len(first.tokens), len(second.tokens)))
    count = min(alike, first.told, second.told)
    one, other = (request.experts[:count] for request in (first, second))
    shared = (one[..., :, None] == other[..., None, :]).any(-1).sum(-1)
    margins = next((own.margins[:count] for own in (first, second) if own.margins is not None), None)
    said = alike - first.prompt_length
    return Compared(first.id, first.layers, shared, one.shape[-1], margins, said)


def _by_layer(pairs: Sequence[Compared], n_experts: int, seed: int) -> pd.DataFrame:
    tokens = np.array([len(pair.shared) for pair in pairs])
    k, rows = pairs[0].k, []
    sums: Mapping[str, np.ndarray] = {  # [request, layer]
        "agreement": np.stack([pair.shared.sum(0) / k for pair in pairs]),
        "exact": np.stack([(pair.shared == k).sum(0) for pair in pairs]).astype(np.float64),
    }
    for place, layer in enumerate(pairs[0].layers):
        row: dict[str, float] = {"layer": layer, "requests": len(pairs), "tokens": int(tokens.sum())}
        for name, values in sums.items():
            low, high = ratio_interval(values[:, place], tokens, seed=seed)
            row |= {name: values[:, place].sum() / tokens.sum(), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row | {"expected": k / n_experts})
    return pd.DataFrame(rows)


def _by_margin(pairs: Sequence[Compared]) -> pd.DataFrame:
    known = [pair for pair in pairs if pair.margins is not None]
    columns = ["layer", "bin", "margin_low", "margin_high", "tokens", "unlike"]
    if not known:
        return pd.DataFrame(columns=columns)
    margins = np.concatenate([pair.margins for pair in known if pair.margins is not None])  # [token, layer]
    unlike = np.concatenate([pair.shared < pair.k for pair in known])
    rows = []
    for place, layer in enumerate(known[0].layers):
        order = margins[:, place].argsort(kind="stable")
        for number, own in enumerate(np.array_split(order, BINS)):
            if len(own):
                ends = margins[own[[0, -1]], place].tolist()
                rows.append((layer, number, *ends, len(own), unlike[own, place].mean()))
    return pd.DataFrame(rows, columns=columns)


def _divergence(pair: Compared) -> dict[str, object]:
    places = np.argwhere(pair.shared < pair.k)
    first, place = places[0].tolist() if len(places) else (-1, -1)
    layer = pair.layers[place] if len(places) else -1
    return {"id": pair.id, "tokens": len(pair.shared), "said_alike": pair.said_alike, "first": first, "layer": layer}
