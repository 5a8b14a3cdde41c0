"""HellaSwag in batches equals HellaSwag one ending at a time; its file is fetched whole or not at all."""

import hashlib
import http.server
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import hellaswag
import train_gpt2
from model import GPT, PRESETS, GPTConfig
from tokenizer import encode

WORDS = "a man is sitting on roof he she runs pulls up the of and some water then".split()


def rows(count, seed=0):
    generator = random.Random(seed)

    def words(low, high):
        return " ".join(generator.choices(WORDS, k=generator.randrange(low, high)))

    return [
        {"ctx": words(1, 40), "endings": [words(1, 20) + "." for _ in range(4)], "label": generator.randrange(4)}
        for _ in range(count)
    ]


def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def scored_singly(gpt, examples):
    """Build-nanogpt's rule, an ending at a time."""
    correct = [0, 0]
    for example in examples:
        sums, means = [], []
        for ending in example["endings"]:
            context, tokens = encode(example["ctx"]), encode(" " + ending)
            idx = torch.tensor([(context + tokens)[-gpt.config.block_size :]])
            with torch.no_grad():
                logits, _ = gpt(idx)
            losses = F.cross_entropy(logits[0, :-1], idx[0, 1:], reduction="none")[-len(tokens) :]
            sums.append(losses.sum().item())
            means.append(losses.mean().item())
        correct[0] += min(range(4), key=sums.__getitem__) == example["label"]
        correct[1] += min(range(4), key=means.__getitem__) == example["label"]
    return correct


@pytest.mark.parametrize("block_size", [24, 128])
@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_batches_give_the_counts_of_single_endings(tmp_path, monkeypatch, block_size, batch_tokens):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=block_size, n_layer=2, n_head=2, n_embd=32))
    for parameter in gpt.parameters():
        parameter.data *= 4  # so that the endings differ by more than rounding
    examples = rows(30)
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", batch_tokens)
    loaded = hellaswag.load(write(tmp_path / "a.jsonl", examples))
    assert hellaswag.count_correct(gpt, loaded).tolist() == scored_singly(gpt, examples)


def test_totals_and_lengths_are_those_of_the_endings_tokens_alone(tmp_path):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16))
    example = rows(1)[0]
    totals, lengths = hellaswag.ending_losses(gpt, hellaswag.load(write(tmp_path / "a.jsonl", [example])))
    assert lengths[0].tolist() == [len(encode(" " + ending)) for ending in example["endings"]]
    for number, ending in enumerate(example["endings"]):
        idx = torch.tensor([encode(example["ctx"]) + encode(" " + ending)])
        losses = F.cross_entropy(gpt(idx)[0][0, :-1], idx[0, 1:], reduction="none")
        assert totals[0, number].item() == pytest.approx(losses[-int(lengths[0, number]) :].sum().item(), rel=1e-5)


def test_limit_takes_the_first_examples(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(10))
    assert hellaswag.load(path, 3) == hellaswag.load(path)[:3]


DAMAGED = ["{", "[]", '{"ctx": "a"}', '{"ctx": "a", "endings": ["b"], "label": 0}']
DAMAGED += ['{"ctx": "a", "endings": "abcd", "label": 0}']
DAMAGED += ['{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": Infinity}']


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
    scores = [record for record in logged(tmp_path / "log") if "hellaswag_acc" in record]
    assert [record["step"] for record in scores] == [0, 1, 2]
    checkpoint = str(tmp_path / "log" / "step_000002")
    capsys.readouterr()
    hellaswag.main(["--model", checkpoint, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"acc {scores[-1]['hellaswag_acc']:.4f}" in printed
    assert f"acc_norm {scores[-1]['hellaswag_acc_norm']:.4f}" in printed


def test_processes_share_the_examples_and_the_download(server, config, monkeypatch):
    whole = hellaswag.load(hellaswag.download())
    hellaswag.FILE.unlink()
    monkeypatch.setattr(train_gpt2.World, "sum", lambda world, values: values)  # as if the others had no trouble
    worlds = [train_gpt2.World(rank, 3, torch.device("cpu"), local_rank=0) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        shares = list(pool.map(lambda world: train_gpt2.load_hellaswag(config, world), worlds))
    assert server.requests == 2 and sorted(sum(shares, [])) == sorted(whole)
    assert [len(share) for share in shares] == [3, 3, 2]


def test_without_the_file_training_says_so_once_and_goes_on(server, config, tmp_path, capsys):
    server.status = 500
    train_gpt2.train(config)
    assert capsys.readouterr().out.count("HellaSwag") == 1
    assert [record["step"] for record in logged(tmp_path / "log") if "loss" in record] == [1, 2]
