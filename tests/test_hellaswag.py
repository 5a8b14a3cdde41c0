"""HellaSwag in batches equals HellaSwag one ending at a time; its file is fetched whole or not at all."""

import errno
import functools
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
from common.huggingface import save_gpt
from common.processes import World
from common.script import DataError, UsageError
from common.tokenizer import decode, encode
from model import GPT, PRESETS, GPTConfig
from recipes import RECIPES

WORDS = "a man is sitting on roof he she runs pulls up the of and some water then".split()


def make_examples(count):
    generator = random.Random(0)

    def words(low, high):
        return " ".join(generator.choices(WORDS, k=generator.randrange(low, high)))

    examples = []
    for number in range(count):
        ctx_a = words(1, 40) + "."
        ctx_b = words(1, 4) if number % 2 else ""
        endings = [words(1, 20) + generator.choice([".", "  [step]", " [title] it."]) for _ in range(4)]
        if number % 5 == 0:
            endings[2] = endings[0]  # identical endings, as some examples have
        example = {"activity_label": " Roof [header] repair", "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings}
        examples.append(example | {"ctx": f"{ctx_a} {ctx_b}".strip(), "label": generator.randrange(4)})
    return examples


def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def load(tmp_path, count):
    return hellaswag.load(write(tmp_path / "examples.jsonl", make_examples(count)))


def nanogpt(example):
    """Build-nanogpt's rule: context and endings as tokens, and the lengths to divide by."""
    endings = [encode(" " + ending) for ending in example["endings"]]
    return encode(example["ctx"]), endings, [len(tokens) for tokens in endings]


def lm_eval(example):
    """The rule of lm-evaluation-harness, hellaswag 1.0."""

    def preprocess(text):
        return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = example["ctx_a"] + " " + example["ctx_b"].capitalize()
    context = preprocess(example["activity_label"] + ": " + context)
    choices = [preprocess(ending) for ending in example["endings"]]
    stripped = encode(context.rstrip())
    endings = [encode(context + " " + choice)[len(stripped) :] for choice in choices]
    return stripped, endings, [len(choice) for choice in choices]


def loss_of(gpt, context, ending):
    """The total loss of an ending in a pass of its own, after as much of the context as fits."""
    window = (context + ending)[-gpt.config.block_size - 1 :]
    scored = min(len(ending), gpt.config.block_size)
    with torch.no_grad():
        logits, _ = gpt(torch.tensor([window[:-1]]))
    return F.cross_entropy(logits[0, -scored:], torch.tensor(window[-scored:]), reduction="sum").item()


@functools.cache
def random_gpt(block_size):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=block_size, n_layer=2, n_head=2, n_embd=32))
    for parameter in gpt.parameters():
        parameter.data *= 4  # so that the endings differ by more than rounding
    return gpt


@functools.cache
def counted_singly(block_size, count):
    """Each scoring's numbers of right answers, an ending at a time."""
    correct = [[0, 0], [0, 0]]
    for example in make_examples(count):
        for scoring, rule in enumerate((nanogpt, lm_eval)):
            context, endings, lengths = rule(example)
            sums = [loss_of(random_gpt(block_size), context, ending) for ending in endings]
            means = [total / length for total, length in zip(sums, lengths, strict=True)]
            correct[scoring][0] += sums.index(min(sums)) == example["label"]
            correct[scoring][1] += means.index(min(means)) == example["label"]
    return correct


@pytest.mark.parametrize("block_size", [8, 24, 128])
@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_batches_give_the_counts_of_single_endings(tmp_path, block_size, batch_tokens):
    correct = hellaswag.count_correct(random_gpt(block_size), load(tmp_path, 12), batch_tokens)
    assert correct.tolist() == counted_singly(block_size, 12)


@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_losses_are_those_of_the_endings_tokens_alone(tmp_path, block_size):
    gpt, questions = random_gpt(block_size), load(tmp_path, 4)
    losses = hellaswag.ending_losses(gpt, questions, batch_tokens=1000).tolist()
    for question, totals in zip(questions, losses, strict=True):
        expected = [loss_of(gpt, question.context, ending) for ending in question.endings]
        assert totals == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def spied(monkeypatch):
    """spied(gpt) returns the lists of shapes that its network and its LM head are then given."""

    def spy(gpt):
        hidden, logits = gpt.hidden, gpt.logits
        tokens_read, states_scored = [], []
        monkeypatch.setattr(gpt, "hidden", lambda idx, *rest: tokens_read.append(idx.shape) or hidden(idx, *rest))
        monkeypatch.setattr(gpt, "logits", lambda states: states_scored.append(states.shape) or logits(states))
        return tokens_read, states_scored

    return spy


