"""Delta checkpoints: only the parameters in which a tuned model differs from its base."""

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.data.prompts import PromptTemplate
from moe_lens.data.templates import TEMPLATES
from moe_lens.errors import MoELensError
from moe_lens.lens.offloaded import expect_in_memory, stored
from moe_lens.storage import digest_of, nameable, read_sealed_json, write_bytes, write_sealed_json

TENSORS_FILE = "delta.safetensors"
FACTS_FILE = "delta.json"
TENSORS_DIGEST = "tensors_sha256"
"""The key, in the facts, of the digest of the tensors' whole file."""
NO_ROWS: Mapping[str, Sequence[int]] = MappingProxyType({})
SAMPLED = 4096
"""Of each parameter's values, about how many a `weights_digest` reads; more where an axis is longer."""


def fingerprint(module: nn.Module, names: Collection[str], rows: Mapping[str, Sequence[int]] = NO_ROWS) -> str:
    """sha256 over the named parameters' names, dtypes, shapes and values; before training, it tells the base.

    rows: of the parameters in which only these experts (along the first axis) count, their ids.
    Raises MoELensError for a name that is no parameter of `module`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_values(module, names, rows).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """sha256 over some values from every row and column of each parameter: tells models apart without reading all."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        sample = _sample(stored(module, name, parameter)).flatten().cpu().contiguous()
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_delta(
    module: nn.Module,
    names: Collection[str],
    folder: str | Path,
    *,
    facts: Mapping[str, Any],
    fingerprint: str,
    rows: Mapping[str, Sequence[int]] = NO_ROWS,
    base_digest: str | None = None,
) -> None:
    """Write the named parameters of `module` to `folder`, as `delta.safetensors` and `delta.json`.

    The facts hold a digest of the tensors' file and one of their own, so that damage to either is told.

    facts: JSON values that say how the tensors came about, such as method, base and seed.
    fingerprint: `fingerprint` of the same names and rows before training.
    rows: of the parameters in which only some experts changed, the ids of these, which alone are stored.
    base_digest: `weights_digest` of the whole model before training, to refuse a base that differs elsewhere.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _values(module, names, rows).items()}
    told = {**facts, "fingerprint": fingerprint}
    if rows:
        told["rows"] = {name: list(ids) for name, ids in rows.items()}
    if base_digest is not None:
        told["base_digest"] = base_digest
    content = save(tensors)
    told[TENSORS_DIGEST] = hashlib.sha256(content).hexdigest()
    write_bytes(Path(folder) / TENSORS_FILE, content)
    write_sealed_json(Path(folder) / FACTS_FILE, told)


def changed_parameters(folder: str | Path) -> list[str]:
    """The names of the parameters that a delta changes; MoELensError as from `read_facts`."""
    read_facts(folder)
    with safe_open(Path(folder) / TENSORS_FILE, "pt") as tensors:
        return sorted(tensors.keys())


def stored_parameters(folder: str | Path) -> int:
    """How many numbers a delta changes; MoELensError as from `read_facts`."""
    read_facts(folder)
    with safe_open(Path(folder) / TENSORS_FILE, "pt") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What `save_delta` was told, with the base's fingerprint.

    Raises MoELensError if `folder` holds no delta, or one of which any bit is not as `save_delta` wrote it.
    """
    path, tensors = Path(folder) / FACTS_FILE, Path(folder) / TENSORS_FILE
    if not nameable(path).exists():
        raise MoELensError(
            f"expected a delta checkpoint, a folder with {FACTS_FILE} and {TENSORS_FILE}, at {str(folder)!r}; there is "
            f"no {path}"
        )
    again = f"tune again into another folder, or take a copy of {folder} that is whole"
    facts = read_sealed_json(path, remedy=again)
    if digest_of(tensors) != facts.get(TENSORS_DIGEST):
        raise MoELensError(f"{tensors} is damaged, or not of {path}: its digest is not what that says; {again}")
    _check_facts(facts, path, again)
    return facts


def _check_facts(facts: Mapping[str, Any], path: Path, remedy: str) -> None:
    """MoELensError where facts that are read here are not what `save_delta` writes."""
    rows = facts.get("rows", {})
    of_rows = isinstance(rows, dict) and all(
        isinstance(ids, list) and ids and all(type(one) is int and one >= 0 for one in ids) for ids in rows.values()
    )
    right = {
        "rows": of_rows,
        "fingerprint": isinstance(facts.get("fingerprint"), str),
        "base_digest": isinstance(facts.get("base_digest", ""), str),
        "template": isinstance(facts.get("template", {}), dict),
    }
    if wrong := [name for name, is_right in right.items() if not is_right]:
        told = "; ".join(f"its {name} is {facts.get(name)!r:.80}" for name in wrong)
        raise MoELensError(f"{path} is not what moe_lens writes: {told}; {remedy}")


