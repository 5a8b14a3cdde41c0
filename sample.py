"""Model to text: continue a prompt, each token shown as it comes.

python sample.py --checkpoint log/step_019073 --prompt "Hello, I'm a language model,"
echo "Hello, I'm a language model," | python sample.py --checkpoint gpt2 --num_samples 1 --top_p 0.9
"""

from __future__ import annotations

import itertools
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from common import DataError, Flags, UsageError, choose_device, flag, parse_flags, required, run
from model import GPT, SOURCES
from tokenizer import END_OF_TEXT, decode_stream, encode

PROMPT = "Hello, I'm a language model,"


@dataclass(frozen=True)
class SampleConfig(Flags):
    checkpoint: str = flag(required, SOURCES)
    prompt: str | None = flag(None, f"text to continue (default: standard input if it is piped, else {PROMPT!r})")
    file: str | None = flag(None, "file with the text to continue (default: none)")
    num_samples: int = flag(4, "continuations to write", least=1)
    max_new_tokens: int = flag(64, "tokens in each continuation, at most", least=1)
    temperature: float = flag(1.0, "below 1 safer, above 1 wilder, 0 always the likeliest token")
    top_k: int = flag(50, "draw from this many likeliest tokens only; 0: all")
    top_p: float = flag(1.0, "draw from the fewest tokens whose probabilities come to this")
    seed: int = flag(42, "seed of the first continuation; each has the next")
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p {self.top_p} must be above 0, and 1 at most")
        if self.prompt is not None and self.file is not None:
            raise UsageError("--prompt and --file both give a text to continue: choose one")


def read_prompt(config: SampleConfig) -> str:
    """The text to continue; raises UsageError where there is none."""
    source, text = "--prompt", PROMPT if config.prompt is None else config.prompt
    if config.file is not None:
        source = f"--file {config.file}"
        if not Path(config.file).exists():
            raise UsageError(f"{source}: no such file")
        text = read_text(Path(config.file).read_bytes(), source)
    elif config.prompt is None and is_piped():
        source = "standard input"
        text = read_text(sys.stdin.buffer.read(), source)
    if not text:
        raise UsageError(f"{source} is empty: give some text to continue")
    return text


def read_text(content: bytes, source: str) -> str:
    """The text of a file without its last line end, which is seldom meant; raises DataError where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 ({error.reason})") from None


def is_piped() -> bool:
    """Whether standard input is another program's output or a file, and not a terminal or nothing."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # it is closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def continuation(gpt: GPT, config: SampleConfig, prompt: str, number: int = 0) -> Iterator[str]:
    """What continues the prompt, in pieces as they come, up to <|endoftext|>; each number gives another text."""
    device = gpt.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(config.seed + number)
    idx = torch.tensor([encode(prompt)], device=device)  # (1, T)
    new = gpt.stream(idx, config.max_new_tokens, config.temperature, config.top_k or None, config.top_p, generator)
    return decode_stream(itertools.takewhile(lambda token: token != END_OF_TEXT, map(int, new)))


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(SampleConfig, argv, __doc__)
    prompt = read_prompt(config)
    gpt = GPT.from_pretrained(config.checkpoint).to(choose_device(config.device))
    for number in range(config.num_samples):
        print("\n" * (number > 0) + prompt, end="", flush=True)
        for piece in continuation(gpt, config, prompt, number):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main)
