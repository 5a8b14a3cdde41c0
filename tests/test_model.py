"""The network equals OpenAI's GPT-2, samples as it says, and refuses what it cannot compute."""

import inspect
import math

import pytest
import torch
import transformers
from conftest import random_ids, small_gpt
from torch.nn import functional as F

import model
from common.huggingface import read_gpt
from common.tokenizer import END_OF_TEXT, N_TOKENS
from model import GPT, PRESETS, GPTConfig, sample_token

ONE_LAYER = {"block_size": 8, "vocab_size": N_TOKENS, "n_layer": 1, "n_head": 1, "n_embd": 4}


def make_likeliest(gpt, rows, logit=50.0):
    """Let the LM head give these rows the logit `logit`, and all others 0, after any text."""
    gpt.transformer.ln_f.weight.data.zero_()
    gpt.transformer.ln_f.bias.data.fill_(1.0)
    gpt.lm_head.weight.data.zero_()
    gpt.lm_head.weight.data[rows] = logit / gpt.config.n_embd
    return gpt


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- shapes and initial weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_parameter_counts_of_openais_models_and_47_rows_of_padding(preset, count):
    with torch.device("meta"):
        gpt = GPT(PRESETS[preset])
    assert gpt.transformer.wte.weight.shape[0] == 50304 == 393 * 128
    assert sum(parameter.numel() for parameter in gpt.parameters()) == count + 47 * gpt.config.n_embd


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 128), (127, 128), (128, 128), (129, 256), (50257, 50304)])
def test_the_embedding_has_the_next_multiple_of_128_rows(vocab_size, rows):
    assert small_gpt(vocab_size=vocab_size).transformer.wte.weight.shape[0] == rows


def test_embedding_and_lm_head_are_one_tensor():
    gpt = small_gpt()
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    gpt.to(torch.float64)
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


def test_initial_weights_have_the_stated_spread():
    gpt = small_gpt(block_size=64, vocab_size=512, n_layer=8, n_embd=128)
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
    idx = random_ids(2, 65, vocab_size=N_TOKENS)
    _, loss = gpt(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() - math.log(N_TOKENS)) < 0.2


# ---- logits, loss, gradients -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A GPT-2 of transformers' with random weights, biases and norms too, and ours with the same."""
    directory = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=32, n_embd=32, n_layer=3, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(directory)
    return read_gpt(directory), theirs


def test_logits_equal_those_of_transformers(both):
    ours, theirs = both
    idx = random_ids(4, 32)
    with torch.no_grad():
        difference = ours(idx)[0] - theirs(idx).logits
    assert difference.abs().max() < 1e-4


def test_loss_and_gradients_equal_those_of_transformers(both):
    ours, theirs = both
    ours.zero_grad()
    theirs.zero_grad()
    idx = random_ids(4, 32)
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    expected = theirs(idx, labels=idx).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        gradient = gradients.pop(name)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            gradient = gradient.t()
        gradient = gradient[:211] if name == "transformer.wte.weight" else gradient
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-6), name
    assert not gradients


def test_greedy_text_equals_that_of_transformers(both):
    ours, theirs = both
    prompt = random_ids(3, 4)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(prompt, 20, temperature=0), expected)


def test_no_position_sees_a_later_token():
    gpt, idx = small_gpt(), random_ids(2, 20)
    before, _ = gpt(idx)
    for position in range(1, 20):
        changed = idx.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 211
        after, _ = gpt(changed)
        assert torch.allclose(before[:, :position], after[:, :position], atol=1e-5)
        assert not torch.allclose(before[:, position], after[:, position], atol=1e-3)


def test_logits_carry_a_gradient_and_the_loss_is_their_cross_entropy():
    gpt, idx = small_gpt(), random_ids(2, 9)
    logits, loss = gpt(idx[:, :-1], idx[:, 1:])
    assert logits.shape == (2, 8, 211) and logits.requires_grad and loss.requires_grad
    assert torch.equal(loss, F.cross_entropy(logits.reshape(16, 211), idx[:, 1:].reshape(16)))
    (from_logits,) = torch.autograd.grad(logits.square().sum(), gpt.transformer.wpe.weight)
    assert from_logits[:8].any(dim=1).all()
    without_targets, none = gpt(idx[:, :-1])
    assert none is None and torch.equal(without_targets, logits)


def test_targets_of_minus_100_do_not_count():
    gpt, idx = small_gpt(), random_ids(2, 9)
    targets = idx[:, 1:].clone()
    targets[1] = -100
    _, masked = gpt(idx[:, :-1], targets)
    _, first = gpt(idx[:1, :-1], idx[:1, 1:])
    assert masked.item() == pytest.approx(first.item(), abs=1e-6)


