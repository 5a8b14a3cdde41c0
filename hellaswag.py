"""Model to accuracy: HellaSwag (Zellers et al., 2019), where a model picks the likeliest of four endings.

    python hellaswag.py --model log/step_019073

Two scorings, each with two figures: `acc` picks the ending whose tokens have the least total loss, `acc_norm` the one
with the least loss for its length.

nanogpt, as build-nanogpt does: the context as it is, the endings encoded apart; length in tokens.
lm_eval, as EleutherAI's lm-evaluation-harness does (task hellaswag, version 1.0): the activity before the context, both
    texts cleaned, and encoded together; length in characters.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import (
    DataError,
    Flags,
    UsageError,
    choose_device,
    flag,
    locked,
    naming_remedy,
    parse_flags,
    progress_bar,
    replacing,
    required,
    run,
    sha256,
)
from model import GPT, SOURCES
from tokenizer import encode

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path("hellaswag_val.jsonl")
SCORINGS = ("nanogpt", "lm_eval")
ENDINGS = 4
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HellaswagConfig(Flags):
    model: str = flag(required, SOURCES)
    data: str | None = flag(None, f"file of examples (default: {FILE}, downloaded if it is not there)")
    limit: int | None = flag(None, "score only this many examples from the start (default: all)", least=1)
    batch_tokens: int = flag(BATCH_TOKENS, "tokens in a batch, at most, or one question; lower it for memory", least=1)
    device: str = flag("auto", "auto, cpu, mps, cuda or cuda:N")


class Question(NamedTuple):
    """An example as one of the scorings puts it: tokens, the endings' lengths, and which ending is right."""

    scoring: int
    context: list[int]
    endings: list[list[int]]
    lengths: list[int]
    label: int


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


def load(path: Path, share: slice = slice(None)) -> list[Question]:
    """Read and encode a share of a .jsonl file's examples, two questions each."""
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        chosen = itertools.islice(lines, share.start, share.stop, share.step)
        questions = [q for number, line in chosen for q in read_example(line, f"{path}, line {number}")]
    if not questions and not share.start:
        raise DataError(f"{path} holds no examples")
    return questions


def read_example(line: bytes, place: str) -> list[Question]:
    """Encode one example for both scorings; raises DataError where it is not one."""
    try:
        row = json.loads(line)
        endings, label = row["endings"], int(row["label"])
        if not (row["ctx"] and isinstance(endings, list) and len(endings) == ENDINGS and label in range(ENDINGS)):
            raise ValueError("it needs a context, four endings, and a label from 0 to 3")
        apart = [encode(" " + ending) for ending in endings]
        nanogpt = Question(0, encode(row["ctx"]), apart, [len(tokens) for tokens in apart], label)
        context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        cleaned = [clean(ending) for ending in endings]
        together = [encode(f"{context} {ending}") for ending in cleaned]
        start = encode(context.rstrip())  # spaces at its end become the ending's
        split = [tokens[len(start) :] for tokens in together]
        return [nanogpt, Question(1, start, split, [len(ending) for ending in cleaned], label)]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{place}, is not a HellaSwag example: {error}") from None


def clean(text: str) -> str:
    """Take out what WikiHow's pages left in the texts, by the harness's rules, in its order."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


class Row(NamedTuple):
    """A context and endings of it, which are read together: each ending sees the context and itself."""

    context: list[int]
    endings: list[list[int]]

    def width(self) -> int:
        """How many tokens are read: the last one of an ending is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)

    def layout(self) -> tuple[list[int], list[int], list[int]]:
        """The tokens to read, their positions, and whose they are: 0 the context's, 1 the first ending's ..."""
        tokens, positions, parts = [*self.context], [*range(len(self.context))], [0] * len(self.context)
        for number, ending in enumerate(self.endings, 1):
            tokens += ending[:-1]
            positions += range(len(self.context), len(self.context) + len(ending) - 1)
            parts += [number] * (len(ending) - 1)
        return tokens, positions, parts

    def predictors(self) -> Iterator[int]:
        """The places in the row after which the tokens of the endings come."""
        start = len(self.context)
        for ending in self.endings:
            yield len(self.context) - 1
            yield from range(start, start + len(ending) - 1)
            start += len(ending) - 1


def rows(question: Question, block_size: int) -> list[Row]:
    """A question as one row; where an ending does not fit, as a row each, with the end of the context that does."""
    context, endings = question.context, question.endings
    if len(context) + max(map(len, endings)) <= block_size + 1:
        return [Row(context, endings)]
    windows = [(context + ending)[-block_size - 1 :] for ending in endings]
    scored = [min(len(ending), block_size) for ending in endings]
    return [Row(tokens[:-count], [tokens[-count:]]) for tokens, count in zip(windows, scored, strict=True)]


Asked = tuple[Question, list[Row]]


