"""How fast text is generated with cached keys and values, against a pass over the whole window for each token.

python benchmarks/generate.py --model gpt2
"""

from __future__ import annotations

import os
import sys

sys.path[:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import json
import time
from collections.abc import Callable, Iterator
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
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")


@torch.no_grad()
def uncached(gpt: GPT, idx: Tensor, count: int) -> Iterator[Tensor]:
    """Greedy generation as the definition has it: each token after a pass over the last block_size ones."""
    for _ in range(count):
        last = gpt.hidden(idx[:, -gpt.config.block_size :])[:, -1]
        new = gpt.lm_head(last)[:, :N_TOKENS].argmax(dim=-1, keepdim=True)
        idx = torch.cat([idx, new], dim=1)
        yield new


def main() -> None:
    config = parse_flags(BenchmarkConfig, None, __doc__)
    device = choose_device(config.device)
    torch.manual_seed(0)
    gpt = GPT(PRESETS[config.model]).to(device)
    prompt = torch.tensor([encode("Hello, I'm a language model,")], device=device)
    ways: dict[str, Callable[[int], Iterator[Tensor]]] = {
        "uncached": lambda count: uncached(gpt, prompt, count),
        "cached": lambda count: gpt.stream(prompt, count, temperature=0),
    }
    rates, texts = {}, {}
    for way, generate in ways.items():
        for new in generate(8):  # warms up
            new.item()
        began = time.perf_counter()
        texts[way] = [new.item() for new in generate(config.new_tokens)]  # waits for the device
        rates[way] = config.new_tokens / (time.perf_counter() - began)
        print(f"{way}: {rates[way]:.1f} tokens/s")
    figures = {
        "device": str(device),
        "torch": torch.__version__,
        "model": config.model,
        "new_tokens": config.new_tokens,
    }
    figures |= {"same_tokens": texts["cached"] == texts["uncached"], "tokens_per_second": rates}
    print(json.dumps(figures | {"ratio": rates["cached"] / rates["uncached"]}))


if __name__ == "__main__":
    run(main)
