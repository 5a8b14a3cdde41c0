"""GPT-2, the network: its shapes, initial weights, loss and sampling.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.tokenizer import END_OF_TEXT, N_TOKENS


@dataclass(frozen=True)
class GPTConfig:
    """The network's sizes; raises ValueError if they do not fit together."""

    block_size: int = 1024
    vocab_size: int = N_TOKENS
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 128, for which GPUs have faster matrix products."""
        return math.ceil(self.vocab_size / 128) * 128


PRESETS = {
    "debug": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class Cache:
    """The keys and values that a layer has computed, with room for `size` tokens."""

    def __init__(self, size: int) -> None:
        self.size, self.length = size, 0
        self.k = self.v = torch.empty(0)  # allocated with the first tokens, whose dtype and device they have

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append those (B, H, T, D) of the next tokens; returns all up to here."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.size, D), v.new_empty(B, H, self.size, D)
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
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
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
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
    """LayerNorm before attention and before the MLP, each of which adds to the residual stream."""

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
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self.initialize)
        with torch.no_grad():
            self.lm_head.weight[config.vocab_size :] = 0.0  # padding: outside the loss, so it stays zero

    def initialize(self, module: nn.Module) -> None:
        """Draw weights from N(0, 0.02), scaled down where 2 n_layer projections add to the residual stream."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):
            # apply() visits a module after its children, so this draw replaces the one above
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def flops_per_token(self) -> int:
        """Of training: 6 for each weight that multiplies, and 12 L C T for attention (PaLM, appendix B)."""
        weights = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """The final hidden states (B, T, C) of token ids (B, T), from which the LM head computes logits.

        A token sees itself and those before it. With `caches`, one per layer, the first call reads the beginning and
        fills them, and each later one takes a single token. With `positions` (B, T), each below block_size, and a
        `mask` (B, 1, T, T), true where the token of a row sees that of a column, the caller gives each
        token's position and attention mask. Raises ValueError for more than block_size tokens.
        """
        T, cached = idx.shape[1], caches[0].length if caches else 0
        assert cached == 0 or T == 1
        if positions is None:
            if cached + T > self.config.block_size:
                raise ValueError(f"a sequence of {cached + T} tokens exceeds block_size {self.config.block_size}")
            positions = torch.arange(cached, cached + T, device=idx.device)  # (T)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, cache in zip(self.transformer.h, caches or [None] * self.config.n_layer, strict=True):
            x = block(x, mask, cache)
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head: logits (..., V) of hidden states (..., C), without those of the embedding's padding."""
        return self.lm_head(hidden)[..., : self.config.vocab_size]

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) for token ids (B, T), and with targets (B, T) their mean cross-entropy in nats.

        Targets of -100 are left out of the mean. Raises ValueError for more than block_size tokens.
        """
        return self.logits_and_loss(self.hidden(idx), targets)

    def logits_and_loss(self, hidden: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `forward` returns, from hidden states (B, T, C)."""
        logits = self.logits(hidden)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Yield the ids (B, 1) that continue token ids (B, T), one for each row at a time; see sample_token's settings.

        The model sees the last block_size tokens. Up to there, keys and values are cached; past it, the window slides
        by a token a step, which moves every position, so that each step reads the whole window. Raises ValueError, at
        the first id, for an empty prompt.
        """
        if idx.shape[1] == 0:
            raise ValueError("an empty prompt cannot be continued")
        block_size, unread = self.config.block_size, idx
        cache_size = min(block_size, idx.shape[1] + max_new_tokens)
        caches = [Cache(cache_size) for _ in self.transformer.h]
        for _ in range(max_new_tokens):
            if idx.shape[1] <= block_size:
                hidden = self.hidden(unread, caches=caches)  # (B, T, C)
            else:
                hidden = self.hidden(idx[:, -block_size:])  # (B, T, C)
            # a model made elsewhere may pad its vocabulary, and the padding is never sampled
            logits = self.logits(hidden[:, -1])[:, :N_TOKENS].float()  # (B, V)
            unread = sample_token(logits, **sampling)
            idx = torch.cat([idx, unread], dim=1)
            yield unread

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """Token ids (B, T) and what `stream` continues them by: (B, T + max_new_tokens), or fewer if all rows end.

        A row ends with its first new <|endoftext|>, and is filled up with it until the others have ended too.
        """
        finished = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for new in self.stream(idx, max_new_tokens, **sampling):
            idx = torch.cat([idx, new.masked_fill(finished, END_OF_TEXT)], dim=1)
            finished |= new == END_OF_TEXT
            if finished.all():
                break
        return idx


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one id (B, 1) from each row of logits (B, V).

    Temperature 0 takes the likeliest token; otherwise one is drawn from the `top_k` likeliest, and of these from the
    fewest whose probabilities come to `top_p` (Holtzman et al., 2020). Raises ValueError for settings out of range,
    FloatingPointError if the logits are not finite.
    """
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range")
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights have diverged or are damaged")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that a small temperature does not overflow
    probabilities = F.softmax(logits / max(temperature, 1e-6), dim=-1)
    if top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the fewest ids whose probabilities (B, V) sum to `top_p`, and zero the rest."""
    descending, order = probabilities.sort(dim=-1, descending=True)
    likelier = descending.cumsum(dim=-1) - descending  # the sum over the ids before each
    kept = descending.masked_fill(likelier >= top_p, 0.0)
    kept[:, 0] = descending[:, 0]  # also where top_p rounds to 0
    return torch.zeros_like(kept).scatter(1, order, kept)