@pytest.mark.parametrize("too_small_by, sequences", [(0, 1), (1, 4)])
def test_endings_share_the_context_if_all_of_them_fit_behind_it(tmp_path, spied, too_small_by, sequences):
    question = load(tmp_path, 1)[0]
    longest = max(map(len, question.endings))
    gpt = random_gpt(len(question.context) + longest - 1 - too_small_by)
    expected = [loss_of(gpt, question.context, ending) for ending in question.endings]
    tokens_read, _ = spied(gpt)
    losses = hellaswag.ending_losses(gpt, [question], batch_tokens=1000)
    assert losses[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert sum(shape[0] for shape in tokens_read) == sequences


def test_a_context_is_read_once_and_the_lm_head_runs_only_where_an_ending_is_scored(tmp_path, spied):
    gpt, questions = random_gpt(128), load(tmp_path, 6)
    tokens_read, states_scored = spied(gpt)
    hellaswag.count_correct(gpt, questions, batch_tokens=1)
    n_scored = sum(sum(map(len, question.endings)) for question in questions)
    assert sum(shape[0] for shape in states_scored) == n_scored
    # each ending reads the context's last token again in place of its own last one
    assert sum(shape.numel() for shape in tokens_read) == n_scored + sum(len(q.context) - 1 for q in questions)


@pytest.mark.parametrize("block_size", [16, 128])  # where most questions take four rows, and where all take one
def test_batches_keep_within_the_budget_with_little_padding(tmp_path, spied, block_size):
    gpt, questions = random_gpt(block_size), load(tmp_path, 20)
    tokens_read, _ = spied(gpt)
    hellaswag.count_correct(gpt, questions, batch_tokens=1)
    unpadded = sum(shape.numel() for shape in tokens_read)
    tokens_read.clear()
    hellaswag.count_correct(gpt, questions, batch_tokens=700)
    assert max(shape.numel() for shape in tokens_read) <= 700
    assert unpadded <= sum(shape.numel() for shape in tokens_read) < 1.25 * unpadded
    assert len(tokens_read) < 1.5 * unpadded / 700 + 2


def test_of_identical_endings_the_first_wins(tmp_path, monkeypatch):
    example = make_examples(1)[0] | {"endings": ["is."] * 4, "label": 0}
    questions = hellaswag.load(write(tmp_path / "a.jsonl", [example]))
    noise = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 2, dtype=torch.float64)  # as rounding might be
    monkeypatch.setattr(hellaswag, "ending_losses", lambda *_: 1 + 1e-9 * noise)
    assert hellaswag.count_correct(random_gpt(128), questions).tolist() == [[1, 1], [1, 1]]


def test_without_questions_nothing_is_counted():
    assert hellaswag.count_correct(random_gpt(128), []).tolist() == [[0, 0], [0, 0]]


def test_accuracies_are_shares_of_the_examples_by_name():
    correct = torch.tensor([[1, 2], [3, 4]])
    expected = {"nanogpt_acc": 0.25, "nanogpt_acc_norm": 0.5, "lm_eval_acc": 0.75, "lm_eval_acc_norm": 1.0}
    assert hellaswag.accuracies(correct, n_questions=8) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(tmp_path, value):
    gpt = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16))
    gpt.transformer.ln_f.bias.data[0] = value
    with pytest.raises(FloatingPointError, match="losses are not finite"):
        hellaswag.count_correct(gpt, load(tmp_path, 2))


def test_the_harness_cleans_and_joins_the_texts():
    example = {
        "activity_label": "Fixing [header] a  roof",
        "ctx": "He climbs.",
        "ctx_a": "[title] How to climb [title] Take   care.",
        "ctx_b": "THE man [substeps]",
        "endings": [" falls [step] down. [title] Up", "sits.", "a", "b"],
        "label": "1",
    }
    _, question = hellaswag.read_example(json.dumps(example).encode())
    assert decode(question.context) == "Fixing a roof:. How to climb. Take  care. The man"
    assert [decode(ending) for ending in question.endings] == ["  falls down.. Up", "  sits.", "  a", "  b"]
    assert question.lengths == [len("falls down.. Up"), 5, 1, 1] and question.label == 1


