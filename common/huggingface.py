"""A GPT-2 in the Hugging Face layout, in and out: config.json and model.safetensors."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from common import hub
from common.files import MANIFEST, changed_files, first_difference, read_json, write_json
from common.script import DataError
from common.tokenizer import END_OF_TEXT, N_TOKENS, require_gpt2_tokenizer
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
FORMAT = (
    "a model is a directory with config.json and safetensors; others, as pytorch_model.bin or GGUF, are converted by "
    "transformers' from_pretrained and save_pretrained"
)
# Hugging Face's names of GPTConfig's fields
FIELDS = {field.name: field.name for field in fields(GPTConfig)} | {"block_size": "n_positions"}


def save_gpt(gpt: GPT, directory: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors as transformers' GPT2LMHeadModel reads them.

    Raises OSError if the disk does not take them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: transpose_conv1d(name, weight).contiguous() for name, weight in gpt.state_dict().items()}
    del tensors["lm_head.weight"]  # the same as the embedding
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][: gpt.config.vocab_size]
    is_gpt2 = gpt.lm_head.weight is gpt.transformer.wte.weight and shapes(tensors) == gpt2_shapes(gpt.config)
    assert is_gpt2, "a network that is no longer GPT-2 must not be saved as one"
    save_tensors(tensors, directory / "model.safetensors")
    write_json(directory / "config.json", huggingface_config(gpt.config))
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT)
    write_json(directory / "generation_config.json", special)


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


def gpt2_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in model.safetensors, by their names."""
    C = config.n_embd
    shapes = {"transformer.wte.weight": (config.vocab_size, C), "transformer.wpe.weight": (config.block_size, C)}
    block = {
        "ln_1": (C,),
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (C, 4 * C),
        "mlp.c_proj": (4 * C, C),
    }
    modules = {f"h.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in block.items()}
    for module, shape in (modules | {"ln_f": (C,)}).items():
        shapes[f"transformer.{module}.weight"] = shape
        shapes[f"transformer.{module}.bias"] = shape[-1:]
    return shapes


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...] | torch.dtype]:
    """The tensors' shapes, or the types of those that do not hold floats."""
    return {name: tuple(t.shape) if t.is_floating_point() else t.dtype for name, t in tensors.items()}


def transpose_conv1d(name: str, weight: Tensor) -> Tensor:
    """A weight from torch's layout in Hugging Face's, or back: linear layers are transposed both ways."""
    return weight.T if weight.dim() == 2 and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else weight


def load_gpt(source: str | Path, block_size: int | None = None) -> GPT:
    """Load a directory in the Hugging Face layout, or a model of the Hub by its name, as `gpt2` or `gpt2-xl`.

    The positions are cropped to `block_size`. Warns of a checkpoint's file that has changed since it was written.
    Raises DataError if the source cannot be had or holds no such GPT-2, ValueError for more positions than it has.
    """
    directory = model_directory(source)
    if (directory / MANIFEST).is_file():
        for name in changed_files(directory, ["config.json", "model.safetensors"]):
            print(f"warning: {directory / name} has changed since it was written", file=sys.stderr)
    gpt = read_gpt(source, block_size)
    require_gpt2_tokenizer(directory)
    return gpt


def read_gpt(source: str | Path, block_size: int | None = None) -> GPT:
    """`load_gpt` of files whose hashes were checked already, whatever its tokenizer."""
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
    gpt.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    return gpt


def require_gpt2_vocabulary(gpt: GPT, source: str | Path) -> None:
    """Raise DataError for a model that cannot read all of GPT-2's tokens."""
    if gpt.config.vocab_size < N_TOKENS:
        raise DataError(f"{source} has a vocabulary of {gpt.config.vocab_size} tokens, fewer than GPT-2's {N_TOKENS}")


def read_config(source: str | Path) -> GPTConfig:
    """The sizes in config.json; raises DataError for a network that this program does not compute."""
    path = model_directory(source) / "config.json"
    settings = read_json(path)
    for name, value in IMPLEMENTED.items():
        if settings.get(name, value) != value:
            raise DataError(f"{path} asks for {name} {settings[name]!r}; this program has only {value!r}")
    sizes = {ours: settings.get(theirs) for ours, theirs in FIELDS.items()}
    try:
        if not all(type(size) is int for size in sizes.values()):
            raise ValueError(f"its sizes are {sizes}")
        config = GPTConfig(**sizes)
        if settings.get("n_inner") not in (None, 4 * config.n_embd):
            raise ValueError(f"its n_inner is {settings['n_inner']}, not 4 n_embd")
    except ValueError as error:
        raise DataError(f"{path} is not the configuration of a GPT-2: {error}") from None
    return config


def read_weights(source: str | Path, config: GPTConfig) -> dict[str, Tensor]:
    """The weights in torch's layout; raises DataError unless they are a GPT-2's, of the sizes in its config.json."""
    weights = {}
    for path in sorted(model_directory(source).glob("model*.safetensors")):  # one file, or several
        for name, weight in load_tensors(path).items():
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"  # as OpenAI's are
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal masks that old files hold
                weights[name] = weight
    if not weights:
        raise DataError(f"there is no {Path(source) / 'model.safetensors'}: {FORMAT}")
    lm_head = weights.pop("lm_head.weight", None)
    expected = gpt2_shapes(replace(config, n_layer=min(config.n_layer, len(weights))))  # a wrong one may be huge
    difference = first_difference(shapes(weights), expected)
    if difference:
        raise DataError(f"the weights of {source} do not fit its config.json: {difference}")
    embedding = weights["transformer.wte.weight"]
    if lm_head is not None and not torch.equal(lm_head.float().nan_to_num(), embedding.float().nan_to_num()):
        raise DataError(f"{source} has an LM head that is not tied to its embedding, as GPT-2's is")
    return {name: transpose_conv1d(name, weight) for name, weight in weights.items()}


def model_directory(source: str | Path) -> Path:
    """The directory of a model: the source itself, or a copy of one on the Hub."""
    first, *rest = Path(source).parts or [""]
    if not Path(first).exists() and len(rest) <= 1 and not str(source).startswith((".", "/")):  # the Hub's [OWNER/]NAME
        return hub.fetch_model(str(source))
    if not (Path(source) / "config.json").exists():
        raise DataError(f"there is no {Path(source) / 'config.json'}: {FORMAT}")
    return Path(source)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; raises OSError if the disk does not take it."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    path.chmod(mode)  # save_file leaves it readable to its owner alone


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises DataError if it is damaged."""
    try:
        if not path.is_file():  # a pipe or a device might never end
            raise OSError("not a regular file")
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
