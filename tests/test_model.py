"""The network equals OpenAI's GPT-2, and refuses what it cannot compute."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tokenizer
from model import GPT, PRESETS, GPTConfig, draw

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


def test_openais_layout_without_prefix_and_with_masks_loads_too(tmp_path):
    gpt = small_gpt()
    gpt.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(3)}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = GPT.from_pretrained(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in gpt.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "relu"),
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


def test_generation_goes_on_past_block_size_by_the_last_tokens():
    gpt, prompt = small_gpt(), tokens(1, 30)
    text = gpt.generate(prompt, 10, temperature=0)
    logits, _ = gpt(text[:, -1 - SMALL.block_size : -1])
    assert text.shape == (1, 40) and logits[0, -1].argmax() == text[0, -1]


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


def test_draws_follow_temperature_and_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)

    def frequencies(temperature, top_k):
        drawn = draw(logits, temperature, top_k, torch.Generator().manual_seed(0))
        return torch.bincount(drawn.flatten(), minlength=4) / len(drawn)

    for temperature in (0.5, 1.0, 2.0):
        assert torch.allclose(frequencies(temperature, None), (logits[0] / temperature).softmax(-1), atol=0.015)
    expected = torch.cat([logits[0, :2].softmax(-1), torch.zeros(2)])
    assert torch.allclose(frequencies(1.0, 2), expected, atol=0.015)
    assert frequencies(1e-40, None)[0] == 1 and frequencies(1.0, 100)[3] > 0


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
    for temperature, top_k in ((-1.0, None), (1.0, 0)):
        with pytest.raises(ValueError, match="temperature"):
            gpt.generate(tokens(1, 2), 1, temperature, top_k)
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
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(tmp_path)