def test_the_embeddings_padding_is_zero_and_outside_the_softmax():
    gpt, idx = small_gpt(), random_ids(2, 17)
    padding = gpt.transformer.wte.weight[211:]
    assert len(padding) == 45 and not padding.any()
    logits, loss = gpt(idx[:, :-1], idx[:, 1:])
    with torch.no_grad():
        padding.fill_(1e3)
    assert torch.equal(gpt(idx[:, :-1])[0], logits)
    assert torch.equal(gpt(idx[:, :-1], idx[:, 1:])[1], loss)


def test_the_embeddings_padding_has_no_gradient_and_stays_zero_in_training():
    gpt, idx = small_gpt(), random_ids(4, 17)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        _, loss = gpt(idx[:, :-1], idx[:, 1:])
        loss.backward()
        assert not gpt.transformer.wte.weight.grad[211:].any()
        optimizer.step()
        optimizer.zero_grad()
    assert not gpt.transformer.wte.weight[211:].any()


def test_one_batch_can_be_overfitted():
    gpt, idx = small_gpt(), random_ids(4, 17)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        _, loss = gpt(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_texts_packed_in_a_row_by_positions_and_a_mask_have_the_states_of_each_alone():
    gpt, first, second = small_gpt(), random_ids(1, 5), random_ids(1, 7, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    text = torch.tensor([0] * 5 + [1] * 7)
    mask = (text[:, None] == text[None, :]).tril()[None, None]
    packed = gpt.hidden(torch.cat([first, second], dim=1), positions, mask)
    alone = torch.cat([gpt.hidden(first), gpt.hidden(second)], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)


# ---- generation ------------------------------------------------------------------------------------------------------


def test_generation_is_seeded():
    gpt, prompt = small_gpt(), random_ids(2, 5)
    first = gpt.generate(prompt, 20, generator=seeded(1))
    assert torch.equal(first, gpt.generate(prompt, 20, generator=seeded(1)))
    assert not torch.equal(first, gpt.generate(prompt, 20, generator=seeded(2)))


def test_greedy_generation_takes_the_likeliest_token():
    gpt, prompt = small_gpt(), random_ids(2, 5)
    greedy = gpt.generate(prompt, 20, temperature=0)
    assert torch.equal(greedy[:, :5], prompt)
    for position in range(5, 25):
        logits, _ = gpt(greedy[:, :position])
        assert torch.equal(logits[:, -1].argmax(dim=-1), greedy[:, position])


@torch.no_grad()
def generate_uncached(gpt, idx, count, temperature, generator):
    """The definition: each token after a pass over the last block_size ones."""
    for _ in range(count):
        logits, _ = gpt(idx[:, -gpt.config.block_size :])
        idx = torch.cat([idx, sample_token(logits[:, -1], temperature, generator=generator)], dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 50])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_generation_equals_uncached_within_the_window_and_as_it_slides(length, temperature):
    gpt, prompt = small_gpt(), random_ids(3, length)
    expected = generate_uncached(gpt, prompt, 40, temperature, seeded(7))
    generated = gpt.generate(prompt, 40, temperature=temperature, generator=seeded(7))
    assert generated.shape == (3, length + 40) and torch.equal(generated, expected)
    streamed = list(gpt.stream(prompt, 40, temperature=temperature, generator=seeded(7)))
    assert torch.equal(torch.cat([prompt, *streamed], dim=1), expected)


def test_within_the_window_each_token_is_read_once():
    gpt, lengths = small_gpt(), []
    gpt.transformer.wte.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    gpt.generate(random_ids(1, 10), 26)
    assert lengths == [10] + [1] * 22 + [32] * 3


def test_a_stream_computes_no_further_than_it_is_read_and_leaves_gradients_on():
    gpt, outputs = small_gpt(), []
    gpt.transformer.ln_f.register_forward_hook(lambda module, args, output: outputs.append(output))
    stream = gpt.stream(random_ids(1, 3), 10**9)
    assert not outputs
    token = next(stream)
    assert len(outputs) == 1 and token.shape == (1, 1) and not outputs[0].requires_grad
    assert torch.is_grad_enabled() and gpt(random_ids(1, 3))[0].requires_grad


def test_a_row_ends_with_end_of_text_and_when_all_have_ended_the_generation_ends(monkeypatch):
    steps = [[[3], [4]], [[END_OF_TEXT], [5]], [[6], [7]], [[8], [END_OF_TEXT]], [[9], [9]]]
    monkeypatch.setattr(model, "sample_token", lambda *_, **__: torch.tensor(steps.pop(0)))
    generated = small_gpt(**ONE_LAYER).generate(torch.tensor([[1], [2]]), 5).tolist()
    assert generated == [[1, 3, END_OF_TEXT, END_OF_TEXT, END_OF_TEXT], [2, 4, 5, 7, END_OF_TEXT]]
    assert len(steps) == 1


@pytest.mark.parametrize("vocab_size", [50257, 50304, 50400])
@pytest.mark.parametrize("temperature", [0, 1.0, 100.0])
def test_ids_past_gpt2s_vocabulary_are_never_sampled_however_likely(vocab_size, temperature):
    gpt = make_likeliest(small_gpt(**ONE_LAYER | {"vocab_size": vocab_size}), slice(N_TOKENS, None))
    generated = gpt.generate(torch.tensor([[1], [2]]), 20, temperature=temperature, generator=seeded(0))
    assert generated.max() < N_TOKENS


def test_the_last_id_of_gpt2s_vocabulary_is_sampled():
    gpt = make_likeliest(small_gpt(**ONE_LAYER), END_OF_TEXT)
    assert gpt.generate(torch.tensor([[1]]), 5, generator=seeded(0)).tolist() == [[1, END_OF_TEXT]]


# ---- sampling --------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])  # probabilities 0.64, 0.24, 0.09, 0.03


def frequencies(**settings):
    """How often each of the four tokens is sampled."""
    sampled = sample_token(LOGITS.repeat(20_000, 1), generator=seeded(0), **settings)
    return torch.bincount(sampled.flatten(), minlength=4) / len(sampled)


def probabilities_of_first(count):
    return torch.cat([LOGITS[:count].softmax(-1), torch.zeros(4 - count)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    assert torch.allclose(frequencies(temperature=temperature), (LOGITS / temperature).softmax(-1), atol=0.015)


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-50])
def test_temperatures_near_0_take_the_likeliest(temperature):
    assert frequencies(temperature=temperature)[0] == 1


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (2, 2), (4, 4), (100, 4)])
def test_top_k_leaves_that_many_tokens(top_k, count):
    assert torch.allclose(frequencies(top_k=top_k), probabilities_of_first(count), atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "count"), [(1e-300, 1), (0.01, 1), (0.6, 1), (0.7, 2), (0.9, 3), (0.98, 4), (1.0, 4)]
)
def test_top_p_leaves_the_fewest_tokens_that_come_to_it(top_p, count):
    assert torch.allclose(frequencies(top_p=top_p), probabilities_of_first(count), atol=0.015)


