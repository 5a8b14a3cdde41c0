"""Model to accuracy: HellaSwag (Zellers et al., 2019), where a model picks the likeliest of four endings.

Two scorings, each with two figures: `acc` picks the ending whose tokens have the least total loss, `acc_norm` the one
with the least loss for its length. `nanogpt` is build-nanogpt's: the context as it is, the endings encoded by
themselves, length in tokens. `lm_eval` is that of EleutherAI's lm-evaluation-harness (task hellaswag, version 1.0): the
activity before the context, both texts cleaned and encoded together, length in characters.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common import script
from common.checkpoint import locate
from common.device import choose_device, explain_out_of_memory
from common.files import atomic_write, lock, sha256
from common.huggingface import load_gpt, require_gpt2_vocabulary
from common.script import DataError, Positive, UsageError
from common.tokenizer import encode
from model import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path("hellaswag_val.jsonl")
SCORINGS = ("nanogpt", "lm_eval")
ENDINGS = 4


@dataclass(frozen=True)
class HellaswagConfig:
    checkpoint: str = "log"  # checkpoint, run (its newest checkpoint), or model on the Hugging Face Hub such as gpt2-xl
    data: str | None = None  # file of examples; None: hellaswag_val.jsonl, downloaded if it is not there
    limit: Positive[int | None] = None  # score only this many examples from the start; None: all
    batch_tokens: Positive[int] = 8192  # tokens in a batch, at most, or one question; lower it for memory
    device: str = "auto"  # auto, cpu, mps, cuda or cuda:N


def download() -> Path:
    """Fetch the official validation set unless it is there; raises DataError if that fails."""
    try:
        if not FILE.is_file():
            fetch()
    except (OSError, HTTPException) as error:
        raise DataError(f"cannot download {URL} ({error}): give a local copy with --data FILE") from None
    if sha256(FILE) != SHA256:
        raise DataError(f"{FILE} is not the official file (SHA-256 mismatch): delete it, or give it with --data")
    return FILE


def fetch() -> None:
    """Download the file, or raise OSError or HTTPException and leave nothing; of several processes, one downloads."""
    with lock(FILE.absolute().with_name(f"{FILE.name}.lock")):
        if FILE.is_file():
            return
        with atomic_write(FILE) as temporary, urllib.request.urlopen(URL, timeout=10) as response:
            temporary.write_bytes(response.read())
            if sha256(temporary) != SHA256:
                raise OSError("SHA-256 mismatch")


@dataclass(frozen=True)
class Question:
    """An example as one of the scorings asks it."""

    scoring: str
    context: list[int]
    endings: list[list[int]]
    lengths: list[int]  # which acc_norm divides by
    label: int  # the index of the right ending


def load(path: Path, share: slice = slice(None)) -> list[Question]:
    """The questions of a share of a .jsonl file's examples; raises DataError for a line that is not an example."""
    questions = []
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(lines, share.start, share.stop, share.step):
            try:
                questions += read_example(line)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}, is not a HellaSwag example: {error!r}") from None
    if not questions and not share.start:
        raise DataError(f"{path} has no examples")
    return questions


def read_example(line: bytes) -> list[Question]:
    """One question for each scoring; raises ValueError or the like for a line that is not an example."""
    example = json.loads(line)
    endings, label = example["endings"], str(example["label"])
    if not isinstance(endings, list) or len(endings) != ENDINGS or label not in ("0", "1", "2", "3"):
        raise ValueError(f"it needs {ENDINGS} endings and a label from 0 to {ENDINGS - 1}")
    questions = [nanogpt_question(example), lm_eval_question(example)]
    if not all(question.context for question in questions):
        raise ValueError("its context is empty")
    return questions


def nanogpt_question(example: dict) -> Question:
    endings = [encode(" " + ending) for ending in example["endings"]]
    lengths = [len(ending) for ending in endings]
    return Question("nanogpt", encode(example["ctx"]), endings, lengths, int(example["label"]))


def lm_eval_question(example: dict) -> Question:
    context = clean(example["activity_label"] + ": " + example["ctx_a"] + " " + example["ctx_b"].capitalize())
    texts = [clean(ending) for ending in example["endings"]]
    tokens = encode(context.rstrip())  # spaces at its end become the endings'
    endings = [encode(f"{context} {text}")[len(tokens) :] for text in texts]
    return Question("lm_eval", tokens, endings, [len(text) for text in texts], int(example["label"]))


