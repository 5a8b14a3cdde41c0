"""HellaSwag in batches equals HellaSwag one ending at a time; its file is fetched whole or not at all."""

import hashlib
import http.server
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import hellaswag
import train_gpt2
from model import GPT, PRESETS, GPTConfig
from tokenizer import decode, encode

WORDS = "a man is sitting on roof he she runs pulls up the of and some water then".split()


def rows(count, seed=0):
    generator = random.Random(seed)

    def words(low, high):
        return " ".join(generator.choices(WORDS, k=generator.randrange(low, high)))

    examples = []
    for number in range(count):
        ctx_a, ctx_b = words(1, 40) + ".", words(1, 4) if number % 2 else ""
        endings = [words(1, 20) + generator.choice([".", "  [step]", " [title] it."]) for _ in range(4)]
        if number % 5 == 0:
            endings[2] = endings[0]  # as some examples have
        example = {"activity_label": " Roof [header] repair", "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings}
        examples.append(example | {"ctx": f"{ctx_a} {ctx_b}".strip(), "label": generator.randrange(4)})
    return examples


def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def nanogpt(example):
    """Build-nanogpt's rule: context and endings as tokens, and the lengths to divide by."""
    endings = [encode(" " + ending) for ending in example["endings"]]
    return encode(example["ctx"]), endings, [len(tokens) for tokens in endings]


def lm_eval(example):
    """The rule of lm-evaluation-harness, hellaswag 1.0."""

    def preprocess(text):
        return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = example["ctx_a"] + " " + example["ctx_b"].capitalize()
    context, choices = preprocess(example["activity_label"] + ": " + context), map(preprocess, example["endings"])
    choices, stripped = list(choices), context.rstrip()
    endings = [encode(context + " " + choice)[len(encode(stripped)) :] for choice in choices]
    return encode(stripped), endings, [len(choice) for choice in choices]


def loss_of(gpt, context, ending):
    """The total loss of an ending in a pass of its own, after as much of the context as fits."""
    window = (context + ending)[-gpt.config.block_size - 1 :]
    scored = min(len(ending), gpt.config.block_size)
    with torch.no_grad():
        logits, _ = gpt(torch.tensor([window[:-1]]))
    return F.cross_entropy(logits[0, -scored:], torch.tensor(window[-scored:]), reduction="sum").item()


def scored_singly(gpt, examples):
    """Each scoring's numbers of right answers, an ending at a time."""
    correct = [[0, 0], [0, 0]]
    for example in examples:
        for scoring, rule in enumerate((nanogpt, lm_eval)):
            context, endings, lengths = rule(example)
            sums = [loss_of(gpt, context, ending) for ending in endings]
            means = [total / length for total, length in zip(sums, lengths, strict=True)]
            for kind, losses in enumerate((sums, means)):
                correct[scoring][kind] += min(range(4), key=losses.__getitem__) == example["label"]
    return correct


def random_gpt(block_size):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=block_size, n_layer=2, n_head=2, n_embd=32))
    for parameter in gpt.parameters():
        parameter.data *= 4  # so that the endings differ by more than rounding
    return gpt


@pytest.mark.parametrize("block_size", [8, 24, 128])
@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_batches_give_the_counts_of_single_endings(tmp_path, block_size, batch_tokens):
    gpt, examples = random_gpt(block_size), rows(30)
    questions = hellaswag.load(write(tmp_path / "a.jsonl", examples))
    assert hellaswag.count_correct(gpt, questions, batch_tokens).tolist() == scored_singly(gpt, examples)


@pytest.mark.parametrize("block_size", [8, 128])
def test_losses_are_those_of_the_endings_tokens_alone(tmp_path, block_size):
    gpt, examples = random_gpt(block_size), rows(4)
    questions = hellaswag.load(write(tmp_path / "a.jsonl", examples))
    with torch.no_grad():
        read = [row for question in questions for row in hellaswag.rows(question, block_size)]
        losses = hellaswag.ending_losses(gpt, read).view(-1, 4).tolist()
    for question, totals in zip(questions, losses, strict=True):
        expected = [loss_of(gpt, question.context, ending) for ending in question.endings]
        assert totals == pytest.approx(expected, rel=1e-5)


def test_each_context_is_read_once_and_the_classifier_runs_only_where_an_ending_is_scored(tmp_path, monkeypatch):
    gpt = random_gpt(128)
    questions = hellaswag.load(write(tmp_path / "a.jsonl", rows(6)))
    read, scored, classify = [], [], gpt.lm_head.forward
    monkeypatch.setattr(gpt, "check_ids", lambda idx: read.append(idx.numel()))
    monkeypatch.setattr(gpt.lm_head, "forward", lambda x: (scored.append(len(x)), classify(x))[1])
    hellaswag.count_correct(gpt, questions, batch_tokens=1)
    assert sum(read) == sum(len(q.context) + sum(len(ending) - 1 for ending in q.endings) for q in questions)
    assert sum(scored) == sum(len(ending) for q in questions for ending in q.endings)


@pytest.mark.parametrize("block_size", [16, 128])  # where most questions take four rows, and where all take one
def test_what_is_read_keeps_within_the_budget_with_little_padding(tmp_path, monkeypatch, block_size):
    gpt, shapes = random_gpt(block_size), []
    questions = hellaswag.load(write(tmp_path / "a.jsonl", rows(40)))
    monkeypatch.setattr(gpt, "check_ids", lambda idx: shapes.append(idx.shape))
    hellaswag.count_correct(gpt, questions, batch_tokens=1000)
    assert all(height * width <= 1000 for height, width in shapes)
    read = sum(row.width() for question in questions for row in hellaswag.rows(question, block_size))
    assert read <= sum(height * width for height, width in shapes) < 1.25 * read
    assert len(shapes) < 1.5 * read / 1000 + 2


