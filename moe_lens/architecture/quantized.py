"""Weights that are not plain: quantised ones, of which some are loaded in full, and ones split over devices."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_lens.architecture.sites import ROUTER_NAMES
from moe_lens.errors import MoELensError

LOADED_IN_FULL = ("mxfp4", "fp8")
"""Methods of checkpoints that transformers can load in full precision, on any device."""
PLAIN_CLASSES = (Tensor, nn.Parameter)
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTIZED_MODULES = "transformers.integrations."


def quantization_method(config: Any) -> str | None:
    """The method by which a model's config says that it is quantised, None if it says nothing."""
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are its own: of a floating type, not packed, scaled or spread over devices."""
    return type(tensor) in PLAIN_CLASSES and type(tensor.data) in PLAIN_CLASSES and tensor.dtype in PLAIN_DTYPES


def is_parallel(model: nn.Module) -> bool:
    """Whether transformers split the model over processes by its tensor- or expert-parallel plan."""
    mesh = getattr(model, "_device_mesh", None)
    return mesh is not None and mesh.size() > 1 and (getattr(model, "_fsdp_size", None) or 1) == 1


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether transformers gave each process some experts whole, and not a part of every one."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def refuse_quantized_experts(model: nn.Module) -> None:
    """Raise MoELensError if any of `model` is split over devices, or routers or routed experts of it are quantised.

    What packed experts compute can be masked neither exactly nor verifiably, and some kernels choose and call them
    without the router's module or the experts' own, so that masking would do nothing.
    """
    split = next((name for name, tensor in model.named_parameters() if isinstance(tensor.data, DTensor)), None)
    if split is not None and not is_parallel(model):
        raise MoELensError(
            f"{split!r} is a DTensor, of which each process holds a part (FSDP); expected whole weights, or ones that "
            "transformers split by its tensor- or expert-parallel plan (distributed_config=). Open the model so, or "
            "with device_map='auto' (on a command line: --device auto), which puts whole layers on the devices"
        )
    for path, block in model.named_modules():
        if "experts" not in block._modules:
            continue
        for part in ("experts", *ROUTER_NAMES):
            if part in block._modules and (found := _not_plain(block._modules[part])):
                at = f"{path}.{part}".lstrip(".")
                raise MoELensError(
                    f"{at!r} is quantised: it has {found}; expected routers and routed experts of plain floating-point "
                    "numbers. Load the model in full precision (dtype=torch.bfloat16; for a checkpoint in mxfp4 or "
                    "fp8 its quantization config with dequantize=True), or quantise other parts only"
                )


def _not_plain(module: nn.Module) -> str | None:
    """What in a module is not plain, in words; None if all is."""
    for inner in module.modules():
        if type(inner).__module__.startswith(QUANTIZED_MODULES):
            return f"a {type(inner).__name__}"
    for name, tensor in module.named_parameters():
        if not is_plain(tensor) and not isinstance(tensor.data, DTensor):
            return f"{name} as {type(tensor).__name__} of {tensor.dtype}"
    return None
