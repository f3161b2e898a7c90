"""Fully sharded data parallelism: each process keeps its part of weights, averages and optimizer state.

It is torch's ``fully_shard`` (FSDP2) itself, and not accelerate's, which knows it on GPUs alone: this way the
same code runs with gloo on CPUs. What is saved is whole tensors, as one process would save them.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, parts: list[nn.Module]) -> None:
    """Shard ``module`` over all processes; each of ``parts`` is gathered when it is computed, and let go."""
    device = next(module.parameters()).device.type
    # Every process draws its own weights; those of the main one count, as with DistributedDataParallel.
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(state: Any, keep: bool) -> Any:
    """A nested ``state`` with its sharded tensors gathered, on the CPU; all processes call it together.

    Processes that do not ``keep`` them get None in their place, one after the other, not all at once.
    """
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, dict):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def local(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves, or this process's parts, which share their memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in (u.detach() for u in tensors)]


def sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """The part of the whole ``tensor``, which every process has, as ``model`` is sharded."""
    if not isinstance(model, DTensor) or isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(model.device, model.dtype)
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