def test_a_share_takes_its_examples_in_order(tmp_path):
    questions = load(tmp_path, 10)
    assert hellaswag.load(tmp_path / "examples.jsonl", slice(3)) == questions[:6]
    second_of_three = hellaswag.load(tmp_path / "examples.jsonl", slice(1, None, 3))
    assert second_of_three == questions[2:4] + questions[8:10] + questions[14:16]


WHOLE = {"activity_label": "a", "ctx": "a", "ctx_a": "a", "ctx_b": "a", "endings": ["a", "b", "c", "d"], "label": 0}
DAMAGED = [
    "{",
    "[]",
    "1",
    "[" * 100_000,
    '{"ctx": "a"}',
    *(json.dumps({key: value for key, value in WHOLE.items() if key != name}) for name in WHOLE),
    *(json.dumps(WHOLE | {name: 1}) for name in WHOLE if name != "label"),
    json.dumps(WHOLE | {"ctx": ""}),
    json.dumps(WHOLE | {"activity_label": "[", "ctx_a": "", "ctx_b": "]"}),  # of which nothing is left when cleaned
    json.dumps(WHOLE | {"endings": "abcd"}),
    json.dumps(WHOLE | {"endings": ["b"]}),
    json.dumps(WHOLE | {"endings": ["a", "b", "c", 1]}),
    *(json.dumps(WHOLE | {"label": label}) for label in (4, -1, "", True, None, float("inf"))),
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:60])
def test_a_damaged_file_is_refused_by_line(tmp_path, line):
    path = write(tmp_path / "a.jsonl", [WHOLE])
    assert len(hellaswag.load(path)) == 2
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match="a.jsonl, line 2"):
        hellaswag.load(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no examples"):
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
    server.content = "".join(json.dumps(example) + "\n" for example in make_examples(8)).encode()
    server.status, server.sent, server.requests = 200, None, 0
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(server.content).hexdigest())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_file_is_downloaded_once_and_checked(server):
    assert hellaswag.download().read_bytes() == server.content
    hellaswag.download()
    assert server.requests == 1
    hellaswag.FILE.write_bytes(server.content[:-1])
    with pytest.raises(DataError, match="hellaswag_val.jsonl.*--data"):
        hellaswag.download()


def test_a_file_that_is_there_is_taken_also_where_nothing_can_be_written(server, monkeypatch):
    hellaswag.download()
    monkeypatch.setattr(hellaswag, "lock", lambda path: pytest.fail("a lock is a file beside the examples"))
    hellaswag.download()


def test_where_nothing_can_be_locked_the_file_cannot_be_had(server, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(DataError, match="cannot be locked.*No locks available.*--data FILE"):
        hellaswag.download()


def test_of_several_at_once_one_downloads(server):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: hellaswag.download(), range(4)))
    assert paths == [hellaswag.FILE] * 4 and server.requests == 1


@pytest.mark.parametrize("fault", ["cut", "other", "missing"])
def test_a_failed_download_leaves_nothing_in_the_way(server, tmp_path, fault):
    content = server.content
    if fault == "cut":
        server.sent = 100
    elif fault == "other":
        server.content = content.replace(b"roof", b"wall")
    else:
        server.status = 404
    with pytest.raises(DataError, match="cannot download .*--data"):
        hellaswag.download()
    assert [path.name for path in tmp_path.iterdir()] in ([], ["hellaswag_val.jsonl.lock"])
    server.sent, server.content, server.status = None, content, 200
    assert hellaswag.download().read_bytes() == content


def test_the_script_prints_the_accuracies_of_the_newest_checkpoint_of_log(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", make_examples(12))
    worse = GPT(GPTConfig(block_size=24, n_layer=1, n_head=2, n_embd=32))
    save_gpt(worse, tmp_path / "log" / "step_000009")
    save_gpt(random_gpt(24), tmp_path / "log" / "step_000010")
    hellaswag.main(["--data", str(data), "--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "12 examples"
    for line, scoring, (acc, acc_norm) in zip(printed[1:], ("nanogpt", "lm_eval"), counted_singly(24, 12), strict=True):
        expected = f"{scoring} acc {acc / 12:.4f} ({acc} right), acc_norm {acc_norm / 12:.4f} ({acc_norm} right)"
        assert line.split() == expected.split()


def test_a_vocabulary_smaller_than_gpt2s_is_refused_before_anything_is_downloaded(server, tmp_path):
    save_gpt(GPT(GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=1, n_embd=8)), tmp_path / "small")
    with pytest.raises(DataError, match="vocabulary"):
        hellaswag.main(["--checkpoint", str(tmp_path / "small")])
    assert server.requests == 0


@pytest.mark.parametrize(
    "settings", [{"limit": 0}, {"batch_tokens": 0}, {"data": "absent.jsonl"}, {"data": ""}, {"device": "tpu"}]
)
def test_a_setting_that_cannot_be_used_is_named_before_a_model_is_loaded(settings):
    with pytest.raises(UsageError, match=f"--{list(settings)[0]}"):
        hellaswag.evaluate(hellaswag.HellaswagConfig(checkpoint="absent", **settings))


@pytest.fixture
def config(make_shards, monkeypatch):
    """Two training steps of a tiny model, with HellaSwag before, between and after them."""
    monkeypatch.setitem(PRESETS, "debug", GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16))
    return replace(
        RECIPES["debug"],
        data_dir=str(make_shards()),
        device="cpu",
        dtype="float32",
        batch_size=1,
        total_batch_size=128,
        max_steps=2,
        eval_every=0,
        sample_every=0,
        hellaswag_every=1,
    )


def log_records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()]


