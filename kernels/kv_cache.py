"""The key-value cache: writing new keys and values, and attending over what it holds. For inference: no gradients.

A cache is (sequences, max_len, kv_heads, head_dim), or, in pages, (num_blocks, page, kv_heads, head_dim). Both are a
row of slots: slot = first index * second size + second index. A block table (sequences, max_blocks) names each
sequence's pages in order, so position p of sequence b lies in slot block_table[b, p // page] * page + p % page.

A cache may hold fp8 (e4m3): an entry is then multiplied by its head's descale, fp32 (kv_heads,), to give the value.

The ops that write change their arguments, and return nothing: `torch.compile` sees the writes. None of them waits for
the GPU, and none allocates by a length that only the GPU knows, so all can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference, rope
from .dispatch import Kernel, check, floating, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl

CACHE_DTYPES = (torch.float8_e4m3fn,)  # besides that of k, v and q


@Kernel
def _write_kernel(
    k, v, k_cache, v_cache, slots, seqlens, block_table, k_descale, v_descale, new, capacity, page,
    k_row, k_head, v_row, v_head, k_block, k_slot, k_cache_head, v_block, v_slot, v_cache_head, table_row,
    KV_HEADS: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, PAGED: tl.constexpr, DESCALE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
        wanted = slot >= 0
        block = slot // page
        slot = slot % page
    else:  # behind what the sequence holds already
        batch = row // new
        slot = tl.load(seqlens + batch).to(tl.int64) + row % new
        wanted = (slot >= 0) & (slot < capacity)
        block = batch
        if PAGED:
            block = tl.load(block_table + batch * table_row + slot // page, mask=wanted, other=0).to(tl.int64)
            wanted = wanted & (block >= 0)  # an entry of the table that is not used
            slot = slot % page
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)  # heads may lie far apart
    at = tl.arange(0, BLOCK)[None, :]
    mask = (head[:, None] < KV_HEADS) & (at < D) & wanted
    new_k = tl.load(k + row * k_row + head[:, None] * k_head + at, mask=mask, other=0.0)
    new_v = tl.load(v + row * v_row + head[:, None] * v_head + at, mask=mask, other=0.0)
    if DESCALE:
        k_factor = tl.load(k_descale + head, mask=head < KV_HEADS, other=1.0)[:, None]
        v_factor = tl.load(v_descale + head, mask=head < KV_HEADS, other=1.0)[:, None]
        new_k = tl.clamp(new_k.to(tl.float32) / k_factor, -448.0, 448.0, tl.PropagateNan.ALL)
        new_v = tl.clamp(new_v.to(tl.float32) / v_factor, -448.0, 448.0, tl.PropagateNan.ALL)
    k_at = k_cache + block * k_block + slot * k_slot + head[:, None] * k_cache_head + at
    v_at = v_cache + block * v_block + slot * v_slot + head[:, None] * v_cache_head + at
    tl.store(k_at, new_k.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_at, new_v.to(v_cache.dtype.element_ty), mask=mask)


@functools.cache
def _has_fp8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _unsupported(*tensors: Tensor) -> str | None:
    if any(x.dtype == torch.float64 for x in tensors):
        return "the Triton kernels do not compute in float64"
    if any(x.dtype in CACHE_DTYPES and x.is_cuda and not _has_fp8(x.device) for x in tensors):
        return "the GPU converts to fp8 from compute capability 8.9 on"
    return None if all(x.stride(-1) == 1 for x in tensors) else "the elements of a head must be contiguous"


def _launch_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor | None, seqlens: Tensor | None, new: int,
    block_table: Tensor | None, k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    """k, v (total, kv_heads, head_dim), by `slots`, or from position seqlens on of each sequence, `new` rows each."""
    rows, kv_heads, head_dim = k.shape
    page = k_cache.shape[1]
    block = next_power_of_2(head_dim)
    per_program = min(next_power_of_2(kv_heads), max(1, 2048 // block))
    unused = k_cache  # a pointer that is not followed
    if rows and kv_heads:
        _write_kernel[(rows, -(-kv_heads // per_program))](
            k, v, k_cache, v_cache, unused if slots is None else slots, unused if seqlens is None else seqlens,
            unused if block_table is None else block_table, unused if k_descale is None else k_descale,
            unused if v_descale is None else v_descale, new,
            page if block_table is None else page * block_table.shape[1], page,
            *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            0 if block_table is None else block_table.stride(0),
            KV_HEADS=kv_heads, D=head_dim, SLOTS=slots is not None, PAGED=block_table is not None,
            DESCALE=k_descale is not None, HEADS=per_program, BLOCK=block, num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("deepseek_coder::write_kv", mutates_args={"k_cache", "v_cache"})
def _write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    if use_triton(k, _unsupported(k, v, k_cache, v_cache)):
        slots = slot_mapping.contiguous()
        _launch_write(k, v, k_cache, v_cache, slots, None, 1, None, k_descale, v_descale)
    else:
        reference.write_kv(k, v, k_cache, v_cache, slot_mapping, k_descale, v_descale)


@_write_kv.register_fake
def _(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    return None


@torch.library.custom_op("deepseek_coder::append_kv", mutates_args={"k_cache", "v_cache"})
def _append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    """k, v (batch, new, kv_heads, head_dim) into positions seqlens and on; what does not fit is dropped."""
    new, page = k.shape[1], k_cache.shape[1]
    if use_triton(k, _unsupported(k, v, k_cache, v_cache)):
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        _launch_write(k, v, k_cache, v_cache, None, seqlens, new, block_table, k_descale, v_descale)
    else:
        capacity = page if block_table is None else block_table.shape[1] * page
        slots = _slots(seqlens.long(), new, page, capacity, block_table)
        reference.write_kv(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots, k_descale, v_descale)


@_append_kv.register_fake
def _(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    return None


@torch.library.custom_op("deepseek_coder::rope_write_kv", mutates_args={"qkv", "k_cache", "v_cache"})
def _rope_write_kv(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, heads: int,
    theta: float, factor: float, k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    kv_heads, head_dim = k_cache.shape[2:]
    frequencies = rope.inverse_frequencies(head_dim, theta, factor, qkv.device)
    if use_triton(qkv, _unsupported(qkv, k_cache, v_cache)):
        cache = rope.Cache(k_cache, v_cache, slot_mapping.contiguous(), k_descale, v_descale)
        rope.launch(qkv, positions, frequencies, heads + kv_heads, False, cache)
    else:
        reference.rope_(qkv, positions, frequencies, heads + kv_heads, False)
        _, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
        reference.write_kv(k, v, k_cache, v_cache, slot_mapping, k_descale, v_descale)


@_rope_write_kv.register_fake
def _(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, heads: int,
    theta: float, factor: float, k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    return None


@torch.library.custom_op("deepseek_coder::attention_with_kvcache", mutates_args=())
def _attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, new: int, block_table: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None, scale: float, causal: bool, num_splits: int, split_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out like q, lse (batch, queries, heads) fp32; over seqlens + new keys of each sequence."""
    unsupported = _unsupported(q, k_cache, v_cache)
    if q.shape[3] not in (16, 32, 64, 128):
        unsupported = f"the Triton attention has head_dim 16, 32, 64 and 128, not {q.shape[3]}"
    if use_triton(q, unsupported):
        from .attention import decode

        return decode.attention_with_kvcache(
            q, k_cache, v_cache, seqlens, new, block_table, k_descale, v_descale, scale, causal, num_splits, split_size
        )
    if k_descale is not None and v_descale is not None:
        k_cache, v_cache = (
            (cache.to(wide) * factor.to(wide)[:, None]).to(q.dtype)
            for wide in (reference.wide(q.dtype),)
            for cache, factor in ((k_cache, k_descale), (v_cache, v_descale))
        )
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = (seqlens.long() + new).clamp(max=capacity)
    if q.device.type == "cpu":
        known = lengths.tolist()
        out, lse = reference.cached_attention_by_sequence(q, k_cache, v_cache, known, block_table, scale, causal)
    else:
        out, lse = reference.cached_attention_masked(q, k_cache, v_cache, lengths, block_table, scale, causal)
    return out, lse.transpose(1, 2).contiguous()


