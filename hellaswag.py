"""Model to accuracy: HellaSwag (Zellers et al., 2019), where a model picks the likeliest of four endings.

    python hellaswag.py --model log/step_019073

The context and each ending are scored as build-nanogpt does: `acc` picks the ending whose tokens have the least total
loss, `acc_norm` the one whose tokens have the least mean loss.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common import (
    DataError,
    Flags,
    UsageError,
    choose_device,
    flag,
    locked,
    parse_flags,
    replacing,
    required,
    run,
    sha256,
)
from model import GPT
from tokenizer import encode

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path("hellaswag_val.jsonl")
ENDINGS = 4
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HellaswagConfig(Flags):
    model: str = flag(required, "checkpoint directory to score")
    data: str | None = flag(None, f"file of examples (default: {FILE}, downloaded if it is not there)")
    limit: int | None = flag(None, "score only this many examples from the start (default: all)", least=1)
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")


class Example(NamedTuple):
    """The tokens of a context and of its four endings, and which of them is right."""

    context: list[int]
    endings: list[list[int]]
    label: int

    def longest(self) -> int:
        return len(self.context) + max(map(len, self.endings))


def download(path: Path = FILE) -> Path:
    """Fetch the official validation set unless it is there; raises DataError where that fails."""
    try:
        with locked(path.absolute().parent):  # another process may be fetching it
            if not path.exists():
                fetch(path)
    except (OSError, HTTPException) as error:
        raise DataError(f"cannot download {URL} ({error}): give a local copy with --data FILE") from None
    if sha256(path) != SHA256:
        raise DataError(f"{path} is not the official file (sha256): delete it, or give it with --data")
    return path


def fetch(path: Path) -> None:
    """Download the file; raises OSError or HTTPException, and leaves nothing, where it does not come whole."""
    with replacing(path) as temporary, urllib.request.urlopen(URL, timeout=30) as response:
        with open(temporary, "wb") as file:
            shutil.copyfileobj(response, file)
        if sha256(temporary) != SHA256:
            raise OSError("its sha256 is not the expected one")


def load(path: Path, limit: int | None = None) -> list[Example]:
    """Read and encode the examples of a .jsonl file."""
    examples: list[Example] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if len(examples) == limit:
                break
            if line.strip():
                examples.append(read_example(line, f"{path}, line {number}"))
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def read_example(line: bytes, place: str) -> Example:
    """Encode one example; raises DataError where it is not one."""
    try:
        row = json.loads(line)
        context, endings, label = row["ctx"], row["endings"], int(row["label"])
        if not (context and isinstance(endings, list) and len(endings) == ENDINGS and label in range(ENDINGS)):
            raise ValueError("it needs a context, four endings, and a label from 0 to 3")
        return Example(encode(context), [encode(" " + ending) for ending in endings], label)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{place}, is not a HellaSwag example: {error}") from None


def batches(examples: list[Example]) -> Iterator[list[Example]]:
    """Group examples of like length, so that little is padding, within a budget of tokens."""
    batch: list[Example] = []
    for example in sorted(examples, key=Example.longest):
        if batch and (len(batch) + 1) * ENDINGS * example.longest() > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def ending_losses(gpt: GPT, batch: list[Example]) -> tuple[Tensor, Tensor]:
    """The total loss, in nats, of each ending's tokens, and their number: (examples, 4) each."""
    rows = [(example.context + ending, len(ending)) for example in batch for ending in example.endings]
    rows = [(tokens[-gpt.config.block_size :], scored) for tokens, scored in rows]  # the end of a long context
    width = max(len(tokens) for tokens, _ in rows)
    idx = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T), padded on the right, where no token looks
    scored = torch.zeros(len(rows), width - 1, dtype=torch.bool)  # (B, T - 1): whether the next token is of the ending
    for row, (tokens, count) in enumerate(rows):
        idx[row, : len(tokens)] = torch.tensor(tokens)
        scored[row, max(len(tokens) - 1 - count, 0) : len(tokens) - 1] = True
    device = gpt.lm_head.weight.device
    idx, scored = idx.to(device), scored.to(device)
    logits = gpt.lm_head(gpt.hidden(idx)[:, :-1][scored])  # (N, V), for the N tokens of endings alone
    losses = F.cross_entropy(logits.float(), idx[:, 1:][scored], reduction="none")  # (N)
    totals = torch.zeros(len(rows), device=device).index_add(0, scored.nonzero()[:, 0], losses)
    return totals.view(-1, ENDINGS), scored.sum(dim=1).view(-1, ENDINGS)


@torch.no_grad()
def count_correct(gpt: GPT, examples: list[Example], progress: bool = False) -> Tensor:
    """How many examples the model gets right by total and by mean loss: two integers."""
    correct = torch.zeros(2, dtype=torch.long)
    with tqdm(total=len(examples), unit=" examples", disable=None if progress else True) as bar:
        for batch in batches(examples):
            totals, lengths = ending_losses(gpt, batch)
            labels = torch.tensor([example.label for example in batch])
            for kind, losses in enumerate((totals, totals / lengths)):
                correct[kind] += (losses.argmin(dim=1).cpu() == labels).sum()
            bar.update(len(batch))
    return correct


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(HellaswagConfig, argv, __doc__)
    if config.data and not Path(config.data).is_file():
        raise UsageError(f"--data {config.data}: no such file")
    gpt = GPT.from_pretrained(config.model).to(choose_device(config.device))
    examples = load(Path(config.data) if config.data else download(), config.limit)
    acc, acc_norm = (int(correct) for correct in count_correct(gpt, examples, progress=True))
    n = len(examples)
    print(f"{n} examples: acc {acc / n:.4f} ({acc} right), acc_norm {acc_norm / n:.4f} ({acc_norm} right)")


if __name__ == "__main__":
    run(main)
