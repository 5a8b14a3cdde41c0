"""How fast HellaSwag is scored in batches, against an example at a time, as build-nanogpt does; both scorings.

python -m benchmarks.hellaswag --limit 60
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import hellaswag
from common.device import choose_device
from common.script import Positive, check_settings, parse_flags, run
from model import GPT, PRESETS


@dataclass(frozen=True)
class BenchmarkConfig:
    model: Literal["debug", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """size; its weights are random"""
    data: str | None = None
    """file of examples; None: hellaswag_val.jsonl, downloaded if it is not there"""
    limit: Positive[int] = 100
    """examples to score"""
    batch_tokens: Positive[int] = 8192
    """tokens in a batch, at most"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N"""


def question_losses(gpt: GPT, question: hellaswag.Question) -> Tensor:
    """The total losses of a question's endings: a row each, all with the context, and all their logits."""
    width = len(question.context) + max(len(ending) for ending in question.endings)
    idx = torch.zeros(hellaswag.ENDINGS, width, dtype=torch.long)
    scored = torch.zeros(hellaswag.ENDINGS, width)
    for number, ending in enumerate(question.endings):
        tokens = question.context + ending
        idx[number, : len(tokens)] = torch.tensor(tokens)
        scored[number, len(question.context) : len(tokens)] = 1
    device = gpt.transformer.wte.weight.device
    idx, scored = idx.to(device), scored.to(device)
    logits, _ = gpt(idx)  # (4, T, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
    return (losses.view(idx[:, 1:].shape) * scored[:, 1:]).sum(dim=1)


@torch.no_grad()
def one_at_a_time(gpt: GPT, questions: list[hellaswag.Question]) -> Tensor:
    """The counts of `hellaswag.count_correct`."""
    correct = torch.zeros(len(hellaswag.SCORINGS), 2, dtype=torch.long)
    for question in questions:
        losses = question_losses(gpt, question).cpu()
        scoring = hellaswag.SCORINGS.index(question.scoring)
        correct[scoring, 0] += losses.argmin() == question.label
        correct[scoring, 1] += (losses / torch.tensor(question.lengths)).argmin() == question.label
    return correct


def compare(config: BenchmarkConfig) -> None:
    """Measure both ways, and print their figures and, last, a line of JSON."""
    check_settings(config)
    device = choose_device(config.device)
    torch.manual_seed(0)
    gpt = GPT(PRESETS[config.model]).to(device)
    questions = hellaswag.load(Path(config.data or hellaswag.download()), slice(config.limit))
    ways: dict[str, Callable[[list[hellaswag.Question]], Tensor]] = {
        "one_at_a_time": lambda questions: one_at_a_time(gpt, questions),
        "batches": lambda questions: hellaswag.count_correct(gpt, questions, config.batch_tokens),
    }
    examples_per_second, correct = {}, {}
    for way, count in ways.items():
        count(questions[:4])  # warm up
        start = time.perf_counter()
        correct[way] = count(questions).tolist()
        seconds = time.perf_counter() - start
        examples_per_second[way] = len(questions) / len(hellaswag.SCORINGS) / seconds
        print(f"{way}: {examples_per_second[way]:.2f} examples/s, right {correct[way]}", flush=True)
    figures = asdict(config) | {"device": str(device), "torch": torch.__version__}
    figures |= {"correct": correct, "examples_per_second": examples_per_second}
    print(json.dumps(figures | {"ratio": examples_per_second["batches"] / examples_per_second["one_at_a_time"]}))


def main(argv: list[str] | None = None) -> None:
    compare(parse_flags(BenchmarkConfig, argv, __doc__))


if __name__ == "__main__":
    run(main)
