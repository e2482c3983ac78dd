"""The key-value cache: writing new keys and values, and attending over what it holds.

A cache is (sequences, max_len, kv_heads, head_dim), or, in pages, (num_blocks, page, kv_heads, head_dim). Both are a
row of slots: slot = first index * second size + second index. A block table (sequences, max_blocks) names each
sequence's pages in order, so position p of sequence b lies in slot block_table[b, p // page] * page + p % page.

Both ops are plain PyTorch on every backend for now; on a GPU neither waits for it.
"""

import torch
from torch import Tensor

from . import reference
from .dispatch import check


@torch.no_grad()
def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes row i of k and v into slot slot_mapping[i] of the caches; a negative slot skips the row.

    k, v (total, kv_heads, head_dim); k_cache, v_cache (m, n, kv_heads, head_dim), contiguous or in pages; slot_mapping
    (total,) int32 or int64 with no slot twice. ValueError when shapes, dtypes or devices do not fit.
    """
    fits = k.shape == v.shape and k_cache.shape == v_cache.shape and k.dim() == 3 and k_cache.dim() == 4
    fits = fits and k.shape[1:] == k_cache.shape[2:]
    check(fits, lambda: f"write_kv: k {tuple(k.shape)}, v {tuple(v.shape)} do not fit the cache {tuple(k_cache.shape)}")
    fits = slot_mapping.shape == k.shape[:1] and slot_mapping.dtype in (torch.int32, torch.int64)
    check(
        fits, lambda: f"write_kv: slot_mapping must be int32 or int64 ({k.shape[0]},), not {tuple(slot_mapping.shape)}"
    )
    same = k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
    check(same, lambda: f"write_kv: k is {k.dtype}, v {v.dtype}, the caches {k_cache.dtype} and {v_cache.dtype}")
    same = k.device == v.device == k_cache.device == v_cache.device == slot_mapping.device
    check(
        same, lambda: f"write_kv: k on {k.device}, the cache on {k_cache.device}, slot_mapping on {slot_mapping.device}"
    )
    reference.write_kv(k, v, k_cache, v_cache, slot_mapping)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the cache in place, then attends to it; FlashAttention's conventions. No gradients.

    q (batch, seqlen, heads, head_dim); k, v (batch, new, kv_heads, head_dim) go to positions cache_seqlens and on;
    k_cache, v_cache (batch, max_len, kv_heads, head_dim), or (num_blocks, page, kv_heads, head_dim), any page size,
    with block_table int32 (batch, max_blocks). cache_seqlens, int or (batch,) integers, counts the entries before the
    call; None: 0 when k is given, otherwise the whole cache. Causal is aligned to the bottom right: the last query sees
    every key. `num_splits` is a hint for kernels that split long caches; it changes no result here. The scale is
    head_dim^-0.5 unless given.

    Returns out like q, with return_softmax_lse also lse (batch, heads, seqlen) fp32, natural logarithm. ValueError when
    shapes, dtypes or devices do not fit, and, on the CPU, when the cache is too short; on a GPU, which is not waited
    for, entries that do not fit are dropped.
    """
    fits = q.dim() == 4 and k_cache.dim() == 4 and k_cache.shape == v_cache.shape and q.shape[3] == k_cache.shape[3]
    fits = fits and q.shape[2] % k_cache.shape[2] == 0 and (block_table is not None or q.shape[0] == k_cache.shape[0])

    def shapes() -> str:
        return f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"

    check(fits, lambda: f"flash_attn_with_kvcache: {shapes()} do not fit each other")
    same = q.dtype == k_cache.dtype == v_cache.dtype and q.device == k_cache.device == v_cache.device
    check(
        same,
        lambda: f"flash_attn_with_kvcache: q is {q.dtype} on {q.device}, the cache {k_cache.dtype} on {k_cache.device}",
    )
    check((k is None) == (v is None), lambda: "flash_attn_with_kvcache: give both k and v, or neither")
    batch, page = q.shape[0], k_cache.shape[1]
    if block_table is not None:
        fits = block_table.dim() == 2 and block_table.shape[0] == batch and not block_table.is_floating_point()
        check(
            fits,
            lambda: f"flash_attn_with_kvcache: block_table {tuple(block_table.shape)} is not ({batch}, max_blocks)",
        )
    capacity = page if block_table is None else block_table.shape[1] * page
    if cache_seqlens is None:
        cache_seqlens = capacity if k is None else 0
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    fits = cache_seqlens.shape == (batch,) and not cache_seqlens.is_floating_point()
    check(
        fits,
        lambda: f"flash_attn_with_kvcache: cache_seqlens {tuple(cache_seqlens.shape)} is not an integer per sequence",
    )
    new = 0 if k is None else k.shape[1]
    lengths = cache_seqlens.long() + new
    host_lengths = lengths.tolist() if q.device.type == "cpu" and not torch.compiler.is_compiling() else None
    if host_lengths is not None:
        longest = max(host_lengths, default=0)
        check(
            longest <= capacity, lambda: f"flash_attn_with_kvcache: {longest} entries do not fit a cache of {capacity}"
        )
    if k is not None and v is not None:
        fits = k.dim() == 4 and k.shape == v.shape and k.shape[0] == batch
        check(fits, lambda: f"flash_attn_with_kvcache: k {tuple(k.shape)} and v {tuple(v.shape)} do not fit {shapes()}")
        slots = _slots(cache_seqlens.long(), new, page, capacity, block_table)
        write_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if host_lengths is not None:
        out, lse = reference.cached_attention_by_sequence(q, k_cache, v_cache, host_lengths, block_table, scale, causal)
    else:
        out, lse = reference.cached_attention_masked(q, k_cache, v_cache, lengths, block_table, scale, causal)
    return (out, lse) if return_softmax_lse else out


def _slots(starts: Tensor, new: int, page: int, capacity: int, block_table: Tensor | None) -> Tensor:
    """Slots of positions starts ... starts + new of each sequence, flat; -1 beyond the capacity."""
    position = starts[:, None] + torch.arange(new, device=starts.device)  # (batch, new)
    inside = position.clamp(max=capacity - 1)
    if block_table is None:
        slot = torch.arange(starts.shape[0], device=starts.device)[:, None] * page + inside
    else:
        slot = block_table.long().gather(1, inside // page) * page + inside % page
    return torch.where(position < capacity, slot, -1).flatten()
