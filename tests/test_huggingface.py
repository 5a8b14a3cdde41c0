"""A checkpoint's model is one that Hugging Face's tools load, and theirs are loaded here, or refused by name."""

import hashlib
import json
import os
import shutil
import threading
import time
import warnings

import hub_server
import huggingface_hub
import pytest
import torch
import transformers
from conftest import random_ids, small_gpt
from safetensors.torch import load_file, save_file
from torch import nn

from common.checkpoint import locate
from common.files import MANIFEST
from common.hub import fetch_model
from common.huggingface import load_gpt, read_config, require_gpt2_vocabulary, save_gpt
from common.script import DataError
from common.tokenizer import END_OF_TEXT, N_TOKENS, VOCABULARY, encode, save_tokenizer


@pytest.fixture
def saved(tmp_path):
    """The directory of a small GPT-2 that was saved here."""
    save_gpt(small_gpt(), tmp_path / "saved")
    return tmp_path / "saved"


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, **changes):
    """Replace weights, or with None remove them, whose names are written with __ for a dot."""
    path = directory / "model.safetensors"
    weights = load_file(path) | {name.replace("__", "."): weight for name, weight in changes.items()}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path)


def assert_same_weights(first, second):
    others = second.state_dict()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, others[name]), name


def refused(source, match):
    """Assert that a model is refused with these words, in one line and at once."""
    began = time.process_time()
    with pytest.raises(DataError, match=match) as refusal:
        load_gpt(source)
    assert time.process_time() - began < 2
    message = str(refusal.value)
    assert len(message.splitlines()) == 1 and len(message) < 500 and "\t" not in message


# ---- from here to transformers ---------------------------------------------------------------------------------------


