"""A GPT-2 in the Hugging Face layout, in and out: config.json and model.safetensors."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from common import hub
from common.files import MANIFEST, atomic_write, changed_files, read_json, write_json
from common.script import DataError
from common.tokenizer import END_OF_TEXT, N_TOKENS
from model import GPT, GPTConfig

# What config.json says of every GPT-2 that model.py computes; where it is silent, transformers assumes the same
IMPLEMENTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Hugging Face's names of GPTConfig's fields
FIELDS = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def save_gpt(gpt: GPT, directory: Path) -> None:
    """Write config.json and model.safetensors as transformers' GPT2LMHeadModel reads them.

    Raises OSError if the disk does not take them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in gpt.state_dict().items():
        if name == "transformer.wte.weight":
            weight = weight[: gpt.config.vocab_size]
        if name != "lm_head.weight":  # the same tensor as wte
            tensors[name] = transpose_conv1d(name, weight).contiguous()
    C, L, rows = gpt.config.n_embd, gpt.config.n_layer, gpt.config.vocab_size + gpt.config.block_size
    is_gpt2 = tensors.keys() == gpt2_names(L)
    is_gpt2 &= sum(tensor.numel() for tensor in tensors.values()) == (rows + 2) * C + L * (12 * C * C + 13 * C)
    assert is_gpt2, "a network that is no longer GPT-2 must not be saved as one"
    save_tensors(tensors, directory / "model.safetensors")
    write_json(directory / "config.json", huggingface_config(gpt.config))


def load_gpt(source: str | Path, block_size: int | None = None) -> GPT:
    """Load a directory in the Hugging Face layout, or a model of the Hub by its name, as `gpt2` or `gpt2-xl`.

    The positions are cropped to `block_size`. Warns of a checkpoint's file that has changed since it was written.
    Raises DataError if the source cannot be had or holds no such GPT-2, ValueError for more positions than it has.
    """
    if (Path(source) / MANIFEST).is_file():
        for name in changed_files(Path(source), ["config.json", "model.safetensors"]):
            print(f"warning: {Path(source) / name} has changed since it was written", file=sys.stderr)
    return read_gpt(source, block_size)


def read_gpt(source: str | Path, block_size: int | None = None) -> GPT:
    """`load_gpt` of files whose hashes were checked already."""
    config = read_config(source)
    weights = read_weights(source, config)
    if block_size and block_size > config.block_size:
        raise ValueError(f"block_size {block_size} is more than the model's {config.block_size}")
    config = replace(config, block_size=block_size or config.block_size)
    with torch.device("meta"):  # drawing initial weights would take longer than reading these
        gpt = GPT(config)
    gpt.to_empty(device="cpu")
    gpt.lm_head.weight = gpt.transformer.wte.weight
    padding = (0, 0, 0, config.padded_vocab_size - config.vocab_size)
    weights["transformer.wte.weight"] = F.pad(weights["transformer.wte.weight"], padding)
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: config.block_size]
    try:
        gpt.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    except RuntimeError as error:  # its second line names the first tensor of another shape
        raise DataError(
            f"the weights of {source} do not fit its config.json: {str(error).splitlines()[1].strip()}"
        ) from None
    return gpt


def require_gpt2_vocabulary(gpt: GPT, source: str | Path) -> None:
    """Raise DataError for a model that cannot read all of GPT-2's tokens."""
    if gpt.config.vocab_size < N_TOKENS:
        raise DataError(f"{source} has a vocabulary of {gpt.config.vocab_size} tokens, fewer than GPT-2's {N_TOKENS}")


