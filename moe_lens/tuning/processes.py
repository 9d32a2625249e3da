"""The processes that train one model together: each takes its share of every step, on its own device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moe_lens.lens.parallel import connected


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
        """What the launcher set up; the first call connects the processes.

        Raises MoELensError if they were left unconnected by another's first call, since each would train on its own.
        """
        state = connected()
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
            none to keep a whole copy in each (DDP).
        """
        if self.count == 1:
            return module
        if not blocks:  # an expert that is a module of its own may be without tokens in a step
            return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)
        for path in blocks:
            fully_shard(module.get_submodule(path))
        fully_shard(module)
        return module

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


def whole(tensor: Tensor) -> Tensor:
    """A copy of the tensor on the CPU, put together where it is split; then all processes have to ask for it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True).contiguous()


def put_together(module: nn.Module, *, keep: bool) -> None:
    """Gives a split module whole parameters on the CPU if it is to `keep` them, else ones that have only a shape.

    All processes have to ask for it, one parameter after another, so that only those who keep it need the memory.
    """
    for part in module.modules():
        part._state_dict_pre_hooks.clear()  # FSDP2's would put the split parameters back
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                value = whole(parameter)
                if keep:
                    part.register_parameter(name, nn.Parameter(value, requires_grad=False))
    if not keep:
        empty(module)


def empty(module: nn.Module) -> None:
    """Leaves of a split module only shapes; unlike `put_together`, no other process has to be there."""
    for part in module.modules():
        part._state_dict_pre_hooks.clear()
        for name, parameter in list(part.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            part.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.empty_like(buffer, device="meta")


def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into a tensor that may be split over the processes."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def training_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters, by name, and what the optimizer knows of each, as whole tensors on the CPU."""
    state = {name: whole(parameter) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        known = optimizer.state.get(parameter, {})
        state |= {f"optimizer.{key}.{name}": whole(value) for key, value in known.items()}
    return state


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