def batches(questions: list[Question], block_size: int, batch_tokens: int) -> Iterator[list[Asked]]:
    """Group questions whose rows have a like width, so that little is padding, within a budget of tokens."""
    asked = [(question, rows(question, block_size)) for question in questions]
    batch: list[Asked] = []
    for one in sorted(asked, key=widest):
        count = sum(len(read) for _, read in [*batch, one])
        if batch and count * widest(one) > batch_tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def widest(asked: Asked) -> int:
    return max(row.width() for row in asked[1])


def ending_losses(gpt: GPT, batch: list[Row]) -> Tensor:
    """The total loss, in nats, of the tokens of each row's endings, one after the other."""
    device = gpt.lm_head.weight.device
    columns = zip(*(row.layout() for row in batch), strict=True)
    # what pads the shorter rows is a part of its own, which the others do not see
    padded = [pad(column, value) for column, value in zip(columns, (0, 0, -1), strict=True)]
    idx, positions, parts = (tensor.to(device) for tensor in padded)  # (B, T) each
    T, seen = idx.shape[1], parts[:, None, :]
    mask = ((seen == 0) | (seen == parts[:, :, None])).tril()  # (B, T, T)
    hidden = gpt.hidden(idx, positions, mask[:, None]).flatten(0, 1)  # (B T, C)
    endings = [ending for row in batch for ending in row.endings]
    before = [number * T + place for number, row in enumerate(batch) for place in row.predictors()]
    losses = token_losses(gpt, hidden[torch.tensor(before, device=device)], sum(endings, []))
    owners = torch.arange(len(endings)).repeat_interleave(torch.tensor([len(ending) for ending in endings]))
    return torch.zeros(len(endings), dtype=torch.float64).index_add(0, owners, losses)


def pad(lists: list[list[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(some) for some in lists], batch_first=True, padding_value=value)


def token_losses(gpt: GPT, hidden: Tensor, targets: list[int]) -> Tensor:
    """The losses of tokens (N) after hidden states (N, C), on the CPU; logits of few at a time, which are large."""
    pairs = zip(hidden.split(1024), torch.tensor(targets, device=hidden.device).split(1024), strict=True)
    losses = [F.cross_entropy(gpt.lm_head(some).float(), wanted, reduction="none") for some, wanted in pairs]
    return torch.cat(losses).cpu().double()


@torch.no_grad()
def count_correct(
    gpt: GPT, questions: list[Question], batch_tokens: int = BATCH_TOKENS, progress: bool = False
) -> Tensor:
    """How many questions of each scoring the model gets right, by `acc` and by `acc_norm`: integers (2, 2)."""
    correct = torch.zeros(len(SCORINGS), 2, dtype=torch.long)
    with progress_bar(progress, total=len(questions), unit=" questions", leave=False) as bar:
        for batch in batches(questions, gpt.config.block_size, batch_tokens):
            correct += count_batch(gpt, batch)
            bar.update(len(batch))
    return correct


def count_batch(gpt: GPT, batch: list[Asked]) -> Tensor:
    """What `count_correct` counts, of one batch."""
    questions = [question for question, _ in batch]
    # a tie of endings that are alike goes to the first, whatever their rounding is
    alike = torch.tensor([[q.endings.index(ending) for ending in q.endings] for q in questions])
    totals = ending_losses(gpt, [row for _, read in batch for row in read]).view(-1, ENDINGS).gather(1, alike)
    lengths, labels = torch.tensor([q.lengths for q in questions]), torch.tensor([q.label for q in questions])
    right = [losses.argmin(dim=1) == labels for losses in (totals, totals / lengths)]
    scorings = torch.tensor([q.scoring for q in questions])
    return torch.zeros(len(SCORINGS), 2, dtype=torch.long).index_add(0, scorings, torch.stack(right, dim=1).long())


def accuracies(correct: Tensor, questions: int) -> dict[str, float]:
    """The figures by their names, such as `lm_eval_acc_norm`, from `count_correct`'s of so many questions."""
    names = [f"{scoring}_{kind}" for scoring in SCORINGS for kind in ("acc", "acc_norm")]
    return dict(zip(names, (correct.flatten() * len(SCORINGS) / questions).tolist(), strict=True))


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(HellaswagConfig, argv, __doc__)
    if config.data and not Path(config.data).is_file():
        raise UsageError(f"--data {config.data}: no such file")
    gpt = GPT.from_pretrained(config.model).to(choose_device(config.device))
    questions = load(Path(config.data) if config.data else download(), slice(config.limit))
    with naming_remedy("--batch_tokens"):
        correct = count_correct(gpt, questions, config.batch_tokens, progress=True)
    n = len(questions) // len(SCORINGS)
    print(f"{n} examples")
    for scoring, (acc, acc_norm) in zip(SCORINGS, correct.tolist(), strict=True):
        print(f"{scoring:8} acc {acc / n:.4f} ({acc} right), acc_norm {acc_norm / n:.4f} ({acc_norm} right)")


if __name__ == "__main__":
    run(main)