@_attention_with_kvcache.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, new: int, block_table: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None, scale: float, causal: bool, num_splits: int, split_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=reference.wide(q.dtype))


def _check_cache(
    name: str, x: Tensor, k_cache: Tensor, v_cache: Tensor, k_descale: Tensor | None, v_descale: Tensor | None
) -> None:
    """x: what is written or asks."""
    fits = k_cache.dim() == 4 and k_cache.shape == v_cache.shape
    check(fits, lambda: f"{name}: k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} do not fit")
    check(floating(x), lambda: f"{name}: floating point of 16 bits or more is needed, not {x.dtype}")
    same = k_cache.dtype == v_cache.dtype and x.device == k_cache.device == v_cache.device
    same = same and (k_cache.dtype == x.dtype or k_cache.dtype in CACHE_DTYPES)
    check(
        same,
        lambda: f"{name}: {x.dtype} on {x.device}, the caches {k_cache.dtype} and {v_cache.dtype} on {k_cache.device}",
    )
    descaled = [y for y in (k_descale, v_descale) if y is not None]
    fits = len(descaled) == (2 if k_cache.dtype in CACHE_DTYPES else 0)
    check(fits, lambda: f"{name}: an fp8 cache, and no other, needs k_descale and v_descale")
    for y in descaled:
        fits = y.shape == k_cache.shape[2:3] and y.dtype == torch.float32 and y.device == x.device
        fits = fits and y.is_contiguous()
        check(fits, lambda: f"{name}: a descale must be contiguous fp32 ({k_cache.shape[2]},) on {x.device}")


