"""How fast text is generated with cached keys and values, against a pass over the whole window for each token.

python -m benchmarks.generate
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from common.device import choose_device
from common.script import Positive, check_settings, parse_flags, run
from common.tokenizer import N_TOKENS, encode
from model import GPT, PRESETS
from recipes import Size


@dataclass(frozen=True)
class BenchmarkConfig:
    model: Size = "gpt2"  # size; its weights are random
    new_tokens: Positive[int] = 256  # tokens to generate
    device: str = "auto"  # auto, cpu, mps, cuda or cuda:N


@torch.no_grad()
def uncached(gpt: GPT, idx: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the likeliest ids (B, 1), each after a pass over the last block_size tokens of idx (B, T)."""
    for _ in range(count):
        last = gpt.hidden(idx[:, -gpt.config.block_size :])[:, -1]  # (B, C)
        new = gpt.logits(last)[:, :N_TOKENS].argmax(dim=-1, keepdim=True)  # (B, 1)
        idx = torch.cat([idx, new], dim=1)
        yield new


def cached(gpt: GPT, idx: Tensor, count: int) -> Iterator[Tensor]:
    """The same by the program's own generation."""
    return gpt.stream(idx, count, temperature=0)


def compare(config: BenchmarkConfig) -> None:
    """Generate the same text both ways; prints the rates and, last, a line of JSON with all figures."""
    check_settings(config)
    device = choose_device(config.device)
    torch.manual_seed(0)
    gpt = GPT(PRESETS[config.model]).to(device)
    prompt = torch.tensor([encode("Hello, I'm a language model,")], device=device)  # (1, T)
    rates, texts = {}, {}
    for generate in (uncached, cached):
        way = generate.__name__
        for new in generate(gpt, prompt, 8):  # warm up
            new.item()
        began = time.perf_counter()
        texts[way] = [new.item() for new in generate(gpt, prompt, config.new_tokens)]  # item waits for the device
        rates[way] = config.new_tokens / (time.perf_counter() - began)
        print(f"{way}: {rates[way]:.1f} tokens/s", flush=True)
    figures = asdict(config) | {
        "device": str(device),
        "torch": torch.__version__,
        "same_tokens": texts["cached"] == texts["uncached"],
        "tokens_per_second": rates,
        "ratio": rates["cached"] / rates["uncached"],
    }
    print(json.dumps(figures))


def main(argv: list[str] | None = None) -> None:
    compare(parse_flags(BenchmarkConfig, argv, __doc__))


if __name__ == "__main__":
    run(main)