@pytest.mark.parametrize(("top_p", "count"), [(0.8, 2), (0.7, 1)])
def test_top_p_counts_the_probabilities_that_top_k_leaves(top_p, count):
    assert torch.allclose(frequencies(top_k=2, top_p=top_p), probabilities_of_first(count), atol=0.015)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 50, 0.9), (0.7, 211, 0.5), (1.5, 20, 0.95)])
def test_the_tokens_that_transformers_leaves_are_sampled(temperature, top_k, top_p):
    logits = 3 * torch.randn(50, 211, generator=seeded(0))
    expected = logits
    for warper in (
        transformers.TemperatureLogitsWarper(temperature),
        transformers.TopKLogitsWarper(top_k),
        transformers.TopPLogitsWarper(top_p),
    ):
        expected = warper(None, expected)
    for seed in range(200):
        sampled = sample_token(logits, temperature, top_k, top_p, seeded(seed))
        assert torch.equal(sampled, expected.softmax(-1).multinomial(1, generator=seeded(seed)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_token(logits, temperature)


def test_a_model_that_has_diverged_generates_an_error():
    gpt = small_gpt()
    gpt.transformer.ln_f.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        gpt.generate(random_ids(1, 2), 1)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}]
    + [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}],
)
def test_sampling_settings_out_of_range_are_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        small_gpt().generate(random_ids(1, 2), 1, **settings)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_more_tokens_than_block_size_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="33.*32"):
        small_gpt()(random_ids(1, 33))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        small_gpt().generate(random_ids(1, 0), 1)


@pytest.mark.parametrize("token", [-1, 256])
def test_ids_outside_the_embedding_are_an_error(token):
    with pytest.raises((IndexError, ValueError)):
        small_gpt()(torch.tensor([[0, token]]))
    with pytest.raises((IndexError, ValueError)):
        small_gpt().generate(torch.tensor([[0, token]]), 1)


def test_a_target_outside_the_vocabulary_is_an_error_though_the_padding_has_its_row():
    with pytest.raises((IndexError, ValueError)):
        small_gpt()(torch.tensor([[0]]), torch.tensor([[211]]))


def test_sizes_that_do_not_fit_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="5.*32"):
        GPTConfig(n_embd=32, n_head=5)
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            GPTConfig(**{name: 0})


def test_the_network_knows_nothing_of_devices_autocast_or_files():
    source = inspect.getsource(model)
    for word in ("autocast", "cuda", "is_cpu", "compile", "open(", "environ", "distributed"):
        assert word not in source, word
