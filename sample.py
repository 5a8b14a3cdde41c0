"""Model to text: continue a prompt, each token shown as it comes.

python sample.py --prompt "Hello, I'm a language model,"

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

from common.checkpoint import locate
from common.device import choose_device, explain_out_of_memory
from common.huggingface import load_gpt, require_gpt2_vocabulary
from common.script import DataError, Positive, UsageError, check_settings, parse_flags, run
from common.tokenizer import END_OF_TEXT, decode_stream, encode
from model import GPT

PROMPT = "Hello, I'm a language model,"


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = "log"  # checkpoint, run (its newest checkpoint), or model on the Hugging Face Hub such as gpt2-xl
    prompt: str | None = None  # text to continue; None: standard input if it is piped, else a short one
    file: str | None = None  # file with the text to continue
    num_samples: Positive[int] = 4  # continuations to write
    max_new_tokens: Positive[int] = 64  # tokens in each continuation, at most
    temperature: float = 1.0  # below 1 safer, above 1 wilder, 0 always the likeliest token
    top_k: int = 50  # draw from this many likeliest tokens only; 0: all
    top_p: float = 1.0  # draw from the fewest tokens whose probabilities come to this, after top_k
    seed: int = 42  # seed of the first continuation; each has the next
    device: str = "auto"  # auto, cpu, mps, cuda or cuda:N


def read_prompt(config: SampleConfig) -> str:
    """The text to continue; raises UsageError if there is none, DataError if it is not UTF-8."""
    if config.prompt is not None and config.file is not None:
        raise UsageError("--prompt and --file both give a text to continue: choose one")
    source, content = "--prompt", os.fsencode(PROMPT if config.prompt is None else config.prompt)
    if config.file is not None:
        if not Path(config.file).is_file():
            raise UsageError(f"--file {config.file}: no such file")
        source, content = f"--file {config.file}", Path(config.file).read_bytes()
    elif config.prompt is None and is_piped():
        source, content = "standard input", sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8-sig").removesuffix("\n")  # a file's last line end is seldom meant
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 ({error.reason})") from None
    if not text:
        raise UsageError(f"{source} is empty: give some text to continue")
    return text


def is_piped() -> bool:
    """Whether standard input is another program's output or a file, and not a terminal or nothing."""
    if sys.stdin is None:  # it is closed
        return False
    mode = os.fstat(0).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def continuation(gpt: GPT, config: SampleConfig, prompt: str, number: int = 0) -> Iterator[str]:
    """What continues the prompt, in pieces as they come, up to <|endoftext|>; each number gives another text."""
    device = gpt.lm_head.weight.device
    new = gpt.stream(
        torch.tensor([encode(prompt)], device=device),  # (1, T)
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        generator=torch.Generator(device).manual_seed(config.seed + number),
    )
    return decode_stream(itertools.takewhile(lambda token: token != END_OF_TEXT, map(int, new)))


def write(config: SampleConfig) -> None:
    """Print the prompt and what continues it, num_samples times; raises UsageError or DataError."""
    check_settings(config)
    if not 0 < config.top_p <= 1:
        raise UsageError(f"--top_p {config.top_p} must be above 0, and 1 at most")
    prompt, device = read_prompt(config), choose_device(config.device)
    gpt = load_gpt(locate(config.checkpoint)).to(device)
    require_gpt2_vocabulary(gpt, config.checkpoint)
    try:
        for number in range(config.num_samples):
            print("\n" * (number > 0) + prompt, end="", flush=True)
            for piece in continuation(gpt, config, prompt, number):
                print(piece, end="", flush=True)
            print()
    except (FloatingPointError, ValueError) as error:  # of the model, or of a prompt too odd for the tokenizer
        raise DataError(f"{config.checkpoint} cannot continue this prompt: {error}") from None


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(SampleConfig, argv, __doc__)
    with explain_out_of_memory("--checkpoint"):
        write(config)


if __name__ == "__main__":
    run(main)
