"""The network equals OpenAI's GPT-2, and refuses what it cannot compute."""

import json
import math
import os
import subprocess
import sys

import hub_server
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

import tokenizer
from model import GPT, PRESETS, CrossEntropy, GPTConfig, draw

SMALL = GPTConfig(block_size=32, vocab_size=211, n_layer=3, n_head=4, n_embd=32)


def small_gpt(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return GPT(config)


def tokens(*shape, config=SMALL, seed=1):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def parameter_count(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


@pytest.mark.parametrize(
    ("preset", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_parameter_counts_of_openais_models(preset, count):
    config = PRESETS[preset]
    padding = (config.vocab_size - 50257) * config.n_embd
    assert parameter_count(config) - padding == count


def test_the_default_vocabulary_is_padded_to_a_multiple_of_128():
    assert GPTConfig().vocab_size == 50304 and 50304 % 128 == 0
    assert parameter_count(GPTConfig(vocab_size=50257)) == 124_439_808


def test_embedding_and_classifier_are_one_tensor():
    gpt = small_gpt()
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    gpt.to(torch.float64)
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


def test_initial_weights_have_the_stated_spread():
    gpt = small_gpt(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    for name, weight in gpt.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "ln_" in name:
            assert (weight == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name


def test_first_loss_is_near_that_of_guessing():
    torch.manual_seed(0)
    gpt = GPT(PRESETS["debug"])
    idx = tokens(2, 65, config=gpt.config)
    _, loss = gpt(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() - math.log(gpt.config.vocab_size)) < 0.2


def test_no_position_sees_a_later_token():
    gpt, idx = small_gpt(), tokens(2, 20)
    before, _ = gpt(idx)
    for position in range(1, 20):
        changed = idx.clone()
        changed[:, position:] = (changed[:, position:] + 1) % SMALL.vocab_size
        after, _ = gpt(changed)
        assert torch.allclose(before[:, :position], after[:, :position], atol=1e-5)
        assert not torch.allclose(before[:, position], after[:, position], atol=1e-3)


def test_targets_of_minus_100_do_not_count():
    gpt, idx = small_gpt(), tokens(2, 9)
    targets = idx[:, 1:].clone()
    targets[1] = -100
    _, masked = gpt(idx[:, :-1], targets)
    _, first = gpt(idx[:1, :-1], idx[:1, 1:])
    assert masked.item() == pytest.approx(first.item(), abs=1e-6)


def test_gradients_flow_from_the_loss_alone_where_there_are_targets():
    gpt, idx = small_gpt(), tokens(2, 9)
    logits, loss = gpt(idx[:, :-1], idx[:, 1:])
    assert loss.requires_grad and not logits.requires_grad
    assert gpt(idx)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, CrossEntropy.ROWS, 3 * CrossEntropy.ROWS + 5])
def test_the_loss_in_parts_and_its_gradient_are_cross_entropys(dtype, count):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(count, 1000, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(1000, (count,), generator=generator)
    targets[1::4] = -100
    whole, parts = logits.float().detach().requires_grad_(), logits.detach().requires_grad_()
    expected, loss = torch.nn.functional.cross_entropy(whole, targets), CrossEntropy.apply(parts, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (1024 * expected).backward()  # as a GradScaler does
    (1024 * loss).backward()
    assert parts.grad.dtype == dtype
    assert torch.allclose(parts.grad.float(), whole.grad, rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "stream"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_the_residual_stream_is_bf16_under_bf16_autocast_alone(dtype, stream):
    gpt, seen = small_gpt(), []
    for block in gpt.transformer.h:
        block.register_forward_hook(lambda module, given, made: seen.extend((given[0].dtype, made.dtype)))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        gpt(tokens(1, 8))
    assert set(seen) == {stream} and len(seen) == 6


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_a_saved_directory_gives_transformers_the_same_logits(tmp_path, vocab_size):
    config = GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=64)
    gpt = small_gpt(config)
    for parameter in gpt.parameters():  # biases and norms too must arrive where they belong
        parameter.data += 0.05 * torch.randn_like(parameter)
    gpt.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    idx = tokens(2, 64, config=config)
    with torch.no_grad():
        difference = gpt(idx)[0] - theirs(idx).logits
    assert difference.abs().max() < 1e-4


def test_a_saved_directory_gives_transformers_the_same_tokens(tmp_path):
    tokenizer.save_pretrained(tmp_path, block_size=64)
    small_gpt().save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Naïve café, 2 + 2 = 4;  it's\n\n\tdone. 你好 🙂"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == tokenizer.END_OF_TEXT and theirs.model_max_length == 64


def same_weights(first, second):
    return all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())


def test_openais_layout_without_prefix_and_with_masks_loads_too(tmp_path):
    gpt = small_gpt()
    gpt.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    for layer in range(3):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same_weights(gpt, GPT.from_pretrained(tmp_path))


@pytest.fixture
def theirs():
    """A GPT-2 of transformers, with weights of its own."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=32, n_embd=32, n_layer=3, n_head=4, n_inner=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("way", ["whole", "in shards", "without classifier"])
def test_what_transformers_saved_goes_through_here_and_back_bit_for_bit(tmp_path, theirs, way):
    saved = theirs.transformer if way == "without classifier" else theirs
    saved.save_pretrained(tmp_path / "theirs", max_shard_size="50KB" if way == "in shards" else "5GB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 or way != "in shards"
    gpt = GPT.from_pretrained(tmp_path / "theirs")
    idx = tokens(2, 32)
    with torch.no_grad():
        assert (gpt(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    gpt.save_pretrained(tmp_path / "here")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "here")
    assert same_weights(theirs, again)


def test_half_precision_weights_are_loaded_as_they_are(tmp_path, theirs):
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    gpt = GPT.from_pretrained(tmp_path)
    assert {weight.dtype for weight in gpt.parameters()} == {torch.float32}
    assert torch.equal(gpt.lm_head.weight.to(torch.bfloat16), theirs.lm_head.weight)


def test_greedy_text_equals_that_of_transformers(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    gpt, prompt = GPT.from_pretrained(tmp_path), tokens(3, 4)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(gpt.generate(prompt, 20, temperature=0), expected)


def test_a_padded_vocabulary_hardly_changes_the_loss(tmp_path):
    gpt = small_gpt(GPTConfig(block_size=32, vocab_size=50257, n_layer=2, n_head=4, n_embd=32))
    last = gpt.transformer.ln_f
    last.weight.data.zero_()
    last.bias.data.fill_(1.0)
    gpt.lm_head.weight.data -= 1.0  # as in OpenAI's models, all logits are far below zero
    gpt.save_pretrained(tmp_path)
    padded = GPT.from_pretrained(tmp_path, vocab_multiple=128)
    assert padded.config.vocab_size == 50304
    assert padded.lm_head.weight is padded.transformer.wte.weight
    idx = torch.randint(50257, (2, 17), generator=torch.Generator().manual_seed(0))
    (logits, loss), (wider, padded_loss) = gpt(idx[:, :-1], idx[:, 1:]), padded(idx[:, :-1], idx[:, 1:])
    assert torch.allclose(wider[:, :, :50257], logits, atol=1e-4) and logits.max() < -10
    assert 0 <= padded_loss.item() - loss.item() <= math.log(50304 / 50257) + 1e-5


def test_cropped_positions_leave_what_fits_as_it_was(tmp_path):
    gpt, idx = small_gpt(), tokens(2, 16)
    gpt.save_pretrained(tmp_path)
    cropped = GPT.from_pretrained(tmp_path, block_size=16)
    assert cropped.config.block_size == 16 and torch.equal(cropped(idx)[0], gpt(idx)[0])
    with pytest.raises(ValueError, match="33.*32"):
        GPT.from_pretrained(tmp_path, block_size=33)


HUB_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from model import GPT
try:
    print(GPT.from_pretrained(sys.argv[2]).state_dict()["transformer.wpe.weight"].sum().item())
except ValueError as error:
    sys.exit(str(error))
assert "transformers" not in sys.modules
"""


@pytest.fixture
def hub(tmp_path):
    """Serve the model `gpt2-xl` on 127.0.0.1; hub.load(name) loads a model in a process of its own."""
    small_gpt().save_pretrained(tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with hub_server.serve("gpt2-xl", "main", files) as server:
        env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}

        def load(name):
            command = [sys.executable, "-c", HUB_PROGRAM, str(ROOT), name]
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

        server.load = load
        yield server


def test_a_model_comes_from_the_hub_by_its_name_without_transformers(hub):
    loaded = hub.load("gpt2-xl")
    assert loaded.returncode == 0, loaded.stderr
    assert float(loaded.stdout) == small_gpt().transformer.wpe.weight.sum().item()
    assert hub.load("gpt2-xl").stdout == loaded.stdout
    downloads = [path for command, path in hub.requests if command == "GET" and path.endswith("model.safetensors")]
    assert len(downloads) == 1
    unknown = hub.load("gpt2-xxl")
    assert unknown.returncode == 1 and "gpt2-xxl is no directory here" in unknown.stderr
    assert len(unknown.stderr.strip().splitlines()) == 1


def test_a_model_that_did_not_come_whole_is_refused_and_removed(hub):
    hub.wrong.add("model.safetensors")
    loaded = hub.load("gpt2-xl")
    assert loaded.returncode == 1 and "model.safetensors of gpt2-xl did not come whole" in loaded.stderr
    hub.wrong.clear()
    assert hub.load("gpt2-xl").returncode == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", 0.5),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("model_type", "gpt_neo"),
        ("n_inner", 100),
    ],
)
def test_a_network_that_is_not_gpt2s_is_refused_by_name(tmp_path, name, value):
    small_gpt().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=name):
        GPT.from_pretrained(tmp_path)


def test_a_classifier_of_its_own_is_refused(tmp_path):
    small_gpt().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tied"):
        GPT.from_pretrained(tmp_path)


def test_saving_and_loading_is_bit_for_bit(tmp_path):
    gpt = small_gpt()
    gpt.save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # readable by all whom the umask allows
    again = GPT.from_pretrained(tmp_path)
    assert again.config == gpt.config
    for name, weight in gpt.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_one_batch_can_be_overfitted():
    gpt, idx = small_gpt(), tokens(4, 17)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        _, loss = gpt(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_generation_is_seeded_and_greedy_generation_takes_the_likeliest_token():
    gpt, prompt = small_gpt(), tokens(2, 5)

    def generate(seed, temperature=1.0):
        return gpt.generate(prompt, 20, temperature, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(generate(1), generate(1)) and not torch.equal(generate(1), generate(2))
    greedy = generate(1, temperature=0)
    assert torch.equal(greedy, generate(2, temperature=0)) and torch.equal(greedy[:, :5], prompt)
    for position in range(5, 25):
        logits, _ = gpt(greedy[:, :position])
        assert torch.equal(logits[:, -1].argmax(dim=-1), greedy[:, position])


@torch.no_grad()
def uncached(gpt, idx, count, temperature, generator=None):
    """The definition: each token after a pass over the last block_size ones."""
    for _ in range(count):
        logits = gpt(idx[:, -gpt.config.block_size :])[0][:, -1]
        idx = torch.cat([idx, draw(logits, temperature, None, 1.0, generator)], dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 50])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_generation_equals_uncached_within_the_window_and_as_it_slides(length, temperature):
    gpt, prompt = small_gpt(), tokens(3, length)
    expected = uncached(gpt, prompt, 40, temperature, torch.Generator().manual_seed(7))
    generated = gpt.generate(prompt, 40, temperature, generator=torch.Generator().manual_seed(7))
    assert generated.shape == (3, length + 40) and torch.equal(generated, expected)


def test_within_the_window_each_token_is_read_once(monkeypatch):
    gpt, prompt = small_gpt(), tokens(1, 10)
    lengths, embed = [], gpt.transformer.wte.forward
    monkeypatch.setattr(gpt.transformer.wte, "forward", lambda idx: (lengths.append(idx.shape[1]), embed(idx))[1])
    gpt.generate(prompt, 26)
    assert lengths == [10] + [1] * 22 + [32] * 3


def test_a_row_ends_with_end_of_text_and_all_ended_end_the_generation(monkeypatch):
    gpt, prompt, scripted = small_gpt(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=4)), [[1], [2]], []
    end = tokenizer.END_OF_TEXT
    scripted += [[[3], [4]], [[end], [5]], [[6], [7]], [[8], [end]], [[9], [9]]]
    monkeypatch.setattr("model.draw", lambda *_: torch.tensor(scripted.pop(0)))
    assert gpt.generate(torch.tensor(prompt), 5).tolist() == [[1, 3, end, end, end], [2, 4, 5, 7, end]]


def test_ids_that_only_pad_the_vocabulary_are_never_drawn():
    gpt = small_gpt(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=4))
    last = gpt.transformer.ln_f
    last.weight.data.zero_()
    last.bias.data.fill_(1.0)
    gpt.lm_head.weight.data[50257:] = 50.0  # such an id is now the likeliest by far
    for temperature in (0, 1.0, 100.0):
        assert gpt.generate(torch.tensor([[1], [2]]), 20, temperature).max() < 50257
    with pytest.raises(ValueError, match="50257"):
        tokenizer.decode([1, 50257])


def test_draws_follow_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)  # probabilities 0.64, 0.24, 0.09, 0.03

    def frequencies(temperature, top_k=None, top_p=1.0):
        drawn = draw(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
        return torch.bincount(drawn.flatten(), minlength=4) / len(drawn)

    def only(count):
        return torch.cat([logits[0, :count].softmax(-1), torch.zeros(4 - count)])

    for temperature in (0.5, 1.0, 2.0):
        assert torch.allclose(frequencies(temperature), (logits[0] / temperature).softmax(-1), atol=0.015)
    assert torch.allclose(frequencies(1.0, 2), only(2), atol=0.015)
    for top_p, count in ((0.01, 1), (0.6, 1), (0.7, 2), (0.9, 3), (0.98, 4)):
        assert torch.allclose(frequencies(1.0, None, top_p), only(count), atol=0.015), top_p
    assert torch.allclose(frequencies(1.0, 2, 0.8), only(2), atol=0.015)
    assert torch.allclose(frequencies(1.0, 2, 0.7), only(1), atol=0.015)  # 0.73 of what top_k leaves
    assert frequencies(1e-40)[0] == 1 and frequencies(1e-50)[0] == 1 and frequencies(1.0, 100)[3] > 0


def test_draws_leave_the_tokens_that_transformers_leaves():
    logits = 3 * torch.randn(50, 211, generator=torch.Generator().manual_seed(0))
    for temperature, top_k, top_p in ((1.0, 50, 0.9), (0.7, 211, 0.5), (1.5, 20, 0.95)):
        warpers = [
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(top_k),
            transformers.TopPLogitsWarper(top_p),
        ]
        theirs = logits
        for warper in warpers:
            theirs = warper(None, theirs)
        drawn = [draw(logits, temperature, top_k, top_p, torch.Generator().manual_seed(seed)) for seed in range(200)]
        expected = [theirs.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(n)) for n in range(200)]
        assert torch.equal(torch.cat(drawn), torch.cat(expected))