def clean(text: str) -> str:
    """Remove the markup of WikiHow's pages by the harness's rules, in its order."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def pack(context: list[int], endings: list[list[int]], first: int) -> Tensor:
    """Pack a context and its endings, numbered from `first`, into a row (3, T) of tokens, segments and targets.

    Context a b c with endings d e (number 1) and f g h (number 2):

    tokens    a b | c d | c f g    the last token of an ending is predicted, but not read
    segments  0 0 | 1 1 | 2 2 2    a token sees segment 0 and its own, up to itself
    targets   0 0 | d e | f g h
    """
    tokens = context[:-1]
    segments = [0] * len(tokens)
    targets = [0] * len(tokens)
    for number, ending in enumerate(endings, first):
        tokens += [context[-1], *ending[:-1]]
        segments += [number] * len(ending)
        targets += ending
    return torch.tensor([tokens, segments, targets])


def pack_question(question: Question, first: int, block_size: int) -> list[Tensor]:
    """One row, or, where an ending does not fit in block_size, one for each with the end of the context that does."""
    context, endings = question.context, question.endings
    if len(context) + max(map(len, endings)) <= block_size + 1:
        return [pack(context, endings, first)]
    rows = []
    for number, ending in enumerate(endings, first):
        window = (context + ending)[-block_size - 1 :]
        n_scored = min(len(ending), block_size)
        rows.append(pack(window[:-n_scored], [window[-n_scored:]], number))
    return rows


def batches(rows: list[Tensor], batch_tokens: int) -> Iterator[list[Tensor]]:
    """Group rows of similar width, so that little is padding; a batch is one row or has at most batch_tokens."""
    batch: list[Tensor] = []
    for row in sorted(rows, key=lambda row: row.shape[1]):
        if batch and (len(batch) + 1) * row.shape[1] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def token_losses(gpt: GPT, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, in nats, of each token of the rows' endings (N), and the number of its ending (N)."""
    padded = pad_sequence([row.T for row in rows], batch_first=True).to(gpt.transformer.wte.weight.device)
    idx, segments, targets = padded.unbind(dim=2)  # (B, T) each
    seen = segments[:, None, :]
    mask = ((seen == 0) | (seen == segments[:, :, None])).tril()  # (B, T, T); padding comes too late to be seen
    positions = mask.sum(dim=-1) - 1  # (B, T); a token comes after those that it sees
    positions = positions.clamp(max=gpt.config.block_size - 1)  # as padding's may be larger
    hidden = gpt.hidden(idx, positions, mask[:, None])  # (B, T, C)
    scored = segments > 0
    parts = []
    for part, part_targets in zip(hidden[scored].split(1024), targets[scored].split(1024), strict=True):
        logits = gpt.logits(part).float()  # (n, V), a large one
        parts.append(F.cross_entropy(logits, part_targets, reduction="none"))
    losses = torch.cat(parts).cpu().double()
    if not losses.isfinite().all():
        raise FloatingPointError("the model's losses are not finite: its weights have diverged or are damaged")
    return losses, segments[scored].cpu()


@torch.no_grad()
def ending_losses(gpt: GPT, questions: list[Question], batch_tokens: int, progress: bool = False) -> Tensor:
    """The total loss, in nats, of each question's endings (Q, 4); raises FloatingPointError unless it is finite."""
    rows = []
    for number, question in enumerate(questions):
        rows += pack_question(question, 1 + number * ENDINGS, gpt.config.block_size)
    totals = torch.zeros(1 + len(questions) * ENDINGS, dtype=torch.float64)
    with script.progress_bar(progress, total=len(rows), unit=" rows", leave=False) as bar:
        for batch in batches(rows, batch_tokens):
            losses, numbers = token_losses(gpt, batch)
            totals.index_add_(0, numbers, losses)
            bar.update(len(batch))
    return totals[1:].view(-1, ENDINGS)


def count_correct(gpt: GPT, questions: list[Question], batch_tokens: int = 8192, progress: bool = False) -> Tensor:
    """Right answers of each scoring, by `acc` and `acc_norm`: integers (2, 2); raises what `ending_losses` raises."""
    correct = torch.zeros(len(SCORINGS), 2, dtype=torch.long)
    for question, losses in zip(questions, ending_losses(gpt, questions, batch_tokens, progress), strict=True):
        # identical endings tie, whatever their rounding, and the first wins
        losses = losses[[question.endings.index(ending) for ending in question.endings]]
        scoring = SCORINGS.index(question.scoring)
        correct[scoring, 0] += losses.argmin() == question.label
        correct[scoring, 1] += (losses / torch.tensor(question.lengths)).argmin() == question.label
    return correct


def accuracies(correct: Tensor, n_questions: int) -> dict[str, float]:
    """The accuracies by name, such as `lm_eval_acc_norm`, from `count_correct`'s counts."""
    names = [f"{scoring}_{kind}" for scoring in SCORINGS for kind in ("acc", "acc_norm")]
    return dict(zip(names, (correct.flatten() * len(SCORINGS) / n_questions).tolist(), strict=True))


def evaluate(config: HellaswagConfig) -> None:
    """Score a checkpoint and print its figures; raises UsageError or DataError."""
    script.check_settings(config)
    if config.data is not None and not Path(config.data).is_file():
        raise UsageError(f"--data {config.data}: no such file")
    device = choose_device(config.device)
    gpt = load_gpt(locate(config.checkpoint))
    require_gpt2_vocabulary(gpt, config.checkpoint)
    questions = load(Path(config.data or download()), slice(config.limit))
    try:
        with explain_out_of_memory("--batch_tokens"):
            correct = count_correct(gpt.to(device), questions, config.batch_tokens, progress=True)
    except FloatingPointError as error:
        raise DataError(f"{config.checkpoint}: {error}") from None
    n = len(questions) // len(SCORINGS)
    print(f"{n} examples")
    for scoring, (acc, acc_norm) in zip(SCORINGS, correct.tolist(), strict=True):
        print(f"{scoring:8} acc {acc / n:.4f} ({acc} right), acc_norm {acc_norm / n:.4f} ({acc_norm} right)")


def main(argv: list[str] | None = None) -> None:
    evaluate(script.parse_flags(HellaswagConfig, argv, __doc__))


if __name__ == "__main__":
    script.run(main)
