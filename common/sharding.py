"""The network (model.py's GPT) on several processes: whole on each (DDP), or divided among them (FSDP2)."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.processes import World

# torch.distributed.fsdp and .tensor take a second to import, so they are imported only where something is divided

Value = TypeVar("Value")


class Loss(nn.Module):
    """The network's loss alone.

    A compiled model that returned the logits too would allocate zeros as large as they are for their gradient.
    """

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.gpt(idx, targets)[1]


def wrap(gpt: nn.Module, world: World, compile: bool, divide: bool, recompute: bool) -> nn.Module:
    """A module that computes the loss on this process's device, for several processes divided or whole on each."""
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, disable=not compile)
    if recompute:
        recompute_blocks(gpt)
    if divide and world.size > 1:
        for block in gpt.transformer.h:  # one by one: FSDP gathers weights between them
            block.forward = compiled(block.forward)
        head = gpt.logits_and_loss
        gpt.logits_and_loss = compiled(lambda hidden, targets: (None, head(hidden, targets)[1]))  # as in Loss
        shard(gpt, world)
        return Loss(gpt)
    model = compiled(Loss(gpt.to(world.device)))
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model


def recompute_blocks(gpt: nn.Module) -> None:
    """Let each block keep only its input for the backward pass, which computes the rest again."""
    for block in gpt.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(gpt: nn.Module, world: World) -> None:
    """Leave each process its rows of every weight, on its device; a block's weights are gathered while it is computed.

    Each process calls this with the same weights, on the CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))  # the default is the accelerator that torch was built for
    for block in gpt.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(gpt, mesh=mesh)  # the rest: the embedding is needed at both ends


def is_divided(value: object) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor


def gather(value: Value, device: torch.device) -> Value:
    """The whole of a divided tensor, on a device ("meta" drops it); any other value itself. All processes call this."""
    return value.full_tensor().to(device) if is_divided(value) else value


def gather_gpt(gpt: nn.Module, device: torch.device) -> nn.Module:
    """A whole copy, on a device, of a network that is divided; any other network itself. All processes call this."""
    weights = gpt.state_dict()
    if not is_divided(weights["lm_head.weight"]):
        return gpt
    with torch.device("meta"):
        whole = type(gpt)(gpt.config)  # of the class that FSDP has derived, which makes the original one
    whole.load_state_dict({name: gather(weight, device) for name, weight in weights.items()}, assign=True)
    whole.lm_head.weight = whole.transformer.wte.weight  # assigning unties them
    return whole


def divide_like(value: Value, parameter: Tensor) -> Value:
    """A whole tensor divided like the parameter whose shape it has; any other value as it is."""
    if not is_divided(parameter) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
