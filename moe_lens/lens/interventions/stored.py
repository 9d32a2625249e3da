"""Interventions in a folder: settings as JSON, tensors as safetensors, and where they come from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.results import provenance, write_bytes, write_json

FACTS_FILE = "intervention.json"
TENSORS_FILE = "intervention.safetensors"


def write_folder(value: Any, digest: str, folder: str | Path, made_by: Mapping[str, Any] | None) -> None:
    """Write an intervention of this package to `folder`; MoELensError for what no file can hold."""
    tensors: dict[str, Tensor] = {}
    told = _told(value, tensors)
    content = save(tensors)
    facts = {
        "intervention": told,
        "digest": digest,
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
        "made_by": dict(made_by) if made_by is not None else provenance(model="not said"),
    }
    write_bytes(Path(folder) / TENSORS_FILE, content)
    write_json(Path(folder) / FACTS_FILE, facts)


def read_folder(folder: str | Path, kinds: Mapping[str, type]) -> tuple[Any, str]:
    """What `write_folder` wrote, made of the classes `kinds` by name, and its digest then.

    Raises MoELensError for a folder without one, and for tensors that are not those that were written.
    """
    path = Path(folder) / FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        content = (Path(folder) / TENSORS_FILE).read_bytes()
        told, digest, sha256 = facts["intervention"], facts["digest"], facts["tensors_sha256"]
        if hashlib.sha256(content).hexdigest() != sha256:
            raise MoELensError(f"{folder} is damaged: its tensors are not those that were saved; save it again")
        return _made(told, load(content), kinds), digest
    except (OSError, ValueError, RecursionError, SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise MoELensError(
            f"expected a saved intervention, a folder with {FACTS_FILE} and {TENSORS_FILE}, at {str(folder)!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _told(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors are put into `tensors` by name."""
    match value:
        case np.generic():
            return value.item()
        case None | bool() | int() | float() | str():
            return value
        case Tensor() | np.ndarray():
            name = f"t{len(tensors)}"
            tensors[name] = torch.as_tensor(value).detach().cpu().contiguous().clone()
            return {"tensor": name}
        case ExpertSet():
            return {"experts": str(value)}
        case tuple() | list():
            return {"sequence": [_told(inner, tensors) for inner in value]}
        case Mapping():
            return {"mapping": [[_told(key, tensors), _told(inner, tensors)] for key, inner in value.items()]}
        case _ if is_dataclass(value) and type(value).__module__.startswith(__package__) and _is_plain(value):
            held = {field.name: _told(getattr(value, field.name), tensors) for field in fields(value) if field.init}
            return {"kind": type(value).__name__, "held": held}
    raise MoELensError(_unsavable(value))


def _is_plain(value: Any) -> bool:
    """Whether it holds nothing that is open only while a program runs, such as a lens."""
    return not hasattr(value, "records")


def _unsavable(value: Any) -> str:
    """Why a value cannot be saved, and what to do."""
    if not _is_plain(value):
        return (
            "a run of a lens cannot be saved, since its values are made while a batch runs; save what it is under and "
            "which examples it has, or, for a mean over examples, SetTo(mean_values(…))"
        )
    return (
        f"only interventions of this package can be saved, and numbers, texts, tensors and experts in them; got "
        f"{type(value).__module__}.{type(value).__qualname__}: keep its code, and save what it is made of"
    )


def _made(told: Any, tensors: Mapping[str, Tensor], kinds: Mapping[str, type]) -> Any:
    """The value that `_told` made JSON of."""
    if not isinstance(told, dict):
        return told
    match told:
        case {"tensor": name}:
            return tensors[name]
        case {"experts": text}:
            return ExpertSet.parse(text)
        case {"sequence": inner}:
            return tuple(_made(one, tensors, kinds) for one in inner)
        case {"mapping": pairs}:
            return {_made(key, tensors, kinds): _made(one, tensors, kinds) for key, one in pairs}
        case {"kind": name, "held": held}:
            if name not in kinds:
                raise MoELensError(f"there is no intervention {name!r}; expected one of {', '.join(sorted(kinds))}")
            return kinds[name](**{key: _made(one, tensors, kinds) for key, one in held.items()})
    raise MoELensError(f"a saved intervention holds {told!r:.80}, which says nothing; save it again")
