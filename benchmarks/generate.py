"""How fast text is generated with cached keys and values, against a pass over the whole window for each token.

python benchmarks/generate.py --model gpt2
"""

from __future__ import annotations

import os
import sys

sys.path[:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common import Flags, choose_device, flag, parse_flags, run
from model import GPT, PRESETS
from tokenizer import N_TOKENS, encode


@dataclass(frozen=True)
class BenchmarkConfig(Flags):
    model: str = flag("gpt2", "size; its weights are random", choices=[*PRESETS])
    new_tokens: int = flag(256, "tokens to generate", least=1)
    repeat: int = flag(1, "times to generate them in each way", least=1)
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")


@torch.no_grad()
def uncached(gpt: GPT, idx: Tensor, count: int) -> Tensor:
    """Greedy generation as the definition has it: each token after a pass over the last block_size ones."""
    for _ in range(count):
        last = gpt.hidden(idx[:, -gpt.config.block_size :])[:, -1]
        idx = torch.cat([idx, gpt.lm_head(last)[:, :N_TOKENS].argmax(dim=-1, keepdim=True)], dim=1)
    return idx


def tokens_per_second(generate: Callable[[int], Tensor], count: int) -> float:
    began = time.perf_counter()
    generate(count).tolist()  # waits for the device
    return count / (time.perf_counter() - began)


def main() -> None:
    config = parse_flags(BenchmarkConfig, None, __doc__)
    device = choose_device(config.device)
    torch.manual_seed(0)
    gpt = GPT(PRESETS[config.model]).to(device)
    prompt = torch.tensor([encode("Hello, I'm a language model,")], device=device)
    ways: dict[str, Callable[[int], Tensor]] = {
        "uncached": lambda count: uncached(gpt, prompt, count),
        "cached": lambda count: gpt.generate(prompt, count, temperature=0),
    }
    first, second = (generate(8).tolist() for generate in ways.values())  # warms up
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(config.repeat):
        for way, generate in ways.items():
            rates[way].append(tokens_per_second(generate, config.new_tokens))
    best = {way: max(some) for way, some in rates.items()}
    for way, rate in best.items():
        print(f"{way}: {rate:.1f} tokens/s")
    figures = {"device": str(device), "model": config.model, "new_tokens": config.new_tokens, "same": first == second}
    print(json.dumps(figures | {"tokens_per_second": best, "ratio": best["cached"] / best["uncached"]}))


if __name__ == "__main__":
    run(main)
