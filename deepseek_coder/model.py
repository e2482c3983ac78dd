"""The decoder: token ids in, logits (or the training loss) out. Read it from top to bottom.

Llama's architecture with DeepSeek-Coder's sizes: pre-norm RMSNorm in fp32, rotary positions with linear scaling,
attention with as many KV heads as the variant has (MHA: all, GQA: some, MQA: one), SwiGLU, no biases.

Two habits shape the code. **Packed sequences**: activations are (total, hidden), documents lie one after another and
`cu_seqlens` (int32, starts with 0) marks their borders; a (batch, seq) input is the special case of equal lengths.
**Fused weights**: `wqkv` holds the rows [all q; all k; all v] and `w_gate_up` the rows [gate; up], one matmul each.

The arithmetic itself lives in `kernels`, each op with a plain-PyTorch reference.
"""

import hashlib
from typing import cast

import torch
from torch import Tensor, nn

import kernels

from .config import ModelConfig


class KVCache:
    """Keys and values of every layer, contiguous: each (batch, max_length, num_kv_heads, head_dim).

    lengths: (batch,) int32, how many positions hold a token.
    """

    def __init__(
        self, config: ModelConfig, batch: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch, max_length, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, kernels.rms_norm(x, self.weight, self.eps))

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) in one pass over memory."""
        return cast(tuple[Tensor, Tensor], kernels.rms_norm(x, self.weight, self.eps, residual))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.theta, self.factor = config.rope_theta, config.rope_factor
        q_and_kv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.wqkv = nn.Linear(config.hidden_size, q_and_kv, bias=False)
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
        qkv = self._rotated_qkv(x, positions)
        attended = kernels.flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, max_seqlen, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, causal=True
        )
        return self.wo(attended)

    def forward_cached(self, x: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """x (batch * new, hidden): `new` tokens of every sequence, attending to the cache and to themselves."""
        batch, d = cache.lengths.shape[0], self.head_dim
        sizes = [self.num_heads * d, self.num_kv_heads * d, self.num_kv_heads * d]
        q, k, v = (t.view(batch, -1, t.shape[-1] // d, d) for t in self._rotated_qkv(x, positions).split(sizes, -1))
        k_cache, v_cache = cache.keys[self.layer], cache.values[self.layer]
        out = kernels.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache.lengths, causal=True)
        return self.wo(cast(Tensor, out).reshape(x.shape[0], -1))

    def _rotated_qkv(self, x: Tensor, positions: Tensor) -> Tensor:  # (total, (H + 2 Hk) * D)
        return kernels.apply_rope(self.wqkv(x), positions, self.num_heads, self.num_kv_heads, self.theta, self.factor)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w_gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.w_down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(kernels.swiglu(self.w_gate_up(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        normed = self.attention_norm(x)
        if cache is None:
            attended = self.attention(normed, positions, cu_seqlens, max_seqlen)
        else:
            attended = self.attention.forward_cached(normed, positions, cache)
        normed, x = self.mlp_norm.after_adding(attended, x)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """A DeepSeek-Coder (or any Llama-shaped) model. Build it under `torch.device("meta")` to describe it for free."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with `targets` the loss.

        tokens: (batch, seq) int64, or (total,) int64 with `cu_seqlens` (documents + 1,) int32, whose last value is
            total; trailing repeats of it are empty documents. Documents do not see each other.
        max_seqlen: the longest document's length, None for the total.
        targets: shaped like tokens, -100 ignored. The loss is made in here because only inside this forward are
            the head's weights whole under FSDP.
        cache: keys and values of the tokens before; grows by this call's tokens. Logits are of the last token only.

        Returns logits (batch, seq, vocab) or (total, vocab) in the weights' dtype (with `cache`: (batch, vocab)), or
        (loss_sum fp32, count int64): the sum of the negative log-likelihoods and how many there are.
        """
        if (cu_seqlens is None and tokens.dim() != 2) or (cu_seqlens is not None and tokens.dim() != 1):
            raise ValueError(
                f"tokens must be (batch, seq), or (total,) with cu_seqlens; got shape {list(tokens.shape)}"
            )
        shape, tokens = tokens.shape, tokens.flatten()
        if cache is not None:
            offsets = torch.arange(shape[1], device=tokens.device)
            positions = (cache.lengths[:, None] + offsets).flatten()
            cu_seqlens = cache.lengths  # not read: the cache knows the lengths
        elif cu_seqlens is None:
            cu_seqlens = torch.arange(0, tokens.numel() + 1, shape[1], dtype=torch.int32, device=tokens.device)
            max_seqlen = shape[1]
            positions = torch.arange(shape[1], device=tokens.device).repeat(shape[0])
        else:
            positions = positions_of(cu_seqlens, tokens.numel())

        x = self.embed(tokens)  # (total, hidden)
        for layer in self.layers:
            x = layer(x, positions, cu_seqlens, max_seqlen, cache)
        if cache is not None:
            cache.lengths += shape[1]
            x = x.view(*shape, -1)[:, -1]
            shape = shape[:1]
        x = self.norm(x)
        head = self.embed.weight if self.head is None else self.head.weight
        if targets is not None:
            return kernels.linear_cross_entropy(x, head, targets.flatten())
        return nn.functional.linear(x, head).view(*shape, -1)


def positions_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: each token's place within its document, counted from 0."""
    index = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return index - cu_seqlens[document]


def initial_weight(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """The fp32 CPU tensor that parameter `name` starts with: ones for norms, normal(0, std) for the rest.

    It depends on the seed and the name alone, so any sharding of a model starts from the same weights.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std