def _check_slots(name: str, slot_mapping: Tensor, x: Tensor) -> None:
    fits = slot_mapping.shape == x.shape[:1] and slot_mapping.dtype in (torch.int32, torch.int64)
    check(fits, lambda: f"{name}: slot_mapping must be int32 or int64 ({x.shape[0]},), not {tuple(slot_mapping.shape)}")
    check(slot_mapping.device == x.device, lambda: f"{name}: slot_mapping on {slot_mapping.device}, not {x.device}")


@torch.no_grad()
def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> None:
    """Writes row i of k and v into slot slot_mapping[i] of the caches; a negative slot skips the row.

    k, v (total, kv_heads, head_dim); k_cache, v_cache (m, n, kv_heads, head_dim), contiguous or in pages, of k's dtype
    or fp8 e4m3; slot_mapping (total,) int32 or int64 with no slot twice; descales, for fp8 only, fp32 (kv_heads,).
    ValueError when shapes, dtypes or devices do not fit.
    """
    _check_cache("write_kv", k, k_cache, v_cache, k_descale, v_descale)
    fits = k.dim() == 3 and k.shape == v.shape and k.shape[1:] == k_cache.shape[2:]
    fits = fits and k.dtype == v.dtype and k.device == v.device
    check(fits, lambda: f"write_kv: k {tuple(k.shape)}, v {tuple(v.shape)} do not fit the cache {tuple(k_cache.shape)}")
    _check_slots("write_kv", slot_mapping, k)
    _write_kv(k, v, k_cache, v_cache, slot_mapping, k_descale, v_descale)


