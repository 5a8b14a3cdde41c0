"""How large a micro-batch fits into a GPU's memory, computed for each size; it needs no GPU.

    python benchmarks/memory.py

Bytes that stay: 16 a parameter (fp32 weights, gradients and AdamW's two means), and what a compiled step keeps of the
weights for its backward pass (their bf16 copies). Bytes for each row: what that step keeps of activations, and the
gradient of the logits in bf16. The kept tensors are counted in compiled models of one and of two layers, on the CPU. A
tenth of the memory is left for the CUDA context, workspaces and fragments.
"""

from __future__ import annotations

import os
import sys

sys.path[:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import json
from dataclasses import dataclass, replace

import torch

from common import Flags, parse_flags, run
from model import GPT, PRESETS, GPTConfig
from tokenizer import N_TOKENS

GIGABYTES = (24, 40, 80)


@dataclass(frozen=True)
class BenchmarkConfig(Flags):
    pass


def kept_bytes(sizes: GPTConfig, batch_size: int) -> int:
    """The bytes of the tensors, other than parameters, that a compiled forward pass keeps for the backward pass."""
    torch._dynamo.reset()
    gpt = GPT(sizes)
    model = torch.compile(gpt, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    parameters = {parameter.data_ptr() for parameter in gpt.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.randint(N_TOKENS, (batch_size, sizes.block_size + 1))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(rows[:, :-1], rows[:, 1:])[1]
    assert loss.requires_grad  # and holds the tensors, so that no two were at one address
    return sum(kept.values())


def bytes_kept_and_a_row(sizes: GPTConfig) -> tuple[float, float]:
    """What stays of the weights, and what each row of a micro-batch adds."""
    counts = {(layers, rows): kept_bytes(replace(sizes, n_layer=layers), rows) for layers in (1, 2) for rows in (1, 2)}
    a_row = {layers: counts[layers, 2] - counts[layers, 1] for layers in (1, 2)}
    fixed = {layers: counts[layers, 1] - a_row[layers] for layers in (1, 2)}
    more = sizes.n_layer - 1
    logits = 2 * sizes.vocab_size * sizes.block_size
    return fixed[1] + more * (fixed[2] - fixed[1]), a_row[1] + more * (a_row[2] - a_row[1]) + logits


def main() -> None:
    parse_flags(BenchmarkConfig, None, __doc__)
    found = {}
    for name, sizes in PRESETS.items():
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in GPT(sizes).parameters())
        fixed, a_row = bytes_kept_and_a_row(sizes)
        fixed += 16 * parameters
        largest = {size: max(0, int((0.9e9 * size - fixed) / a_row)) for size in GIGABYTES}
        found[name] = {"fixed_bytes": fixed, "bytes_a_row": a_row, "largest_batch_size": largest}
        batches = ", ".join(f"{size} GB: {batch}" for size, batch in largest.items())
        print(f"{name:12} {fixed / 1e9:6.2f} GB stay, {a_row / 1e9:.3f} GB a row of {sizes.block_size}: {batches}")
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