def read_config(source: str | Path) -> GPTConfig:
    """The sizes in config.json; raises DataError for a network that this program does not compute."""
    path = model_directory(source) / "config.json"
    settings = read_json(path)
    sizes = {ours: settings.get(theirs) for ours, theirs in FIELDS.items()}
    try:
        if not all(type(size) is int for size in sizes.values()):
            raise ValueError(f"its sizes are {sizes}")
        config = GPTConfig(**sizes)
    except ValueError as error:
        raise DataError(f"{path} is not the configuration of a GPT-2: {error}") from None
    if settings.get("n_inner") is None:
        settings["n_inner"] = 4 * config.n_embd
    for name, value in (IMPLEMENTED | {"n_inner": 4 * config.n_embd}).items():
        if settings.get(name, value) != value:
            raise DataError(f"{path} asks for {name} {settings[name]!r}; this program has only {value!r}")
    return config


def huggingface_config(config: GPTConfig) -> dict[str, object]:
    """The content of config.json."""
    return {
        **IMPLEMENTED,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), END_OF_TEXT),
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": config.block_size,  # llama.cpp's converter reads this name
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def gpt2_names(n_layer: int) -> set[str]:
    """The tensors of model.safetensors."""
    modules = ["wte", "wpe", "ln_f"]
    for layer in range(n_layer):
        modules += [f"h.{layer}.{name}" for name in ("ln_1", "attn.c_attn", "attn.c_proj")]
        modules += [f"h.{layer}.{name}" for name in ("ln_2", "mlp.c_fc", "mlp.c_proj")]
    names = {f"transformer.{module}.{kind}" for kind in ("weight", "bias") for module in modules}
    return names - {"transformer.wte.bias", "transformer.wpe.bias"}


def transpose_conv1d(name: str, weight: Tensor) -> Tensor:
    """A weight from torch's layout in Hugging Face's, or back: linear layers are transposed both ways."""
    return weight.T if weight.dim() == 2 and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else weight


def read_weights(source: str | Path, config: GPTConfig) -> dict[str, Tensor]:
    """The weights in torch's layout; raises DataError unless they are a GPT-2's, of the sizes in its config.json."""
    weights = {}
    paths = sorted(model_directory(source).glob("model*.safetensors"))  # one file, or several
    if not paths:
        raise DataError(f"{source} holds no model.safetensors")
    for path in paths:
        for name, weight in load_tensors(path).items():
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"  # as OpenAI's are
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal masks that old files hold
                weights[name] = transpose_conv1d(name, weight)
    lm_head = weights.pop("lm_head.weight", None)
    wrong = {f"{config.n_layer} layers"}
    if config.n_layer <= len(weights):  # else as many names as some damaged config.json says
        wrong = weights.keys() ^ gpt2_names(config.n_layer)
    for name, rows in (("transformer.wte.weight", config.vocab_size), ("transformer.wpe.weight", config.block_size)):
        if not wrong and weights[name].shape != (rows, config.n_embd):
            wrong = {name}
    if wrong:
        raise DataError(f"the weights of {source} do not fit its config.json: {', '.join(sorted(wrong)[:3])}")
    embedding = weights["transformer.wte.weight"]
    if lm_head is not None and not torch.equal(lm_head.float().nan_to_num(), embedding.float().nan_to_num()):
        raise DataError(f"{source} has an LM head that is not tied to its embedding, as GPT-2's is")
    return weights


def model_directory(source: str | Path) -> Path:
    """The directory of a model: the source itself, or a copy of one on the Hub."""
    first, *rest = Path(source).parts or [""]
    if not Path(first).exists() and len(rest) <= 1 and not str(source).startswith((".", "/")):  # the Hub's [OWNER/]NAME
        return hub.fetch_model(str(source))
    if not (Path(source) / "config.json").is_file():
        raise DataError(f"{source} is not a checkpoint: there is no {Path(source) / 'config.json'}")
    return Path(source)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a whole safetensors file; raises OSError if the disk does not take it."""
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        temporary.chmod(mode)  # save_file leaves it readable to its owner alone


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises DataError if it is damaged."""
    try:
        if not path.is_file():  # a pipe or a device might never end
            raise OSError("not a regular file")
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