def test_what_cannot_be_computed_is_refused_with_its_numbers(tmp_path):
    gpt = small_gpt()
    with pytest.raises(ValueError, match="33.*32"):
        gpt(tokens(1, 33))
    with pytest.raises(ValueError, match="211.*211"):
        gpt(torch.tensor([[0, 211]]))
    with pytest.raises(ValueError, match="-1.*211"):
        gpt(torch.tensor([[0, -1]]))
    with pytest.raises(ValueError, match="211.*211"):
        gpt.generate(torch.tensor([[0, 211]]), 1)
    with pytest.raises(ValueError, match="5.*32"):
        GPTConfig(n_embd=32, n_head=5)
    for temperature, top_k, top_p in ((-1.0, None, 1.0), (1.0, 0, 1.0), (1.0, None, 0.0), (1.0, None, 1.1)):
        with pytest.raises(ValueError, match="temperature"):
            gpt.generate(tokens(1, 2), 1, temperature, top_k, top_p)
    with pytest.raises(ValueError, match="prompt"):
        gpt.generate(tokens(1, 0), 1)


def test_a_directory_that_is_not_a_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(tmp_path)
    small_gpt().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="model.safetensors"):
        GPT.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"n_layer": 3', '"n_layer": 4'))
    with pytest.raises(ValueError, match="h.3"):
        GPT.from_pretrained(tmp_path)
    weights.unlink()
    for index in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="index"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "log" / "step_000007").mkdir(parents=True)
    with pytest.raises(ValueError, match="did you mean .*step_000007"):
        GPT.from_pretrained(tmp_path / "log")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(tmp_path)
