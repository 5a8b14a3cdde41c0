"""How large a micro-batch fits into a GPU's memory, computed for each size; it needs no GPU.

python -m benchmarks.memory

Fixed are 16 bytes a parameter (weights, gradients and AdamW's two moments in fp32), and what a compiled step keeps of
the weights for its backward pass (their bf16 copies). Each row adds the activations that such a step keeps and, as its
backward pass begins, the gradient of the logits, twice: that of the loss, and the zeros that torch passes for the
logits which the trainer leaves unused. What is kept is counted in compiled models of one and of two layers, on the CPU.
A tenth of the memory is left for the CUDA context, workspaces and fragmentation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from common.script import parse_flags, run
from common.tokenizer import N_TOKENS
from model import GPT, PRESETS, GPTConfig
from recipes import Size

GIGABYTES = (24, 40, 80)


@dataclass(frozen=True)
class BenchmarkConfig:
    model: Size | None = None  # size; None: all


@dataclass(frozen=True)
class Memory:
    """The bytes of a training step in bf16."""

    fixed_bytes: int
    bytes_per_row: int

    def largest_batch_size(self, gigabytes: int) -> int:
        return int(max(0, 0.9e9 * gigabytes - self.fixed_bytes) // self.bytes_per_row)


def kept_bytes(sizes: GPTConfig, batch_size: int) -> int:
    """The bytes of the tensors, other than parameters, that a compiled forward pass keeps for the backward pass."""
    torch.compiler.reset()
    gpt = GPT(sizes)
    # keeps what the default backend keeps, and generates no code
    model = torch.compile(gpt, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    parameters = {parameter.data_ptr() for parameter in gpt.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.randint(N_TOKENS, (batch_size, sizes.block_size + 1))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, loss = model(rows[:, :-1], rows[:, 1:])
    assert loss.requires_grad  # and so keeps the tensors: no two were at one address
    return sum(kept.values())


def predict(sizes: GPTConfig) -> Memory:
    """The bytes of a step, which grow by the same number with each layer and with each row."""
    one_layer = kept_by_rows(replace(sizes, n_layer=1))
    two_layers = kept_by_rows(replace(sizes, n_layer=2))
    more_layers = sizes.n_layer - 1
    fixed = one_layer.fixed_bytes + more_layers * (two_layers.fixed_bytes - one_layer.fixed_bytes)
    per_row = one_layer.bytes_per_row + more_layers * (two_layers.bytes_per_row - one_layer.bytes_per_row)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPT(sizes).parameters())
    logits = 2 * sizes.padded_vocab_size * sizes.block_size  # bytes of one row's, in bf16
    return Memory(fixed + 16 * parameters, per_row + 2 * logits)


def kept_by_rows(sizes: GPTConfig) -> Memory:
    one, two = kept_bytes(sizes, batch_size=1), kept_bytes(sizes, batch_size=2)
    return Memory(fixed_bytes=2 * one - two, bytes_per_row=two - one)


def compute(config: BenchmarkConfig) -> None:
    """Print the largest micro-batches of each size, and, last, a line of JSON with all figures."""
    figures = {}
    for name in [config.model] if config.model else PRESETS:
        memory = predict(PRESETS[name])
        largest = {size: memory.largest_batch_size(size) for size in GIGABYTES}
        batches = ", ".join(f"{size} GB: {rows}" for size, rows in largest.items())
        print(
            f"{name:12} {memory.fixed_bytes / 1e9:6.2f} GB fixed, {memory.bytes_per_row / 1e9:.3f} GB for each row of "
            f"{PRESETS[name].block_size} tokens; largest batch_size on {batches}",
            flush=True,
        )
        figures[name] = asdict(memory) | {"largest_batch_size": largest}
    print(json.dumps(figures))


def main(argv: list[str] | None = None) -> None:
    compute(parse_flags(BenchmarkConfig, argv, __doc__))


if __name__ == "__main__":
    run(main)
