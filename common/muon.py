"""Muon for the matrices of the blocks and AdamW for everything else, in one optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from common.device import has_bfloat16
from common.processes import World
from common.sharding import divide_like, gather


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024) for the groups that have a `momentum`, AdamW for the others.

    Computes what torch.optim.Muon does, but splits a matrix that holds several (c_attn), divides the work among the
    processes, and uses fp32 where bf16 is emulated. A group's matrices have one shape, and each holds `parts` of them.
    """

    def __init__(self, groups: list[dict[str, Any]], world: World, **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self.world = world
        self.dtype = torch.float32 if world.any_rank(not has_bfloat16(world.device)) else torch.bfloat16

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        for group in groups:
            if "momentum" in group:
                self.update_matrices(group)
        self.param_groups = [group for group in groups if "momentum" not in group]  # AdamW would update the others too
        super().step()
        self.param_groups = groups

    def update_matrices(self, group: dict[str, Any]) -> None:
        directions = [self.nesterov_gradient(p, group["momentum"]).to(self.dtype) for p in group["params"]]
        whole = torch.stack([gather(direction, self.world.device) for direction in directions])  # (N, out, in)
        matrices = whole.unflatten(1, (group["parts"], -1)).flatten(0, 1)  # (N * parts, out / parts, in)
        updates = orthogonalize_across_processes(matrices, self.world).reshape(whole.shape)
        scale = math.sqrt(max(1, matrices.shape[1] / matrices.shape[2]))  # Jordan's: else tall ones change outputs less
        for parameter, update in zip(group["params"], updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(divide_like(update, parameter), alpha=-group["lr"] * scale)

    def nesterov_gradient(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # unused, but AdamW expects one in each state that it loads
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)


def orthogonalize_across_processes(matrices: Tensor, world: World) -> Tensor:
    """The matrices (N, rows, columns) made orthogonal, each process doing its share."""
    if world.size == 1:
        return orthogonalized(matrices)
    own = slice(world.rank, None, world.size)
    updates = torch.zeros_like(matrices)
    updates[own] = orthogonalized(matrices[own])
    return world.sum(updates)  # one process's update and zeros: exact


def orthogonalized(matrices: Tensor) -> Tensor:
    """Roughly U V^T of matrices U S V^T (N, rows, columns): singular values over 1/500 of the norm become 0.6 to 1.3.

    Five steps of Jordan's Newton-Schulz iteration, x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1 now
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide else x.mT
