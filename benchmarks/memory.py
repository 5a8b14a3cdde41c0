"""How large a micro-batch fits into a GPU's memory, computed for each size; it needs no GPU.

python -m benchmarks.memory

Fixed are 16 bytes a parameter (weights, gradients and AdamW's two moments in fp32), what a compiled step keeps of the
weights for its backward pass (their bf16 copies, which --activation_checkpointing makes again) and, as the backward
pass begins, the embedding's gradient in bf16. Each row adds the activations that such a step keeps, and the gradient of
the last ones; that of the logits takes the logits' place, and what one block computes again is less. What is kept is
counted in compiled models of one and of two layers, on rows of 128 and of 256 tokens, on the CPU.

With --shard, the 16 bytes are divided among the cards. Added are 4 bytes a parameter for the gradients that accumulate
over the micro-batches of a step, the embeddings, which stay gathered while a step is computed, and three blocks: the
one that is computed, the next, and the buffer through which it comes.

A tenth of the memory is left for the CUDA context, workspaces and fragmentation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from common.script import parse_flags, run
from common.sharding import Loss, recompute_blocks
from common.tokenizer import N_TOKENS
from model import GPT, PRESETS, GPTConfig
from recipes import Size

GIGABYTES = (24, 40, 80)
CARDS = (2, 4, 8)


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


def kept_bytes(sizes: GPTConfig, recompute: bool) -> int:
    """The bytes of the tensors, other than parameters, that a compiled pass over a row keeps for the backward pass."""
    torch.compiler.reset()
    gpt = GPT(sizes)
    if recompute:
        recompute_blocks(gpt)
    # keeps what the default backend keeps, and generates no code
    model = torch.compile(Loss(gpt), backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    parameters = {parameter.data_ptr() for parameter in gpt.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.randint(N_TOKENS, (1, sizes.block_size + 1))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(rows[:, :-1], rows[:, 1:])
    assert loss.requires_grad  # and so keeps the tensors: no two were at one address
    return sum(kept.values())


def predict(sizes: GPTConfig, recompute: bool = False) -> Memory:
    """The bytes of a step, which grow by the same number with each layer and with each row."""
    one_layer = kept_by_rows(replace(sizes, n_layer=1), recompute)
    two_layers = kept_by_rows(replace(sizes, n_layer=2), recompute)
    more_layers = sizes.n_layer - 1
    fixed = one_layer.fixed_bytes + more_layers * (two_layers.fixed_bytes - one_layer.fixed_bytes)
    per_row = one_layer.bytes_per_row + more_layers * (two_layers.bytes_per_row - one_layer.bytes_per_row)
    embedding, hidden = (2 * rows * sizes.n_embd for rows in (sizes.padded_vocab_size, sizes.block_size))
    return Memory(fixed + 16 * parameters(sizes) + embedding, per_row + hidden)


def kept_by_rows(sizes: GPTConfig, recompute: bool) -> Memory:
    """The fixed bytes and those of a row, which are in proportion to its tokens: from two shorter rows."""
    T = min(128, sizes.block_size // 2)
    short, long = (kept_bytes(replace(sizes, block_size=tokens), recompute) for tokens in (T, 2 * T))
    return Memory(fixed_bytes=2 * short - long, bytes_per_row=(long - short) * sizes.block_size // T)


def parameters(sizes: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(sizes).parameters())


def with_shard(memory: Memory, sizes: GPTConfig, cards: int) -> Memory:
    """The bytes of a step on each of several cards with --shard, from those of a step without."""
    whole = parameters(sizes)
    block = parameters(replace(sizes, n_layer=2)) - parameters(replace(sizes, n_layer=1))
    gathered = whole - (sizes.n_layer - 3) * block
    divided = memory.fixed_bytes - 16 * whole + 16 * whole // cards + 4 * whole + 4 * gathered
    return replace(memory, fixed_bytes=divided)


def compute(config: BenchmarkConfig) -> None:
    """Print the largest micro-batches of each size, and, last, a line of JSON with all figures."""
    figures = {}
    for name in [config.model] if config.model else PRESETS:
        sizes = PRESETS[name]
        for recompute in (False, True):
            memory = predict(sizes, recompute)
            ways = {"whole": memory} | {f"shard {cards}": with_shard(memory, sizes, cards) for cards in CARDS}
            for way, needed in ways.items():
                title = f"{name}, {way}, recomputed" if recompute else f"{name}, {way}"
                figures[title] = figures_of(needed)
                print_way(title, needed)
    print(json.dumps(figures))


def figures_of(memory: Memory) -> dict:
    return asdict(memory) | {"largest_batch_size": {size: memory.largest_batch_size(size) for size in GIGABYTES}}


def print_way(title: str, memory: Memory) -> None:
    batches = ", ".join(f"{size} GB: {memory.largest_batch_size(size)}" for size in GIGABYTES)
    print(
        f"{title:32} {memory.fixed_bytes / 1e9:6.2f} GB fixed, {memory.bytes_per_row / 1e9:.3f} GB for each row; "
        f"largest batch_size on {batches}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    compute(parse_flags(BenchmarkConfig, argv, __doc__))


if __name__ == "__main__":
    run(main)