def test_transformers_loads_a_saved_directory_and_computes_the_same_logits(tmp_path):
    gpt = small_gpt(vocab_size=N_TOKENS, block_size=64)
    for parameter in gpt.parameters():  # biases and norms too must arrive where they belong
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_gpt(gpt, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    idx = random_ids(2, 64, vocab_size=N_TOKENS)
    with torch.no_grad():
        difference = gpt(idx)[0] - theirs(idx).logits
    assert difference.abs().max() < 1e-4


def test_on_disk_the_embedding_has_no_padding_and_the_lm_head_is_left_out(tmp_path):
    save_gpt(small_gpt(vocab_size=N_TOKENS), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (50257, 32) and "lm_head.weight" not in weights
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 50257


def test_transformers_tokenizer_gives_the_same_tokens(saved):
    save_tokenizer(saved, block_size=64)
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    text = "Naïve café, 2 + 2 = 4;  it's\n\n\tdone. 你好 🙂"
    assert theirs(text)["input_ids"] == encode(text)
    assert theirs.decode(encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == END_OF_TEXT and theirs.model_max_length == 64


def test_transformers_pipeline_continues_a_text(tmp_path):
    gpt = small_gpt(vocab_size=N_TOKENS)
    save_gpt(gpt, tmp_path)
    save_tokenizer(tmp_path, block_size=32)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    (answer,) = pipeline("The cat", max_new_tokens=5, do_sample=False, return_tensors=True)
    assert (
        answer["generated_token_ids"] == gpt.generate(torch.tensor([encode("The cat")]), 5, temperature=0)[0].tolist()
    )


def test_transformers_guesses_nothing_and_continues_a_padded_batch_as_each_text_alone(tmp_path, caplog, capsys):
    save_gpt(small_gpt(vocab_size=N_TOKENS), tmp_path)
    save_tokenizer(tmp_path, block_size=32)
    texts = ["The cat", "Naïve café, 2 + 2 = 4", "1"]
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
        alone = [write(text, max_new_tokens=5, do_sample=False) for text in texts]
        assert write(texts, max_new_tokens=5, do_sample=False, batch_size=3) == alone
        write("The cat", max_new_tokens=5)
        write.model.generate(**write.tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=5)
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_saving_and_loading_is_bit_for_bit(tmp_path):
    gpt = small_gpt()
    save_gpt(gpt, tmp_path)
    again = load_gpt(tmp_path)
    assert again.config == gpt.config and again.lm_head.weight is again.transformer.wte.weight
    assert_same_weights(gpt, again)


def test_all_files_are_readable_by_those_whom_the_umask_allows(saved):
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1


def with_parameter(gpt):
    gpt.transformer.h[0].attn.scale = nn.Parameter(torch.ones(1))


def without_bias(gpt):
    gpt.transformer.h[1].mlp.c_fc.bias = None


def with_lm_head(gpt):
    gpt.lm_head.weight = nn.Parameter(torch.zeros(256, 32))


def with_wider_mlp(gpt):
    gpt.transformer.h[1].mlp.c_fc = nn.Linear(32, 130)


@pytest.mark.parametrize("change", [with_parameter, without_bias, with_lm_head, with_wider_mlp])
def test_a_network_that_is_no_longer_gpt2_is_not_saved_as_one(tmp_path, change):
    gpt = small_gpt()
    change(gpt)
    with pytest.raises(AssertionError, match="no longer GPT-2"):
        save_gpt(gpt, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- from transformers to here ---------------------------------------------------------------------------------------


@pytest.fixture
def theirs():
    """A GPT-2 of transformers', with random weights, biases and norms too."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=32, n_embd=32, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("way", ["whole", "in shards", "without LM head"])
def test_what_transformers_saved_goes_through_here_and_back_bit_for_bit(tmp_path, theirs, way):
    saved = theirs.transformer if way == "without LM head" else theirs
    saved.save_pretrained(tmp_path / "theirs", max_shard_size="50KB" if way == "in shards" else "5GB")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (way == "in shards")
    gpt = load_gpt(tmp_path / "theirs")
    idx = random_ids(2, 32)
    with torch.no_grad():
        assert (gpt(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    save_gpt(gpt, tmp_path / "here")
    assert_same_weights(theirs, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "here"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_fp32_and_go_back_bit_for_bit(tmp_path, theirs, dtype):
    theirs.to(dtype).save_pretrained(tmp_path / "theirs")
    gpt = load_gpt(tmp_path / "theirs")
    assert {weight.dtype for weight in gpt.parameters()} == {torch.float32}
    save_gpt(gpt, tmp_path / "here")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "here", dtype=dtype)
    assert_same_weights(theirs, again)


def test_openais_layout_without_prefix_and_with_causal_masks_loads_too(saved):
    weights = load_file(saved / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    for layer in range(3):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, saved / "model.safetensors")
    assert_same_weights(small_gpt(), load_gpt(saved))


def test_an_lm_head_that_is_stored_twice_loads_if_it_is_the_same(saved):
    embedding = load_file(saved / "model.safetensors")["transformer.wte.weight"]
    edit_weights(saved, lm_head__weight=embedding.clone())
    assert_same_weights(small_gpt(), load_gpt(saved))


def test_weights_that_are_not_finite_are_those_of_a_tied_lm_head_too(saved):
    embedding = load_file(saved / "model.safetensors")["transformer.wte.weight"]
    embedding[3] = torch.tensor([float("nan"), float("inf")]).repeat(16)
    edit_weights(saved, lm_head__weight=embedding.clone(), transformer__wte__weight=embedding)
    assert load_gpt(saved).lm_head.weight[3, :2].isfinite().tolist() == [False, False]


def test_cropped_positions_leave_what_fits_as_it_was(saved):
    idx = random_ids(2, 16)
    cropped = load_gpt(saved, block_size=16)
    assert cropped.config.block_size == 16 and torch.equal(cropped(idx)[0], small_gpt()(idx)[0])
    with pytest.raises(ValueError, match="33.*32"):
        load_gpt(saved, block_size=33)


def test_a_vocabulary_smaller_than_gpt2s_is_refused_where_gpt2s_is_needed(tmp_path):
    require_gpt2_vocabulary(small_gpt(vocab_size=N_TOKENS), "large")
    with pytest.raises(DataError, match="small .*211.*50257"):
        require_gpt2_vocabulary(small_gpt(), "small")


# ---- changed files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(saved):
    """A saved directory with a model card, and the manifest of its files' hashes."""
    (saved / "README.md").write_text("# A model\n")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()}
    (saved / MANIFEST).write_text(json.dumps(hashes))
    return saved


def test_an_unchanged_checkpoint_and_a_changed_model_card_load_without_a_warning(checkpoint, capsys):
    load_gpt(checkpoint)
    (checkpoint / "README.md").write_text("# A fine model\n")
    load_gpt(checkpoint)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_checkpoints_changed_file_is_warned_of_by_name(checkpoint, capsys, name):
    if name == "config.json":
        edit_config(checkpoint, resid_pdrop=0.1)
    else:
        edit_weights(checkpoint, transformer__ln_f__bias=torch.ones(32))
    load_gpt(checkpoint)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and str(checkpoint / name) in warning


def test_a_directory_without_a_manifest_loads_without_a_warning(saved, capsys):
    load_gpt(saved)
    assert capsys.readouterr() == ("", "")


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt_neo"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 0.5),
        ("layer_norm_epsilon", "1e-05"),
        ("layer_norm_epsilon", float("nan")),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_inner", 100),
        ("n_inner", [128]),
    ],
)
def test_a_network_that_is_not_gpt2s_is_refused_by_name(saved, name, value):
    edit_config(saved, **{name: value})
    refused(saved, name)


def test_another_kind_of_model_is_refused_by_its_type_whatever_its_sizes_are_called(saved):
    (saved / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    refused(saved, "model_type 'llama'")


def test_other_formats_are_refused_with_how_to_convert_them(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    refused(saved, "model.safetensors: .*pytorch_model.bin.* from_pretrained and save_pretrained")
    (saved / "gpt2.gguf").write_bytes(b"GGUF")
    refused(saved / "gpt2.gguf", "gpt2.gguf.*GGUF.* from_pretrained and save_pretrained")
    (saved / "config.json").unlink()
    refused(saved, "config.json: .*GGUF.* from_pretrained and save_pretrained")


@pytest.mark.parametrize("name", ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "3", True, [3], {}, 10**6, 10**12, 10**18, 10**100])
def test_a_size_that_is_wrong_or_huge_is_refused_at_once(saved, name, value):
    edit_config(saved, **{name: value})
    refused(saved, "config.json")


def test_a_size_that_is_missing_is_refused(saved):
    (saved / "config.json").write_text('{"model_type": "gpt2"}')
    refused(saved, "config.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'"n_layer"', b"\xff\xfe", b"[" * 10**6, b'{"a":' * 10**6, b"1" * 10**6],
    ids=lambda content: f"{content[:5]!r} of {len(content)} bytes",
)
def test_a_config_that_is_no_json_object_is_refused_at_once(saved, content):
    (saved / "config.json").write_bytes(content)
    refused(saved, "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "tokenizer.json", MANIFEST])
def test_a_pipe_in_a_files_place_is_not_waited_for(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    outcome = []

    def load():
        try:
            load_gpt(checkpoint)
        except DataError as error:
            outcome.append(str(error))
        else:
            outcome.append("loaded")

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout=5)
    if not outcome:
        os.close(os.open(checkpoint / name, os.O_WRONLY | os.O_NONBLOCK))  # lets the thread end
    assert outcome == ["loaded"] if name == MANIFEST else name in outcome[0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["absent", "directory"])
def test_a_file_that_is_missing_is_named(saved, name, kind):
    (saved / name).unlink()
    if kind == "directory":
        (saved / name).mkdir()
    refused(saved, name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json"])
def test_a_device_in_a_files_place_is_not_read(saved, name):
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to("/dev/zero")
    refused(saved, name)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_weights_that_were_cut_off_are_refused(saved, size):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(saved, "model.safetensors")


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("transformer.h.2.mlp.c_fc.bias", None),
        ("transformer.h.3.ln_1.bias", torch.zeros(32)),
        ("score.weight", torch.zeros(2, 32)),
        ("transformer.h.0.attn.c_attn.bias", torch.zeros(95)),
        ("transformer.h.0.attn.c_attn.weight", torch.zeros(96, 32)),  # torch's layout, not transposed
        ("transformer.h.0.attn.c_proj.weight", torch.zeros(2, 3, 4)),
        ("transformer.h.0.ln_1.weight", torch.zeros(32).byte()),
        ("transformer.wte.weight", torch.zeros(256, 32)),
        ("transformer.wpe.weight", torch.zeros(())),
    ],
)
def test_weights_that_are_missing_too_many_or_of_another_shape_or_type_are_named(saved, name, weight):
    edit_weights(saved, **{name.replace(".", "__"): weight})
    refused(saved, name)


@pytest.mark.parametrize("n_layer", [2, 4])
def test_a_config_of_other_depth_than_the_weights_is_refused(saved, n_layer):
    edit_config(saved, n_layer=n_layer)
    refused(saved, f"h.{min(n_layer, 3)}")


@pytest.mark.parametrize("lm_head", [torch.zeros(211, 32), torch.zeros(212, 32), torch.zeros(211, 32).half()])
def test_an_lm_head_of_its_own_is_refused(saved, lm_head):
    edit_weights(saved, lm_head__weight=lm_head)
    refused(saved, "tied")


def test_a_shard_that_is_missing_is_refused(tmp_path, theirs):
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    refused(tmp_path, "do not fit")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def their_tokenizer(tmp_path_factory):
    """The directory of a GPT-2 with its tokenizer, as transformers saves them."""
    directory = tmp_path_factory.mktemp("theirs")
    save_gpt(small_gpt(), directory)
    files = {"vocab": str(VOCABULARY / "vocab.json"), "merges": str(VOCABULARY / "merges.txt")}
    transformers.GPT2TokenizerFast(**files).save_pretrained(directory)
    return directory


@pytest.fixture
def tokenized(their_tokenizer, tmp_path):
    """A copy of that, with the files of older versions too."""
    directory = shutil.copytree(their_tokenizer, tmp_path / "tokenized")
    merges = (VOCABULARY / "merges.txt").read_text(encoding="utf-8").split("\n", 1)[1]
    (directory / "merges.txt").write_text("#version: 0.2 - Trained by somebody\r\n" + merges.replace("\n", "\r\n"))
    vocabulary = json.loads((VOCABULARY / "vocab.json").read_text())
    (directory / "vocab.json").write_text(json.dumps(vocabulary, indent=1, ensure_ascii=False, sort_keys=True))
    (directory / "added_tokens.json").write_text('{"<|endoftext|>": 50256}')
    return directory


def test_gpt2s_tokenizer_passes_in_every_file_and_layout(tokenized):
    load_gpt(tokenized)
    path = tokenized / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]  # as older versions write
    path.write_text(json.dumps(content))
    load_gpt(tokenized)


def swap_ids(vocabulary):
    vocabulary["Ġthe"], vocabulary["Ġa"] = vocabulary["Ġa"], vocabulary["Ġthe"]


def swap_merges(merges):
    merges[20], merges[21] = merges[21], merges[20]


TOKEN = {"id": 50257, "content": "<pad>"}


@pytest.mark.parametrize(
    ("name", "change", "difference"),
    [
        ("vocab.json", swap_ids, "'Ġa' is 262, expected 257"),
        ("vocab.json", lambda ids: ids.pop("Ġthe"), "'Ġthe' is missing, expected 262"),
        ("vocab.json", lambda ids: ids.update({"<pad>": 50257}), "'<pad>' is 50257, expected nothing"),
        ("added_tokens.json", lambda ids: ids.update({"<pad>": 50257}), "'<pad>' is 50257, expected nothing"),
        ("tokenizer.json", lambda content: swap_ids(content["model"]["vocab"]), "'Ġa' is 262, expected 257"),
        ("tokenizer.json", lambda content: swap_merges(content["model"]["merges"]), "is 21, expected 20"),
        ("tokenizer.json", lambda content: content["added_tokens"].append(TOKEN), "'<pad>' is 50257"),
        ("tokenizer.json", lambda content: content["model"].pop("merges"), "GPT-2's kind.*merges"),
        ("tokenizer.json", lambda content: content["model"].update(vocab=[["a", 0.5]]), "GPT-2's kind"),
        ("tokenizer.json", lambda content: content["added_tokens"].append({"content": []}), "GPT-2's kind"),
        ("tokenizer.json", lambda content: content.update(model=None), "GPT-2's kind"),
    ],
)
def test_another_tokenizer_is_refused_and_the_difference_named(tokenized, name, change, difference):
    path = tokenized / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(tokenized, difference)


def test_other_merges_are_refused(tokenized):
    lines = (tokenized / "merges.txt").read_text().split("\n")
    swap_merges(lines)
    (tokenized / "merges.txt").write_text("\n".join(lines))
    refused(tokenized, "merges.txt is not GPT-2's .*is 20, expected 19")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"a":' * 10**6])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"])
def test_a_damaged_tokenizer_is_refused_by_its_file(tokenized, name, content):
    (tokenized / name).write_bytes(content)
    refused(tokenized, name)


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_vocabulary_that_others_have_padded_passes(tmp_path, with_tokenizer):
    config = transformers.GPT2Config(vocab_size=50304, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "padded")
    if with_tokenizer:
        save_tokenizer(tmp_path / "padded", block_size=32)
    assert load_gpt(tmp_path / "padded").config.vocab_size == 50304


# ---- directories and names -------------------------------------------------------------------------------------------


def test_of_a_runs_directory_the_newest_checkpoint_is_meant(tmp_path):
    for step in (2, 9, 10, 1_000_000):
        save_gpt(small_gpt(n_layer=1, seed=step), tmp_path / "log" / f"step_{step:06d}")
    (tmp_path / "log" / "step_2000000.damaged").mkdir()
    assert locate(tmp_path / "log") == str(tmp_path / "log" / "step_1000000")
    assert locate(tmp_path / "log" / "step_000009") == str(tmp_path / "log" / "step_000009")
    assert_same_weights(small_gpt(n_layer=1, seed=10**6), load_gpt(locate(tmp_path / "log")))


@pytest.mark.parametrize("source", ["no/such/directory", "./gpt2", "/gpt2", "saved/nothing", ""])
def test_what_looks_like_a_path_is_not_sought_on_the_hub(saved, hub, source):
    refused(source, "config.json")
    assert not hub.requests


@pytest.fixture(params=["lfs", "xet"])
def hub(saved, tmp_path, monkeypatch, request):
    """Serve the small model as `gpt2-xl` on 127.0.0.1, with an empty cache, from either of the Hub's storages."""
    files = {path.name: path.read_bytes() for path in saved.iterdir()} | {"flax_model.msgpack": b"not this"}
    with hub_server.serve("gpt2-xl", "main", files) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        fetch_model.cache_clear()
        server.xet = request.param == "xet"

        def download_from_xet(incomplete_path, displayed_filename, **_):
            server.requests.append(("GET", f"/resolve/{displayed_filename}"))
            content = files[displayed_filename]
            incomplete_path.write_bytes(bytes(len(content)) if displayed_filename in server.damaged else content)

        monkeypatch.setattr(huggingface_hub.file_download, "xet_get", download_from_xet)
        yield server
    fetch_model.cache_clear()


def downloads(hub):
    return [path.split("/")[-1] for command, path in hub.requests if command == "GET" and "/resolve/" in path]


def test_a_model_comes_from_the_hub_by_its_name(hub):
    assert_same_weights(small_gpt(), load_gpt("gpt2-xl"))
    assert sorted(downloads(hub)) == ["config.json", "model.safetensors"]


def test_the_tokenizer_of_a_model_on_the_hub_is_compared_too(hub):
    hub.files["vocab.json"] = (VOCABULARY / "vocab.json").read_bytes()
    hub.files["added_tokens.json"] = b'{"<pad>": 50257}'
    refused("gpt2-xl", "vocab.json is not GPT-2's .'<pad>' is 50257")


def test_a_models_config_alone_can_be_read_by_its_name(hub):
    assert read_config("gpt2-xl") == small_gpt().config


def test_a_model_from_the_hub_is_downloaded_once(hub):
    load_gpt("gpt2-xl")
    hub.requests.clear()
    fetch_model.cache_clear()  # as in another process
    assert_same_weights(small_gpt(), load_gpt("gpt2-xl"))
    assert not downloads(hub)


@pytest.mark.parametrize("name", ["gpt2-xxl", "owner/gpt2", "gpt 2", "-", "a" * 100])
def test_a_name_that_the_hub_does_not_know_is_refused(hub, name):
    refused(name, f"cannot find {name} on the Hub")


def test_a_hub_that_does_not_answer_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("gpt2-xl", "cannot find gpt2-xl on the Hub")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_with_another_hash_is_refused_removed_and_comes_whole_the_next_time(hub, name):
    hub.damaged.add(name)
    refused("gpt2-xl", f"SHA-256 mismatch.*{name}")
    hub.damaged.clear()
    hub.requests.clear()
    assert_same_weights(small_gpt(), load_gpt("gpt2-xl"))
    assert downloads(hub) == [name]
