"""The processes that train one model together: each takes its share of every step, on its own device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moe_lens.errors import MoELensError
from moe_lens.lens.parallel import connected, from_first_process, is_alone

SYNC = "forward_sync_buffers"  # as torch 2.13 calls broadcast_buffers
NO_SYNC: dict[str, Any] = {
    SYNC if SYNC in signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}
"""Buffers are not sent around at every step: they are the same everywhere and do not learn."""


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them.

    rank: its number, from 0. count: how many there are. device: its own.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def current(cls) -> "Processes":
        """What the launcher set up; the first call connects the processes. One that works alone is the only one.

        Raises MoELensError if they were left unconnected by another's first call, since each would train on its own.
        """
        state = connected()
        if is_alone():
            return cls(0, 1, state.device)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def splits(self, blocks: Sequence[str]) -> bool:
        """Whether `share` splits a model, which takes blocks and more than one process."""
        return self.count > 1 and bool(blocks)

    def share(self, module: nn.Module, blocks: Sequence[str]) -> nn.Module:
        """What to call instead of `module`, so that gradients are averaged over the processes.

        blocks: paths of the layers whose parameters are split over the processes and gathered when they run (FSDP2);
            none to keep a whole copy in each (DDP). What is split is what the first process holds, which gives the
            others their parts, one tensor at a time.
        """
        if self.count == 1:
            return module
        if not blocks:  # an expert that is a module of its own may be without tokens in a step
            return DistributedDataParallel(module, find_unused_parameters=True, **NO_SYNC)
        held = _tensors(module) if self.is_main else {}
        empty(module)
        for path in blocks:
            fully_shard(module.get_submodule(path))
        fully_shard(module)
        module.to_empty(device=self.device)
        for name, tensor in _tensors(module).items():
            self._hand_out(held.pop(name) if self.is_main else None, tensor)
        return module

    def _hand_out(self, value: Tensor | None, target: Tensor) -> None:
        """Gives each process its part of the first one's `value`; the others have None."""
        if value is None:
            value = torch.empty(target.shape, dtype=target.dtype, device=self.device)
        value = value.detach().to(self.device).contiguous()
        if not isinstance(target, DTensor):
            dist.broadcast(value, 0)
        put(target, value)

    def match_first(self, module: nn.Module) -> None:
        """Gives a module that has shapes only the dtypes of the first process's, which is whole.

        Raises MoELensError, in all processes, where the modules differ, or that of the first is not whole.
        """
        mine = _tensors(module)
        told = from_first_process(lambda: {name: (own.shape, own.dtype, own.is_meta) for name, own in mine.items()})
        wrong = {name for name, (_, _, is_meta) in told.items() if is_meta}
        wrong |= {name for name, (shape, _, _) in told.items() if name not in mine or mine[name].shape != shape}
        wrong |= mine.keys() - told.keys()
        if any(self.sums(len(wrong))):
            name = min(wrong, default="a tensor of another process")
            there, here = told[name][0] if name in told else None, mine[name].shape if name in mine else None
            raise MoELensError(
                "to be split, a model has to be whole in the first process's memory and of the same shapes in all; "
                f"{name} is not (there {there}, here {here}): open one model in all, in the first without a device_map "
                "that keeps parts on a disk"
            )
        for name, tensor in mine.items():
            tensor.data = tensor.data.to(told[name][1])

    def sums(self, *values: float) -> list[float]:
        """The values, each summed over the processes."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, those that have several once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def whole(tensor: Tensor) -> Tensor:
    """A copy of the tensor on the CPU, put together where it is split; then all processes have to ask for it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True).contiguous()


def put_together(module: nn.Module, *, keep: bool) -> None:
    """Gives a split module whole tensors on the CPU if it is to `keep` them, else ones that have only a shape.

    All processes have to ask for it, one tensor after another, so that only those who keep it need the memory.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a forward pass alone the outermost one's are still whole, as they were then

    def gathered(tensor: Tensor) -> Tensor:
        if keep:
            return whole(tensor)
        return _shape(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    _exchange(module, gathered)


def empty(module: nn.Module) -> None:
    """Leaves of a module only shapes; unlike `put_together`, no other process has to be there."""
    _exchange(module, _shape)


def _shape(tensor: Tensor) -> Tensor:
    """The tensor, whole, without values."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _exchange(module: nn.Module, other: Callable[[Tensor], Tensor]) -> None:
    """Puts others in the places of a module's parameters and buffers; those that are one in several places stay one."""
    places: list[tuple[nn.Module, str, str, Tensor | None]] = []
    places += [(part, "_parameters", name, own) for part in module.modules() for name, own in part._parameters.items()]
    places += [(part, "_buffers", name, own) for part in module.modules() for name, own in part._buffers.items()]
    made: dict[int, Tensor] = {}
    for part, kind, name, own in places:
        if own is None:
            continue
        if id(own) not in made:
            value = other(own.detach())
            made[id(own)] = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
        getattr(part, kind)[name] = made[id(own)]
    for part in module.modules():
        part._state_dict_pre_hooks.clear()  # FSDP2's would put the split tensors back


def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into a tensor that may be split over the processes."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def values(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The tensors by name, whole, on the CPU; all processes have to ask for it, those too that do not `keep` any."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value
    return found


def training_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: bool
) -> dict[str, Tensor]:
    """`values` of the parameters, by name, and of what the optimizer knows of each."""
    known = {
        f"optimizer.{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return values({**parameters, **known}, keep=keep)


def restore_training_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Puts what `training_state` gave back in its places."""
    for name, parameter in parameters.items():
        put(parameter, state[name])
        known = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = state.get(f"optimizer.{key}.{name}")
            if value is not None:
                known[key] = value.to(parameter.device) if key == "step" else torch.zeros_like(parameter)
                if key != "step":
                    put(known[key], value)
        if known:
            optimizer.state[parameter] = known
