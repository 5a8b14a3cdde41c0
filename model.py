"""GPT-2, the network: its shapes, initial weights, loss, sampling, and the Hugging Face checkpoint layout.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common import DataError, replacing, write_json
from tokenizer import END_OF_TEXT, N_TOKENS

# Hugging Face stores these as (in, out), the transpose of nn.Linear's
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class GPTConfig:
    """The network's sizes; raises ValueError where they do not fit together."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257 tokens, padded to a multiple of 128
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}")


PRESETS = {
    "debug": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class Attention(nn.Module):
    """Causal self-attention, with the query, key and value projections fused as in GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers around GELU in its tanh form, the one GPT-2 was trained with."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """LayerNorm before attention and before the MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019), its parameters named as in transformers' GPT2LMHeadModel."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        """Draw weights from N(0, 0.02), scaled down where 2 n_layer projections add to the residual stream."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):
            # apply() visits a module after its children, so this draw replaces the one above
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx: Tensor) -> Tensor:
        """The final hidden states (B, T, C) of token ids (B, T): what `lm_head` turns into logits."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.config.block_size}")
        if idx.is_cpu and not torch.compiler.is_compiling():  # elsewhere the check would wait for the device
            self.check_ids(idx)
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def check_ids(self, idx: Tensor) -> None:
        """Raise DataError, a ValueError, unless every id is one of the vocabulary's."""
        low, high = (int(bound) for bound in idx.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(f"token ids from {low} to {high} do not fit vocab_size {self.config.vocab_size}")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) for token ids (B, T), and with targets (B, T) their mean cross-entropy in nats.

        Targets of -100 are left out of the mean. Raises ValueError for more than block_size tokens or, on the CPU,
        for an id outside the vocabulary.
        """
        logits = self.lm_head(self.hidden(idx))  # (B, T, V)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue token ids (B, T) by max_new_tokens sampled ones: (B, T + max_new_tokens).

        Temperature 0 takes the likeliest token. Past block_size the model sees the last block_size tokens. Ids that
        only pad the vocabulary are never drawn. Raises ValueError for an empty prompt or settings out of range.
        """
        if idx.shape[1] == 0 or temperature < 0 or (top_k is not None and top_k < 1):
            given = f"{idx.shape[1]} tokens, temperature {temperature}, top_k {top_k}"
            raise ValueError(f"need a prompt, temperature >= 0 and top_k >= 1, not {given}")
        self.check_ids(idx)
        for _ in range(max_new_tokens):
            last = self.hidden(idx[:, -self.config.block_size :])[:, -1]  # (B, C)
            logits = self.lm_head(last)[:, :N_TOKENS].float()  # (B, V)
            idx = torch.cat([idx, draw(logits, temperature, top_k, generator)], dim=1)
        return idx

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors as transformers' GPT2LMHeadModel reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: weight for name, weight in self.state_dict().items() if name != "lm_head.weight"}
        weights = {name: stored(name, weight).contiguous() for name, weight in weights.items()}
        save_tensors(directory / "model.safetensors", weights)
        write_json(directory / "config.json", huggingface_config(self.config))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GPT:
        """Load a directory in the Hugging Face layout; raises DataError where it does not hold such a GPT-2."""
        directory = Path(directory)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise DataError(f"{directory} is not a checkpoint: it has no {name}")
        gpt = cls(read_config(directory / "config.json"))
        weights = load_tensors(directory / "model.safetensors")
        weights = {full_name(name): stored(name, weight) for name, weight in weights.items() if not is_mask(name)}
        weights.setdefault("lm_head.weight", weights.get("transformer.wte.weight"))
        wanted = {name: weight.shape for name, weight in gpt.state_dict().items()}
        wrong = [name for name in wanted | weights if getattr(weights.get(name), "shape", None) != wanted.get(name)]
        if wrong:
            raise DataError(f"{directory / 'model.safetensors'} does not fit its config.json: {', '.join(wrong[:3])}")
        if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
            raise DataError(f"{directory} has a classifier that is not tied to its embedding, which GPT-2's is")
        gpt.load_state_dict(weights)
        return gpt


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Sample one id (B, 1) from each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that the smallest temperature does not overflow
    return torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1, generator=generator)


def stored(name: str, weight: Tensor) -> Tensor:
    """A weight as the checkpoint holds it, or back: the same transposition both ways."""
    return weight.t() if name.endswith(TRANSPOSED) else weight


def full_name(name: str) -> str:
    """A weight's name in this program; OpenAI's files on the Hub leave out the prefix."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def is_mask(name: str) -> bool:
    """Whether the tensor is one of the attention masks that old files hold."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a whole safetensors file; raises OSError where the disk does not take it."""
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        temporary.chmod(mode)  # save_file leaves it to its owner alone


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises DataError where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}") from None


# What config.json says of every GPT-2 that this program computes; where it is silent, transformers assumes the same
IMPLEMENTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def huggingface_config(config: GPTConfig) -> dict[str, object]:
    """The content of config.json."""
    return {
        **IMPLEMENTED,
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # llama.cpp's converter reads this name
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), END_OF_TEXT),
        "initializer_range": 0.02,
        "dtype": "float32",
    }


def read_config(path: Path) -> GPTConfig:
    """Read the sizes from config.json; raises DataError for a network that this program does not compute."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        names = {"block_size": "n_positions"} | {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        config = GPTConfig(**{ours: int(settings[theirs]) for ours, theirs in names.items()})
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DataError(f"{path} is not the configuration of a GPT-2: {error}") from None
    for name, value in (IMPLEMENTED | {"n_inner": 4 * config.n_embd}).items():
        asked = settings.get(name, value)
        if asked != value and not (name == "n_inner" and asked is None):
            raise DataError(f"{path} asks for {name} {asked!r}; this program has only {value!r}")
    return config