@torch.no_grad()
def apply_rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    theta: float,
    factor: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor:
    """apply_rope on qkv, in place, and write_kv of its rotated k and its v, in one launch; returns qkv. No gradients.

    qkv (total, (num_heads + 2 num_kv_heads) * head_dim), positions (total,) integers, caches and slot_mapping as in
    write_kv. ValueError when shapes, dtypes or devices do not fit.
    """
    name = "apply_rope_and_write_kv"
    rope.check_arguments(name, qkv, positions, num_heads, num_kv_heads)
    _check_cache(name, qkv, k_cache, v_cache, k_descale, v_descale)
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    fits = k_cache.shape[2:] == (num_kv_heads, head_dim)
    check(fits, lambda: f"{name}: {num_kv_heads} heads of {head_dim} do not fit the cache {tuple(k_cache.shape)}")
    _check_slots(name, slot_mapping, qkv)
    _rope_write_kv(qkv, positions, k_cache, v_cache, slot_mapping, num_heads, theta, factor, k_descale, v_descale)
    return qkv


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
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    fixed_split_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the cache in place, then attends to it; FlashAttention's conventions. No gradients.

    q (batch, seqlen, heads, head_dim); k, v (batch, new, kv_heads, head_dim) go to positions cache_seqlens and on;
    k_cache, v_cache (batch, max_len, kv_heads, head_dim), or (num_blocks, page, kv_heads, head_dim), any page size,
    with block_table int32 (batch, max_blocks); of q's dtype, or fp8 e4m3 with descales fp32 (kv_heads,). cache_seqlens,
    int or (batch,) integers, counts the entries before the call; None: 0 when k is given, otherwise the whole cache.
    Causal is aligned to the bottom right: the last query sees every key. The scale is head_dim^-0.5 unless given.

    num_splits cuts each sequence's keys into that many ranges, which run side by side (0: chosen from the shapes).
    fixed_split_size cuts them every so many keys instead, rounded up to whole tiles: a sequence's result then has the
    same bits in every batch. The reference knows no ranges.

    Returns out like q, with return_softmax_lse also lse (batch, heads, seqlen) fp32, natural logarithm. ValueError when
    shapes, dtypes or devices do not fit, and, on the CPU and not compiled, when the cache is too short; on a GPU, which
    is not waited for, entries that do not fit are dropped, and so are those whose page the block_table has as negative.
    Only the writes look for that: a page below cache_seqlens + new is read, and must exist.
    """
    name = "flash_attn_with_kvcache"
    _check_cache(name, q, k_cache, v_cache, k_descale, v_descale)
    fits = q.dim() == 4 and q.shape[3] == k_cache.shape[3] and q.shape[2] % max(1, k_cache.shape[2]) == 0
    fits = fits and k_cache.shape[2] > 0
    fits = fits and (block_table is not None or q.shape[0] == k_cache.shape[0])
    check(fits, lambda: f"{name}: q {tuple(q.shape)} and k_cache {tuple(k_cache.shape)} do not fit each other")
    check((k is None) == (v is None), lambda: f"{name}: give both k and v, or neither")
    check(0 <= num_splits < 2**16, lambda: f"{name}: num_splits {num_splits} is outside [0, 65535]")
    check(fixed_split_size is None or fixed_split_size > 0, lambda: f"{name}: fixed_split_size {fixed_split_size} < 1")
    batch, page = q.shape[0], k_cache.shape[1]
    if block_table is not None:
        fits = block_table.shape[:-1] == (batch,) and block_table.dtype == torch.int32 and block_table.stride(-1) == 1
        fits = fits and block_table.device == q.device
        check(
            fits,
            lambda: (
                f"{name}: block_table {block_table.dtype} {tuple(block_table.shape)} on {block_table.device} "
                f"is not int32 ({batch}, max_blocks) on {q.device}"
            ),
        )
    capacity = page if block_table is None else block_table.shape[1] * page
    if isinstance(cache_seqlens, Tensor):
        seqlens = cache_seqlens.contiguous()
    else:
        everywhere = cache_seqlens if cache_seqlens is not None else capacity if k is None else 0
        check(0 <= everywhere < 2**31, lambda: f"{name}: cache_seqlens {everywhere} is outside [0, 2^31)")
        seqlens = torch.full((batch,), everywhere, dtype=torch.int32, device=q.device)
    fits = seqlens.shape == (batch,) and seqlens.dtype in (torch.int32, torch.int64) and seqlens.device == q.device
    check(fits, lambda: f"{name}: cache_seqlens {tuple(seqlens.shape)} is not an integer per sequence on {q.device}")
    new = 0 if k is None else k.shape[1]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        longest = max(seqlens.tolist(), default=0) + new
        check(longest <= capacity, lambda: f"{name}: {longest} entries do not fit a cache of {capacity}")
    if k is not None and v is not None:
        fits = k.dim() == 4 and k.shape == v.shape and (k.shape[0], *k.shape[2:]) == (batch, *k_cache.shape[2:])
        fits = fits and k.dtype == v.dtype == q.dtype and k.device == v.device == q.device
        check(fits, lambda: f"{name}: k {tuple(k.shape)} and v {tuple(v.shape)} do not fit the cache and q")
        _append_kv(k, v, k_cache, v_cache, seqlens, block_table, k_descale, v_descale)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = _attention_with_kvcache(
        q, k_cache, v_cache, seqlens, new, block_table, k_descale, v_descale, scale, causal,
        num_splits, min(fixed_split_size or 0, max(1, capacity)),
    )  # fmt: skip
    return (out, lse.transpose(1, 2)) if return_softmax_lse else out


def _slots(starts: Tensor, new: int, page: int, capacity: int, block_table: Tensor | None) -> Tensor:
    """Slots of positions starts ... starts + new of each sequence, flat; negative where there is none."""
    position = starts[:, None] + torch.arange(new, device=starts.device)  # (batch, new)
    inside = position.clamp(0, capacity - 1)
    if block_table is None:
        slot = torch.arange(starts.shape[0], device=starts.device)[:, None] * page + inside
    else:
        slot = block_table.long().gather(1, inside // page) * page + inside % page
    return torch.where((position >= 0) & (position < capacity), slot, -1).flatten()
