"""Model to text: continue a prompt.

python sample.py --checkpoint log/step_019073 --prompt "Hello, I'm a language model,"
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common import Flags, UsageError, choose_device, flag, parse_flags, required, run
from model import GPT
from tokenizer import decode, encode


@dataclass(frozen=True)
class SampleConfig(Flags):
    checkpoint: str = flag(required, "checkpoint directory of the model")
    prompt: str = flag("Hello, I'm a language model,", "text to continue")
    num_samples: int = flag(4, "continuations to write", least=1)
    max_new_tokens: int = flag(64, "tokens in each continuation", least=1)
    temperature: float = flag(1.0, "below 1 safer, above 1 wilder, 0 always the likeliest token")
    top_k: int = flag(50, "draw from this many likeliest tokens only", least=1)
    seed: int = flag(42, "seed of the random draws")
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("--prompt is empty: give some text to continue")
        super().__post_init__()


def complete(gpt: GPT, config: SampleConfig) -> list[str]:
    """The prompt with each of its continuations; the same seed gives the same texts."""
    device = gpt.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(config.seed)
    prompt = torch.tensor([encode(config.prompt)] * config.num_samples, device=device)  # (B, T)
    texts = gpt.generate(prompt, config.max_new_tokens, config.temperature, config.top_k, generator)
    return [decode(tokens) for tokens in texts.tolist()]


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(SampleConfig, argv, __doc__)
    gpt = GPT.from_pretrained(config.checkpoint).to(choose_device(config.device))
    print("\n\n".join(complete(gpt, config)))


if __name__ == "__main__":
    run(main)
