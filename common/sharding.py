"""A network whose weights, gradients and moments are divided among the processes: PyTorch's FSDP2."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model import GPT

Value = TypeVar("Value")


def shard(gpt: GPT) -> None:
    """Leave each process its rows of every weight, on its device; a block's weights are gathered while it is computed.

    Each process calls this with the same weights, on the CPU.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # the logits, which stay as they are
    for block in gpt.transformer.h:
        fully_shard(block)
    fully_shard(gpt)  # the rest, of which the embedding is needed at both ends


def gather(value: Value, device: torch.device) -> Value:
    """The whole of a tensor that is divided, on a device ("meta" drops it); any other value as it is.

    All processes call this.
    """
    return value.full_tensor().to(device) if isinstance(value, DTensor) else value


def gather_gpt(gpt: GPT, device: torch.device) -> GPT:
    """A whole copy, on a device, of a network that is divided; any other network itself. All processes call this."""
    if not isinstance(gpt, FSDPModule):
        return gpt
    with torch.device("meta"):
        whole = GPT(gpt.config)
    weights = {name: gather(weight, device) for name, weight in gpt.state_dict().items()}
    whole.load_state_dict(weights, assign=True)
    whole.lm_head.weight = whole.transformer.wte.weight  # assigning unties them
    return whole


def divide_like(value: Value, parameter: Tensor) -> Value:
    """A whole tensor divided as a parameter is, where it has a number for each of its elements; any other as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
