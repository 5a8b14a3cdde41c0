"""GPT-2, the network: its shapes, initial weights, loss, sampling, and the Hugging Face checkpoint layout.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common import DataError, replacing, sha256, write_json
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


# What `from_pretrained` takes
SOURCES = "checkpoint directory, or model on the Hugging Face Hub, as gpt2 or gpt2-xl"


class Cache:
    """The keys and values (B, H, T, D) that a layer has computed, with room for `size` tokens."""

    def __init__(self, size: int) -> None:
        self.size, self.length = size, 0
        self.k = self.v = torch.empty(0)  # made with the first tokens, whose type and device they have

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens; returns all up to here."""
        if self.length == 0:
            self.k, self.v = (new.new_empty(*new.shape[:2], self.size, new.shape[3]) for new in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length], self.v[:, :, start : self.length] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Attention(nn.Module):
    """Causal self-attention, with the query, key and value projections fused as in GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)  # (B, H, T, D)
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

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
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

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """The final hidden states (B, T, C) of token ids (B, T): what `lm_head` turns into logits.

        A token sees itself and those before it. With `caches`, one a layer, the first call reads the beginning and
        fills them, and each later one takes a single token. With `positions` (B, T), each below block_size, and a
        `mask` (B, 1, T, T), true where the token of a row sees that of a column, the caller says where tokens stand
        and what they see.
        """
        T, seen = idx.shape[1], caches[0].length if caches else 0
        assert seen == 0 or T == 1
        if positions is None:
            if seen + T > self.config.block_size:
                raise ValueError(f"a sequence of {seen + T} tokens is longer than block_size {self.config.block_size}")
            positions = torch.arange(seen, seen + T, device=idx.device)  # (T)
        if idx.is_cpu and not torch.compiler.is_compiling():  # elsewhere the check would wait for the device
            self.check_ids(idx)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        if autocast_dtype(x.device) == torch.bfloat16:  # else the whole residual stream would stay in fp32
            x = x.to(torch.bfloat16)
        for block, cache in zip(self.transformer.h, caches or [None] * self.config.n_layer, strict=True):
            x = block(x, mask, cache)
        return self.transformer.ln_f(x)

    def check_ids(self, idx: Tensor) -> None:
        """Raise DataError, a ValueError, unless every id is one of the vocabulary's."""
        low, high = (int(bound) for bound in idx.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(f"token ids from {low} to {high} do not fit vocab_size {self.config.vocab_size}")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) for token ids (B, T), and with targets (B, T) their mean cross-entropy in nats.

        Targets of -100 are left out of the mean. With targets, gradients flow from the loss alone. Raises ValueError
        for more than block_size tokens or, on the CPU, for an id outside the vocabulary.
        """
        logits = self.lm_head(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits, None
        in_parts = logits.is_cpu and not torch.compiler.is_compiling()
        cross_entropy = CrossEntropy.apply if in_parts else F.cross_entropy
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits.detach(), loss  # else a compiled backward pass would begin with zeros for a gradient of theirs

    @torch.no_grad()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the ids (B, 1) that continue token ids (B, T), one sampled for each row at a time.

        Temperature 0 takes the likeliest token; otherwise one is drawn from the `top_k` likeliest, and of these from
        the fewest whose probabilities come to `top_p` (Holtzman et al., 2020). Ids that only pad the vocabulary are
        never drawn. The model sees the last block_size tokens. Up to there, keys and values are cached; past it, the
        window slides by a token a step, which moves every position, so that each step reads the whole window. Raises
        ValueError, at the first id, for an empty prompt or settings out of range.
        """
        if idx.shape[1] == 0 or temperature < 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
            given = f"{idx.shape[1]} tokens, temperature {temperature}, top_k {top_k}, top_p {top_p}"
            raise ValueError(f"need a prompt, temperature >= 0, top_k >= 1 and 0 < top_p <= 1, not {given}")
        self.check_ids(idx)
        block_size, unread = self.config.block_size, idx
        caches = [Cache(min(block_size, idx.shape[1] + max_new_tokens)) for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            if idx.shape[1] <= block_size:
                hidden = self.hidden(unread, caches=caches)  # (B, T, C)
            else:
                hidden = self.hidden(idx[:, -block_size:])  # (B, T, C)
            logits = self.lm_head(hidden[:, -1])[:, :N_TOKENS].float()  # (B, V)
            unread = draw(logits, temperature, top_k, top_p, generator)
            idx = torch.cat([idx, unread], dim=1)
            yield unread

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Token ids (B, T) and what `stream` continues them by: (B, T + max_new_tokens), or shorter if all rows end.

        A row ends with its first new <|endoftext|>, and is filled up with it until the others have ended too.
        """
        ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for new in self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator):
            idx = torch.cat([idx, new.masked_fill(ended, END_OF_TEXT)], dim=1)
            ended |= new == END_OF_TEXT
            if ended.all():
                break
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
    def from_pretrained(cls, source: str | Path, vocab_multiple: int = 1, block_size: int | None = None) -> GPT:
        """Load a directory in the Hugging Face layout, or a model of the Hub by its name, as `gpt2` or `gpt2-xl`.

        The vocabulary is padded to a multiple of `vocab_multiple`, the positions are cropped to `block_size`. Raises
        DataError where the source cannot be had or holds no such GPT-2, ValueError for more positions than it has.
        """
        config = read_config(find_file(source, "config.json"))
        with torch.device("meta"):
            shapes = {name: weight.shape for name, weight in cls(config).state_dict().items()}
        config, weights = resize(config, read_weights(source, shapes), vocab_multiple, block_size or config.block_size)
        with torch.device("meta"):  # to draw initial weights would take longer than to read these
            gpt = cls(config)
        gpt.to_empty(device="cpu").load_state_dict(weights)
        gpt.lm_head.weight = gpt.transformer.wte.weight
        return gpt


def find_file(source: str | Path, name: str) -> Path:
    """A file of a directory, or of a model on the Hugging Face Hub; raises DataError where it cannot be had."""
    first, *rest = Path(source).parts or [""]
    if Path(first).exists() or len(rest) > 1 or str(source).startswith((".", "/")):  # the Hub's are OWNER/NAME, or NAME
        path = Path(source) / name
        if not path.is_file():
            steps = [f"; did you mean {step}?" for step in sorted(Path(source).glob("step_*"))]
            raise DataError(f"{source} is not a checkpoint: there is no {path}{''.join(steps[-1:])}")
        return path
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(str(source), name)).resolve()
    except Exception as error:  # the library promises no particular ones
        reason = " ".join(str(error).split())
        raise DataError(f"{source} is no directory here, and {name} did not come from the Hub: {reason}") from None
    if re.fullmatch("[0-9a-f]{64}", path.name) and sha256(path) != path.name:  # by which the Hub's cache names it
        path.unlink(missing_ok=True)
        raise DataError(f"{name} of {source} did not come whole from the Hub: run the same command again")
    return path


def weight_files(source: str | Path) -> list[Path]:
    """model.safetensors, or the files that its index lists."""
    try:
        return [find_file(source, "model.safetensors")]
    except DataError as missing:
        try:
            path = find_file(source, "model.safetensors.index.json")
        except DataError:
            raise missing from None
    try:
        names = {Path(name).name for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not an index of weights: {error}") from None
    return [find_file(source, name) for name in sorted(names)]


def read_weights(source: str | Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The weights by their names in this program; raises DataError unless they have these shapes, and are GPT-2's."""
    read = {name: weight for path in weight_files(source) for name, weight in load_tensors(path).items()}
    weights = {full_name(name): stored(name, weight) for name, weight in read.items() if not is_mask(name)}
    weights.setdefault("lm_head.weight", weights.get("transformer.wte.weight"))
    wrong = [name for name in shapes | weights if getattr(weights.get(name), "shape", None) != shapes.get(name)]
    if wrong:
        raise DataError(f"the weights of {source} do not fit its config.json: {', '.join(wrong[:3])}")
    if not torch.equal(weights["lm_head.weight"].float(), weights["transformer.wte.weight"].float()):
        raise DataError(f"{source} has a classifier that is not tied to its embedding, which GPT-2's is")
    return weights


def resize(
    config: GPTConfig, weights: dict[str, Tensor], vocab_multiple: int, block_size: int
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Pad the vocabulary and crop the positions; raises ValueError for more positions than there are.

    A row that pads is the mean of the others, so that its logit is the mean of theirs: N of them beside V others get at
    most N / (N + V) of the probability, by Jensen's inequality. Rows of zeros could get nearly all of it.
    """
    if block_size > config.block_size:
        raise ValueError(f"block_size {block_size} is more than the model's {config.block_size}")
    vocab_size = math.ceil(config.vocab_size / vocab_multiple) * vocab_multiple
    embedding, positions = weights["transformer.wte.weight"].float(), weights["transformer.wpe.weight"][:block_size]
    embedding = torch.cat([embedding, embedding.mean(dim=0).expand(vocab_size - config.vocab_size, -1)])
    changed = {"transformer.wte.weight": embedding, "lm_head.weight": embedding, "transformer.wpe.weight": positions}
    return replace(config, vocab_size=vocab_size, block_size=block_size), weights | changed


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on the device, or None outside of it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy on a CPU, for logits (N, V) of any float type: in fp32, of a few rows at a time.

    Whole, the logits in fp32, their log-softmax and its gradient would go through memory several times; a few rows stay
    in the processor's cache, for both passes at once.
    """

    ROWS = 16

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        kind = torch.promote_types(logits.dtype, torch.bfloat16)  # fp16 has no room for small probabilities
        counts, losses, gradients = targets != -100, torch.empty(len(targets)), torch.empty_like(logits, dtype=kind)
        columns = (logits, targets.where(counts, 0)[:, None], losses, gradients)
        parts = (column.split(CrossEntropy.ROWS) for column in columns)
        for some, wanted, loss, gradient in zip(*parts, strict=True):
            some = some.float()
            probabilities = some.softmax(dim=1)
            # the sum of exponentials is 1 / the largest probability, so that they need not be computed twice
            loss.copy_(some.amax(dim=1) - some.gather(1, wanted)[:, 0] - probabilities.amax(dim=1).log())
            if ctx.needs_input_grad[0]:
                gradient.copy_(probabilities.scatter_add_(1, wanted, torch.full(wanted.shape, -1.0)))
        ctx.save_for_backward(gradients, counts)
        return losses[counts].mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradients, counts = ctx.saved_tensors
        scales = counts[:, None] * (gradient / counts.sum())  # (N, 1)
        exact = torch.equal(scales, scales.to(gradients.dtype))  # as powers of two are; mixed types take far longer
        return gradients.mul_(scales.to(gradients.dtype)) if exact else gradients * scales, None


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Sample one id (B, 1) from each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that a small temperature does not overflow
    probabilities = F.softmax(logits / max(temperature, 1e-6), dim=-1)
    if top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True)
        before = falling.cumsum(dim=-1) - falling  # what the likelier ones have together
        probabilities = torch.zeros_like(falling).scatter(1, order, falling.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, num_samples=1, generator=generator)


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
