"""From a name, folder, hub id or module to a causal language model and its tokenizer."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from moe_lens.architecture.quantized import LOADED_IN_FULL, quantization_method
from moe_lens.architecture.remote_code import load_remote, prepare_remote
from moe_lens.architecture.whole_weights import load_whole
from moe_lens.errors import MODEL_CRASHES, MoELensError
from moe_lens.storage import DIGESTS_FILE, check_digests, nameable

ENGLISH = "english"
"""The name of the model that `make english` makes of a dense one, on this machine."""
ORGANISM_VARIANTS = {"organism": "conflict", "organism:conflict": "conflict", "organism:planted": "planted"}

LFS_POINTER = b"version https://git-lfs"
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
"""Files of a model's folder that are JSON objects."""
NO_FOLDER = "there is no such folder"
ELSEWHERE = "pass tokenizer= where it lies elsewhere"
PLACED_BY_TRANSFORMERS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What a device_map may say instead of a device; one of several parts may say "disk" too."""


def resolve(name: str | Path) -> str:
    """The folder of a packaged model ("organism", "organism:planted") or of "english"; any other name as it is."""
    nameable(name)
    if str(name) == ENGLISH and not Path(name).exists():
        return _made_here()
    variant = ORGANISM_VARIANTS.get(str(name))
    meant = str(name).startswith("organism:") or get_close_matches(str(name), ORGANISM_VARIANTS, cutoff=0.8)
    if variant is None and meant and not Path(name).exists():
        raise MoELensError(f"the packaged models are {', '.join(ORGANISM_VARIANTS)}; got {str(name)!r}")
    return str(name) if variant is None else _packaged(variant)


def _english() -> Path:
    """The folder into which `make english` makes its model, in the user's cache."""
    return Path(os.environ.get("MOE_LENS_CACHE") or Path.home() / ".cache" / "moe_lens") / ENGLISH


def _made_here() -> str:
    """The folder of the model that `make english` made; MoELensError where there is none."""
    folder = _english() / "model"
    if not (folder / DIGESTS_FILE).exists():
        raise MoELensError(
            f"{ENGLISH!r} is a small real language model that is split into experts on your own machine, and there is "
            f"none in {_english()}; `make {ENGLISH}` makes it (python -m moe_lens.organism.split --help says how)"
        )
    return _whole(folder)


@cache
def _whole(folder: Path) -> str:
    """The folder of what `make english` made, read through once; MoELensError where it is not as it was."""
    check_digests(folder, remedy=f"remove {folder.parent} and run `make {ENGLISH}` again")
    return str(folder)


@cache
def _packaged(variant: str) -> str:
    """The folder of a packaged model; MoELensError where its files are not as they were published."""
    folder = Path(str(files("moe_lens") / "organism" / "weights" / variant))
    check_digests(folder, remedy="install moe_lens anew")
    return str(folder)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None,
    device_map: Any,
    trust_remote_code: bool = False,
    distributed_config: Any = None,
) -> nn.Module:
    """The causal language model of a name, folder or hub id, in evaluation mode.

    dtype: None for the checkpoint's own. device_map: as in transformers; None for the CPU.
    trust_remote_code: run the Python code that lies beside the weights, where there is some. distributed_config: as in
    transformers, of a model that all processes hold together.

    Raises MoELensError if there is no such model or no such device, if a package that the model's code needs is
    missing, or if a weight is.
    """
    given = {"dtype": dtype, "device_map": device_map, "distributed_config": distributed_config}
    chosen = {key: value for key, value in given.items() if value is not None}
    folder = resolve(name)
    _check_devices(device_map)
    with _bad_input_explained(name):
        if trust_remote_code:
            return load_remote(folder, **chosen)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if (method := quantization_method(config)) in LOADED_IN_FULL:
            warnings.warn(f"{name} is quantised ({method}); it is loaded in full precision, and larger", stacklevel=2)
            config.quantization_config["dequantize"] = True
        return load_whole(folder, config=config, trust_remote_code=False, **chosen)


