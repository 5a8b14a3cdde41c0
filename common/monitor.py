"""Early signs of divergence: the largest attention logit, and the largest relative change of a matrix in a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.sharding import gather


def largest_attention_logit(gpt: nn.Module, idx: Tensor) -> float:
    """The largest causal attention logit, q k^T / sqrt(D), of all layers and heads, on rows of tokens (B, T)."""
    logits = []

    def record(module: nn.Module, inputs: tuple, projections: Tensor) -> None:
        q, k, _ = projections.unflatten(2, (3, gpt.config.n_head, -1)).unbind(2)  # (B, T, H, D)
        with torch.autocast(q.device.type, enabled=False):
            products = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float())  # (B, H, T, T)
        future = torch.ones(products.shape[-2:], dtype=torch.bool, device=q.device).triu(1)  # (T, T)
        logits.append(products.masked_fill(future, -math.inf).max() / math.sqrt(q.shape[-1]))

    hooks = [block.attn.c_attn.register_forward_hook(record) for block in gpt.transformer.h]
    with torch.no_grad():
        gpt.hidden(idx)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(logits).max())  # NaN if one of them is


def copy_matrices(gpt: nn.Module) -> dict[str, Tensor]:
    """A copy of each matrix, or of this process's part of it."""
    gpt.state_dict()  # for its side effect: FSDP divides again what a validation has left gathered
    return {name: p.detach().clone() for name, p in gpt.named_parameters() if p.dim() >= 2}


@torch.no_grad()
def largest_update(gpt: nn.Module, before: dict[str, Tensor], device: torch.device) -> float:
    """The largest relative change of a matrix since `before` (Frobenius norms). All processes call this."""
    weights = dict(gpt.named_parameters())
    ratios = [(weights[name] - matrix).norm() / matrix.norm() for name, matrix in before.items()]
    return float(torch.stack([gather(ratio, device) for ratio in ratios]).max())