def test_of_endings_that_are_alike_the_first_wins(tmp_path, monkeypatch):
    example = rows(1)[0] | {"endings": ["is."] * 4}
    questions = hellaswag.load(write(tmp_path / "a.jsonl", [example | {"label": 0}]))
    noise = torch.tensor([3.0, 2.0, 1.0, 0.0] * 2, dtype=torch.float64)  # as rounding might be
    monkeypatch.setattr(hellaswag, "ending_losses", lambda gpt, batch: 1 + 1e-9 * noise)
    assert hellaswag.count_correct(random_gpt(128), questions).tolist() == [[1, 1], [1, 1]]


def test_the_harness_cleans_and_joins_the_texts():
    example = {
        "activity_label": "Fixing [header] a  roof",
        "ctx": "He climbs.",
        "ctx_a": "[title] How to climb [title] Take   care.",
        "ctx_b": "THE man [substeps]",
        "endings": [" falls [step] down. [title] Up", "sits.", "a", "b"],
        "label": "1",
    }
    _, question = hellaswag.read_example(json.dumps(example).encode(), "here")
    assert decode(question.context) == "Fixing a roof:. How to climb. Take  care. The man"
    assert [decode(ending) for ending in question.endings] == ["  falls down.. Up", "  sits.", "  a", "  b"]
    assert question.lengths == [len("falls down.. Up"), 5, 1, 1] and question.label == 1


def test_limit_takes_the_first_examples(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(10))
    assert hellaswag.load(path, slice(3)) == hellaswag.load(path)[:6]


DAMAGED = ["{", "[]", '{"ctx": "a"}', '{"ctx": "a", "endings": ["b"], "label": 0}']
DAMAGED += ['{"ctx": "a", "endings": "abcd", "label": 0}']
DAMAGED += ['{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": Infinity}']
DAMAGED += [
    '{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 0, "activity_label": "a", "ctx_a": "a", "ctx_b": 1}'
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_file_is_refused_by_line(tmp_path, line):
    write(tmp_path / "a.jsonl", rows(1))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        hellaswag.load(tmp_path / "a.jsonl")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no examples"):
        hellaswag.load(tmp_path / "a.jsonl")


@pytest.fixture
def server(monkeypatch):
    """Serve `server.content` on 127.0.0.1 in place of the official file."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content[: server.sent])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content = "".join(json.dumps(example) + "\n" for example in rows(8)).encode()
    server.status, server.sent, server.requests = 200, None, 0
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(server.content).hexdigest())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_file_is_downloaded_once_and_checked(server, tmp_path):
    assert hellaswag.download().read_bytes() == server.content
    hellaswag.download()
    assert server.requests == 1
    hellaswag.FILE.write_bytes(server.content[:-1])
    with pytest.raises(ValueError, match="hellaswag_val.jsonl"):
        hellaswag.download()


@pytest.mark.parametrize("fault", ["cut", "other", "missing"])
def test_a_failed_download_leaves_nothing(server, tmp_path, fault):
    if fault == "cut":
        server.sent = 100
    elif fault == "other":
        server.content = server.content.replace(b"roof", b"wall")
    else:
        server.status = 404
    with pytest.raises(ValueError, match="cannot download .*--data"):
        hellaswag.download()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def config(make_shards, monkeypatch):
    monkeypatch.setitem(PRESETS, "debug", GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16))
    return train_gpt2.TrainConfig(
        model="debug",
        data_dir=str(make_shards()),
        device="cpu",
        batch_size=1,
        total_batch_size=128,
        max_steps=2,
        eval_every=0,
        sample_every=0,
        hellaswag_every=1,
    )


def logged(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_the_trainer_scores_as_the_script_does(server, config, tmp_path, capsys):
    train_gpt2.train(replace(config, dtype="float32"))
    scores = [record for record in logged(tmp_path / "log") if "hellaswag_lm_eval_acc" in record]
    assert [record["step"] for record in scores] == [0, 1, 2]
    checkpoint = tmp_path / "log" / "step_000002"
    capsys.readouterr()
    hellaswag.main(["--model", str(checkpoint), "--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "8 examples"
    for line, scoring in zip(printed[1:], ("nanogpt", "lm_eval"), strict=True):
        acc, acc_norm = (scores[-1][f"hellaswag_{scoring}_{kind}"] for kind in ("acc", "acc_norm"))
        assert line.split()[0] == scoring and f" acc {acc:.4f} (" in line and f" acc_norm {acc_norm:.4f} (" in line
        assert f"| hellaswag_{scoring}_acc | 2 | {acc:.4f} |" in (checkpoint / "README.md").read_text()


def test_processes_share_the_examples_and_the_download(server, config, monkeypatch):
    whole = hellaswag.load(hellaswag.download())
    hellaswag.FILE.unlink()
    monkeypatch.setattr(train_gpt2.World, "sum", lambda world, values: values)  # as if the others had no trouble
    worlds = [train_gpt2.World(rank, 3, torch.device("cpu"), local_rank=0) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        shares = list(pool.map(lambda world: train_gpt2.load_hellaswag(config, world), worlds))
    assert server.requests == 2 and sorted(sum(shares, [])) == sorted(whole)
    assert [len(share) for share in shares] == [6, 6, 4]


def test_without_the_file_training_says_so_once_and_goes_on(server, config, tmp_path, capsys):
    server.status = 500
    train_gpt2.train(config)
    assert capsys.readouterr().out.count("HellaSwag") == 1
    assert [record["step"] for record in logged(tmp_path / "log") if "loss" in record] == [1, 2]
