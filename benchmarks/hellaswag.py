"""How fast HellaSwag is scored in batches, against an example at a time, as build-nanogpt does; both scorings.

python benchmarks/hellaswag.py --model gpt2 --limit 100
"""

from __future__ import annotations

import os
import sys

sys.path[:1] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import hellaswag
from common import Flags, choose_device, flag, parse_flags, run
from model import GPT, PRESETS


@dataclass(frozen=True)
class BenchmarkConfig(Flags):
    model: str = flag("gpt2", "size; its weights are random", choices=[*PRESETS][1:])
    data: str | None = flag(None, f"file of examples (default: {hellaswag.FILE}, downloaded if it is not there)")
    limit: int = flag(100, "examples to score", least=1)
    batch_tokens: int = flag(hellaswag.BATCH_TOKENS, "tokens in a batch, at most", least=1)
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")


def question_losses(gpt: GPT, question: hellaswag.Question) -> Tensor:
    """The total losses of a question's endings: a row each, all with the context, and all their logits."""
    device = gpt.lm_head.weight.device
    width = len(question.context) + max(map(len, question.endings))
    idx, mask = torch.zeros(hellaswag.ENDINGS, width, dtype=torch.long), torch.zeros(hellaswag.ENDINGS, width)
    for number, ending in enumerate(question.endings):
        tokens = question.context + ending
        idx[number, : len(tokens)] = torch.tensor(tokens)
        mask[number, len(question.context) : len(tokens)] = 1
    idx, mask = idx.to(device), mask.to(device)
    logits, _ = gpt(idx)  # (4, T, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
    return (losses.view(idx[:, 1:].shape) * mask[:, 1:]).sum(dim=1)


@torch.no_grad()
def one_at_a_time(gpt: GPT, questions: list[hellaswag.Question]) -> Tensor:
    """What `hellaswag.count_correct` counts."""
    correct = torch.zeros(len(hellaswag.SCORINGS), 2, dtype=torch.long)
    for question in questions:
        totals = question_losses(gpt, question).cpu()
        for kind, losses in enumerate((totals, totals / torch.tensor(question.lengths))):
            correct[question.scoring, kind] += int(losses.argmin()) == question.label
    return correct


def main() -> None:
    config = parse_flags(BenchmarkConfig, None, __doc__)
    device = choose_device(config.device)
    torch.manual_seed(0)
    gpt = GPT(PRESETS[config.model]).to(device)
    path = Path(config.data) if config.data else hellaswag.download()
    questions = hellaswag.load(path, slice(config.limit))
    ways: dict[str, Callable[[list], Tensor]] = {
        "one_at_a_time": lambda some: one_at_a_time(gpt, some),
        "batches": lambda some: hellaswag.count_correct(gpt, some, config.batch_tokens),
    }
    rates, correct = {}, {}
    for way, count in ways.items():
        count(questions[:4])  # warms up
        began = time.perf_counter()
        correct[way] = count(questions).tolist()
        rates[way] = len(questions) / len(hellaswag.SCORINGS) / (time.perf_counter() - began)
        print(f"{way}: {rates[way]:.2f} examples/s, right {correct[way]}")
    examples = len(questions) // len(hellaswag.SCORINGS)
    figures = {"device": str(device), "torch": torch.__version__, "model": config.model, "examples": examples}
    figures |= {"batch_tokens": config.batch_tokens, "correct": correct, "examples_per_second": rates}
    print(json.dumps(figures | {"ratio": rates["batches"] / rates["one_at_a_time"]}))


if __name__ == "__main__":
    run(main)