def apply_delta(
    module: nn.Module,
    folder: str | Path,
    *,
    template: PromptTemplate | None = None,
    layers: Collection[int] | None = None,
) -> dict[str, Any]:
    """Put a delta's tensors in place in `module`, which equals the tuned model then, and give back its facts.

    layers: put in place only what changed inside these decoder layers, by absolute index, such as some routers of a
        router tuning; None for all of the delta.
    template: how the model will be asked; where the delta was trained on prompts of another, a warning says so.
    Raises MoELensError, leaving `module` as it was, unless it is the delta's base in the dtype of training, and where
    processes hold parts of what it changes.
    """
    facts = read_facts(folder)
    tensors = load_file(Path(folder) / TENSORS_FILE)
    rows = facts.get("rows", NO_ROWS)
    _expect_whole(_parameters(module, tensors))
    own = _values(module, tensors, rows)
    misfits = [name for name in tensors if own[name].shape != tensors[name].shape]
    if misfits:
        name = misfits[0]
        raise MoELensError(
            f"the delta at {str(folder)!r} belongs to a model of another size: {name} is "
            f"{list(tensors[name].shape)} there and {list(own[name].shape)} here"
        )
    digest = facts.get("base_digest")
    if fingerprint(module, tensors, rows) != facts["fingerprint"] or digest not in (None, weights_digest(module)):
        kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        base = facts.get("model", "unknown")
        raise MoELensError(
            f"the delta at {str(folder)!r} was made from another base (it names {base!r}), from "
            f"other weights or in another dtype ({', '.join(sorted(kinds))}), or is applied already; "
            "load that base"
        )
    trained_with = facts.get("template")
    if template is not None and trained_with not in (None, template.facts()):
        warnings.warn(
            f"the delta at {str(folder)!r} was trained on prompts of another template than the model is asked with; "
            f"open it with {_told(trained_with)}",
            stacklevel=3,  # whoever opens the model
        )
    parameters = _parameters(module, tensors)
    wanted = tensors if layers is None else _inside(module, tensors, layers)
    with torch.no_grad():
        for name, tensor in wanted.items():
            parameters[name][_index(rows, name)] = tensor.to(parameters[name].device)
    return facts


@contextmanager
def with_delta(module: nn.Module, folder: str | Path, *, template: PromptTemplate | None = None) -> Iterator[None]:
    """Inside the block the module has this delta, as `apply_delta` puts it there; afterwards it is as before."""
    with restored(module, changed_parameters(folder)):
        apply_delta(module, folder, template=template)
        yield


@contextmanager
def restored(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """After the block these parameters of the module have the values from before it."""
    own = dict(module.named_parameters(remove_duplicate=False))
    before = {name: own[name].detach().clone() for name in names if name in own}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)


def _sample(parameter: Tensor) -> Tensor:
    """About SAMPLED of the values, at least one with each index along each axis; all where there are no more.

    They lie on a Korobov lattice: along each axis evenly, and with the axes in different orders.
    """
    if parameter.numel() <= SAMPLED:
        return parameter
    bits = (max(SAMPLED, *parameter.shape) - 1).bit_length()
    count = 1 << bits
    step = int(count * 0.618) | 1  # odd, so that its multiples pass through all of the power of two
    points = torch.arange(count)
    places = [
        (((points * pow(step, axis, count) & (count - 1)) * size) >> bits).to(parameter.device)
        for axis, size in enumerate(parameter.shape)
    ]
    return parameter[tuple(places)]


def _parameters(module: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    own = dict(module.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in own]
    if missing or not names:
        raise MoELensError(
            f"{type(module).__name__} has no parameters {missing[:3]}{' …' if len(missing) > 3 else ''}; "
            "expected names of its parameters, of a delta made from this base"
        )
    expect_in_memory(module, names, "a delta changes it in place")
    return {name: own[name] for name in names}


def _expect_whole(parameters: Mapping[str, Tensor]) -> None:
    """MoELensError for a parameter that is split over processes."""
    split = next((name for name, one in parameters.items() if isinstance(one.data, DTensor)), None)
    if split is not None:
        raise MoELensError(
            f"the delta changes {split}, of which each process holds a part; merge it into a whole model first "
            "(python -m moe_lens.tune --merge, or moe_lens.tuning.save_merged) and open that"
        )


def _index(rows: Mapping[str, Sequence[int]], name: str) -> list[int] | slice:
    """Where a delta's values of a parameter lie in it, along its first axis."""
    return list(rows[name]) if name in rows else slice(None)


def _values(module: nn.Module, names: Collection[str], rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The named parameters, or of those in `rows` these experts [expert, …] only."""
    parameters = _parameters(module, names)
    for name in rows:
        if name in parameters and max(rows[name]) >= len(parameters[name]):
            raise MoELensError(
                f"{name} has {len(parameters[name])} experts here; the delta has values of number {max(rows[name])}: "
                "it belongs to a model of another size"
            )
    return {name: parameter[list(rows[name])] if name in rows else parameter for name, parameter in parameters.items()}


def _inside(module: nn.Module, tensors: Mapping[str, Tensor], layers: Collection[int]) -> dict[str, Tensor]:
    """Those of the tensors that lie in these decoder layers; MoELensError for a layer in which none does."""
    paths = MoEArchitecture.of(module).layers
    found: dict[str, Tensor] = {}
    for layer in layers:
        path = f"{paths[layer]}." if layer in range(len(paths)) else None
        own = {name: tensor for name, tensor in tensors.items() if path is not None and name.startswith(path)}
        if not own:
            raise MoELensError(f"the delta changes nothing in layer {layer}; leave it out of layers={list(layers)}")
        found |= own
    return found


def _told(template: Any) -> str:
    """How to ask for the template of these texts."""
    for name, known in TEMPLATES.items():
        if known.facts() == template:
            return f"template={name!r}, on the command line --template {name}"
    told = {name: value for name, value in template.items() if name != "demonstrations"}
    shown = " with its demonstrations" if told != template else ""
    return f"template=PromptTemplate(**{told!r}){shown}"