def test_the_trainer_scores_as_the_script_does(server, config, tmp_path, capsys):
    train_gpt2.train(config)
    scores = [record for record in log_records(tmp_path) if "hellaswag_lm_eval_acc" in record]
    assert [record["step"] for record in scores] == [0, 1, 2]
    card = (tmp_path / "log" / "step_000002" / "README.md").read_text()
    capsys.readouterr()
    hellaswag.main(["--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "8 examples"
    for line, scoring in zip(printed[1:], ("nanogpt", "lm_eval"), strict=True):
        acc, acc_norm = (scores[-1][f"hellaswag_{scoring}_{kind}"] for kind in ("acc", "acc_norm"))
        assert line.split()[0] == scoring and f" acc {acc:.4f} (" in line and f" acc_norm {acc_norm:.4f} (" in line
        assert f"| hellaswag_{scoring}_acc | 2 | {acc:.4f} |" in card


def test_processes_share_the_examples_and_the_download(server, config, monkeypatch):
    whole = hellaswag.load(hellaswag.download())
    hellaswag.FILE.unlink()
    monkeypatch.setattr(World, "sum", lambda world, values: values)  # as if the others had no trouble
    worlds = [World(rank, 3, torch.device("cpu"), local_rank=0) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        shares = list(pool.map(lambda world: train_gpt2.load_hellaswag(config, world, None), worlds))
    assert server.requests == 2 and [len(share) for share in shares] == [6, 6, 4]
    assert sorted(map(repr, sum(shares, []))) == sorted(map(repr, whole))


def test_without_the_file_training_says_so_once_and_goes_on(server, config, tmp_path, capsys):
    server.status = 500
    train_gpt2.train(config)
    assert capsys.readouterr().out.count("HellaSwag") == 1
    assert [record["step"] for record in log_records(tmp_path) if "loss" in record] == [1, 2]


def test_where_its_losses_are_not_finite_training_goes_on_without_the_score(server, config, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise FloatingPointError("the model's losses are not finite")

    monkeypatch.setattr(hellaswag, "count_correct", refuse)
    train_gpt2.train(config)
    assert [record["step"] for record in log_records(tmp_path) if "loss" in record] == [1, 2]
    assert '"hellaswag_' not in (tmp_path / "log" / "log.jsonl").read_text()


def test_where_another_process_has_no_file_this_one_goes_on_without_it(config, monkeypatch):
    monkeypatch.setattr(World, "any_rank", lambda world, condition: True)
    assert train_gpt2.load_hellaswag(config, World(1, 2, torch.device("cpu"), local_rank=1), None) is None


def test_the_limit_and_the_size_of_a_batch_reach_the_scoring(tmp_path, monkeypatch, capsys):
    save_gpt(random_gpt(24), tmp_path / "log" / "step_000010")
    write(tmp_path / "a.jsonl", make_examples(5))
    asked = []

    def count(gpt, questions, batch_tokens, progress):
        asked.append((len(questions), batch_tokens))
        return torch.zeros(2, 2, dtype=torch.long)

    monkeypatch.setattr(hellaswag, "count_correct", count)
    hellaswag.main("--data a.jsonl --limit 3 --batch_tokens 77 --device cpu".split())
    assert asked == [(6, 77)] and capsys.readouterr().out.startswith("3 examples")


def test_a_server_that_stalls_is_given_up(monkeypatch):
    def urlopen(url, timeout):
        raise TimeoutError(f"nothing for {timeout} s")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(DataError, match=r"nothing for \d+ s.*--data FILE"):
        hellaswag.download()