def expect_model(name: str | Path) -> None:
    """MoELensError unless a name, folder or hub id has a model's configuration; neither weights nor code are read."""
    with _bad_input_explained(name):
        PretrainedConfig.get_config_dict(resolve(name))


def _check_devices(device_map: Any) -> None:
    """MoELensError for a device in `device_map` that is not there."""
    there = ["cpu"]
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None:
        there += [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
    in_parts = isinstance(device_map, dict)
    for asked in device_map.values() if in_parts else [device_map]:
        if asked is None or asked in PLACED_BY_TRANSFORMERS or (in_parts and asked == "disk"):
            continue
        try:
            device = torch.device(asked)
        except RuntimeError:
            device = None
        if device is None or f"{device.type}:{device.index or 0}" not in [*there, "cpu:0", "meta:0"]:
            raise MoELensError(f"there is no device {str(asked)!r} here; there is {', '.join(there)}")


def load_skeleton(name: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model of a name, folder or hub id on the meta device: its modules without weights; MoELensError for none.

    Only its configuration is read, and with `trust_remote_code` its code run, so that it takes seconds at any size.
    """
    folder = resolve(name)
    with _bad_input_explained(name), prepare_remote(folder) if trust_remote_code else nullcontext():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        chosen = {} if dtype is None else {"dtype": dtype}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **chosen)
    return cast(nn.Module, model.eval())


@contextmanager
def _bad_input_explained(name: str | Path) -> Iterator[None]:
    """Inside the block, what transformers says of a name that it cannot load becomes a MoELensError."""
    try:
        yield
    except MoELensError:
        raise
    except ImportError as error:
        raise MoELensError(f"{str(name)!r} needs a package that is not installed: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, EOFError, UnpicklingError, SafetensorError, StrictDataclassError, *MODEL_CRASHES) as error:
        if "trust_remote_code" in str(error):
            raise MoELensError(
                f"{str(name)!r} brings Python code of its own, which is not run unless you ask for it; read the code, "
                "then pass trust_remote_code=True (on a command line: --trust-remote-code)"
            ) from error
        raise MoELensError(f"cannot load {str(name)!r}: {_why(name, error)}") from error


def _why(name: str | Path, error: Exception) -> str:
    """Why a name cannot be loaded: it names no folder, or one that is no model's, or what transformers says of it."""
    text = str(name)
    if (folder := Path(resolve(name))).is_dir():
        if not (folder / "config.json").exists():
            return "it is a folder without a model's config.json"
        if (damaged := _damaged_file(folder)) is not None:
            return damaged
        if isinstance(error, OSError) or type(error) is ValueError:
            return str(error)
        return (
            f"{type(error).__name__}: {error}; correct what its config.json or generation_config.json says, or take a "
            "copy of the model that is whole"
        )
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        return NO_FOLDER
    known = ", ".join(ORGANISM_VARIANTS)
    return f"there is no such folder here, it is no packaged model ({known}), and of the hub transformers says: {error}"


def _damaged_file(folder: Path) -> str | None:
    """What is wrong with the first file of a model's folder that is none of its kind; None where all are."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json", ".bin", ".model") or not path.is_file():
            continue
        with path.open("rb") as file:
            begins = file.read(len(LFS_POINTER))
        if begins == LFS_POINTER:
            return f"{path} is a Git LFS pointer in place of the file itself; fetch it with `git lfs pull`"
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.name in OBJECTS and not isinstance(json.loads(path.read_bytes()), dict):
                return f"{path} is no JSON object; take a copy of the model that is whole"
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            return f"{path} is cut short or damaged ({error}); take a copy of it that is whole"
    return None


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a name, folder or hub id; MoELensError if there is none."""
    folder = resolve(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ImportError, StrictDataclassError, *MODEL_CRASHES) as error:
        why = _why(name, error)
        if why == NO_FOLDER:
            raise MoELensError(f"cannot load {str(name)!r}: {why}") from error
        raise MoELensError(f"no tokenizer at {str(name)!r}: {why}; {ELSEWHERE}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes up for no file
        raise MoELensError(f"no tokenizer at {str(name)!r}: it has no files of one; {ELSEWHERE}")
    return tokenizer
