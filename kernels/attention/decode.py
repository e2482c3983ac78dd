"""Attention over a key-value cache in plain Triton: few queries, many keys, so nothing but reading K and V counts.

Split-KV (Flash-Decoding): a sequence's keys are cut into ranges, each range is a program of its own, so that one
sequence fills the GPU, and a second kernel combines the ranges. Of range r with its own softmax, out_r and lse_r:

    lse = log sum_r exp(lse_r),    out = sum_r exp(lse_r - lse) out_r

summed in the order of r: no atomics, the same bits each time. The query heads that share a key head are packed into the
rows of one tile, with all queries of the sequence (row = query * group + head in group), so K and V are read once and
the tensor cores work even for one query. All walks are masked walks: a second, unmasked loop would wait once more for
its first tile, which costs more than comparing.

How many ranges there are is decided on the host from shapes alone, so a CUDA graph that was captured once serves all
lengths; how long they are, on the device: each sequence is cut evenly. With a fixed split size instead, a sequence's
ranges depend on its own length only, and its result on nothing else in the batch.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..dispatch import early_launch, interpreting, multiprocessors, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIN_SPLIT = 128  # keys: a shorter range is over before it is worth its partial result
COMBINED = 64  # ranges that are added up at a time: part of the order of the sum
WIDE, NARROW = 2, 3  # programs at a time on a multiprocessor with wide and with narrow tiles
MANY = 1.5  # rounds of programs: beyond, what each waits for when it begins counts more than wide tiles
SHORT = 1024  # keys of a range: in shorter ones too


def block_sizes(rows: int, head_dim: int, dtype: torch.dtype, paged: bool, narrow: bool = False) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages for that many packed rows: two programs fit a multiprocessor of Hopper,
    each with two or three tiles on their way. Where an address is loaded before what it points to, two stages make one
    tile. narrow: of half as many keys, which are there sooner when a program begins."""
    if interpreting():
        m, n, warps, stages = 16, 16, 1, 1  # small, so that short sequences cross tiles
    elif dtype == torch.float32:  # no tensor cores: operands in registers
        m, n, warps, stages = 16, 32, 8, 2
    else:
        m, n = min(128, max(16, next_power_of_2(rows))), (32 if narrow else 64) * (1 if head_dim > 64 else 2)
        warps, stages = 4 if m <= 64 else 8, 6 if paged else 4
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def split_count(programs: int, tiles: int, most: int, slots: int) -> int:
    """Ranges per sequence of that many tiles: the fewest, of `most`, that keep the slots nearly (0.95) as busy as the
    best number would. Ranges are whole tiles, so the last ones may have nothing left."""

    def busy(splits: int) -> float:
        return tiles / (-(-programs * splits // slots) * -(-tiles // splits))

    counts = range(1, max(1, min(4 * slots // max(1, programs), most)) + 1)
    best = max(map(busy, counts))
    return next(count for count in counts if busy(count) >= 0.95 * best)


@functools.lru_cache(maxsize=1024)
def _plan(
    programs: int, capacity: int, rows: int, head_dim: int, dtype: torch.dtype, paged: bool, processors: int
) -> tuple[dict[str, int], int]:
    """Block sizes and the number of ranges, for that many programs a range and packed rows a program."""
    wide, narrow = (block_sizes(rows, head_dim, dtype, paged, narrow=n) for n in (False, True))
    tiles, shorter = (max(1, triton.cdiv(capacity, sizes["BLOCK_N"])) for sizes in (wide, narrow))
    most, slots = capacity // MIN_SPLIT, WIDE * processors
    splits = split_count(programs, tiles, most, slots)
    if not paged:
        return wide, splits
    if rows <= 16:  # more rows would be computing, not waiting
        more = split_count(programs, shorter, most, NARROW * processors)
        if programs * more <= NARROW * processors and capacity <= SHORT * more:
            return narrow, more
    return (narrow if programs * splits > MANY * slots or tiles <= 2 * splits else wide), splits


@triton.jit(do_not_specialize=["queries", "new", "capacity", "splits", "split_size", "table_row", "rows"])
def _split_kernel(
    q, k_cache, v_cache, out, lse, seqlens, block_table, k_descale, v_descale, scale,
    queries, new, capacity, splits, split_size,
    q_batch, q_row, q_head, k_block, k_slot, k_head, v_block, v_slot, v_head, table_row, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
    DESCALE: tl.constexpr, UPCAST: tl.constexpr, EARLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows [queries * GROUP] of one key head of one sequence over one range of keys. out and lse are contiguous,
    (splits, batch, queries, heads, head_dim) and (splits, batch, queries, heads), the lse of a range to base 2."""
    if EARLY:
        gdc_launch_dependents()
    tiles = tl.num_programs(0) // KV_HEADS
    kv_head = tl.program_id(0) // tiles
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(seqlens + batch).to(tl.int32) + new, capacity)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    in_tile = query < queries
    at = tl.arange(0, D)

    if split_size == 0:  # as even as whole tiles allow
        split_size = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    first = split * split_size
    last = tl.minimum(length, first + split_size)
    sees = query + length - queries  # the last key that each row sees
    if CAUSAL:
        last = tl.minimum(last, tl.max(tl.where(in_tile, sees, -1), 0) + 1)

    q_at = q + batch * q_batch + query[:, None].to(tl.int64) * q_row + head[:, None].to(tl.int64) * q_head + at[None, :]
    q_tile = tl.load(q_at, mask=in_tile[:, None], other=0.0)
    if UPCAST:  # the interpreter's bf16 arithmetic is wrong
        q_tile = q_tile.to(tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E
    if DESCALE:
        scale_log2 *= tl.load(k_descale + kv_head)
    k_base = k_cache + kv_head.to(tl.int64) * k_head + at[None, :]
    v_base = v_cache + kv_head.to(tl.int64) * v_head + at[None, :]
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start in tl.range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < last
        if PAGE > 0:
            block = tl.load(block_table + batch * table_row + column // PAGE, mask=inside, other=0).to(tl.int64)
            slot = (column % PAGE).to(tl.int64)
        else:
            block = batch
            slot = column.to(tl.int64)
        k_at = k_base + (block * k_block + slot * k_slot)[:, None]
        v_at = v_base + (block * v_block + slot * v_slot)[:, None]
        k = tl.load(k_at, mask=inside[:, None], other=0.0).to(q_tile.dtype)  # [BLOCK_N, D]
        s = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (column[None, :] <= sees[:, None])
        s = tl.where(visible, s, -float("inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(new_m == -float("inf"), 0.0, new_m)  # a row that has seen nothing: -inf - -inf is NaN
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        mass = mass * shrink + tl.sum(p, 1)
        v = tl.load(v_at, mask=inside[:, None], other=0.0).to(q_tile.dtype)  # [BLOCK_N, D]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = new_m

    # Rows that see no key have mass 0 and m = -inf: they give zeros, and lse = -inf.
    mass = tl.where(mass == 0.0, 1.0, mass)
    acc = acc / mass[:, None]
    if DESCALE:
        acc *= tl.load(v_descale + kv_head)
    result = (batch * queries + query) * (KV_HEADS * GROUP) + head
    split = split.to(tl.int64)
    unit = tl.where(splits == 1, LN2, 1.0)  # the only range is the result
    tl.store(lse + split * rows + result, (m + tl.log2(mass)) * unit, mask=in_tile)
    out_at = out + (split * rows + result)[:, None] * D + at[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=in_tile[:, None])


@triton.jit(do_not_specialize=["splits", "rows"])
def _combine_kernel(
    partial, partial_lse, out, lse, splits, rows, D: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of (rows, head_dim): its ranges in order, BLOCK at a time; empty ones add exact zeros.

    EARLY: the program was launched while the ranges are still being computed, and waits for the last of them here.
    """
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, D)
    m = -float("inf")
    mass = 0.0
    acc = tl.zeros((D,), tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        part = split.to(tl.int64) * rows + row
        x = tl.load(partial_lse + part, mask=split < splits, other=-float("inf"))
        parts = tl.load(partial + part[:, None] * D + at[None, :], mask=(split < splits)[:, None], other=0.0)
        new_m = tl.maximum(m, tl.max(x, 0))
        safe = tl.where(new_m == -float("inf"), 0.0, new_m)
        weight = tl.exp2(x - safe)
        shrink = tl.exp2(m - safe)
        mass = mass * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        m = new_m
    mass = tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + row * D + at, (acc / mass).to(out.dtype.element_ty))
    tl.store(lse + row, (m + tl.log2(mass)) * LN2)


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor,
    new: int,
    block_table: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    scale: float,
    causal: bool,
    num_splits: int,
    split_size: int,
) -> tuple[Tensor, Tensor]:
    """q (batch, queries, heads, head_dim) over seqlens + new keys -> out like q, lse (batch, queries, heads) fp32.

    num_splits ranges of equal size (0: chosen here), or ranges of split_size keys where that is not 0.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    rows = batch * queries * heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, queries, heads), dtype=torch.float32, device=q.device)
    if rows:
        paged, packed = block_table is not None, queries * heads // kv_heads
        sizes = block_sizes(packed, head_dim, q.dtype, paged)
        tiles = triton.cdiv(packed, sizes["BLOCK_M"])
        page = 0 if block_table is None else k_cache.shape[1]
        capacity = k_cache.shape[1] if block_table is None else block_table.shape[1] * page
        if split_size:
            split_size = -(-split_size // sizes["BLOCK_N"]) * sizes["BLOCK_N"]
            num_splits = max(1, triton.cdiv(capacity, split_size))
        elif num_splits == 0:
            programs = batch * kv_heads * tiles
            sizes, num_splits = _plan(
                programs, capacity, packed, head_dim, q.dtype, paged, multiprocessors(q.device) if q.is_cuda else 2
            )
        partial, partial_lse = out, lse
        if num_splits > 1:
            partial = torch.empty((num_splits, *q.shape), dtype=torch.float32, device=q.device)
            partial_lse = torch.empty((num_splits, *lse.shape), dtype=torch.float32, device=q.device)
        descaled, early = k_descale is not None, early_launch(q.device)
        interpreted_bf16 = q.dtype == torch.bfloat16 and interpreting()
        _split_kernel[(kv_heads * tiles, num_splits, batch)](
            q, k_cache, v_cache, partial, partial_lse, seqlens, seqlens if block_table is None else block_table,
            k_descale if descaled else lse, v_descale if descaled else lse, scale,
            queries, new, capacity, num_splits, split_size,
            q.stride(0), q.stride(1), q.stride(2), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
            v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
            0 if block_table is None else block_table.stride(0), rows,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=head_dim, PAGE=page, CAUSAL=causal, DESCALE=descaled,
            UPCAST=interpreted_bf16, EARLY=early, **sizes,
        )  # fmt: skip
        if num_splits > 1:
            # With a fixed split size the order of the sum must not depend on how many ranges there could be.
            block = COMBINED if split_size else min(COMBINED, max(8, next_power_of_2(num_splits)))
            _combine_kernel[(rows,)](
                partial, partial_lse, out, lse, num_splits, rows, D=head_dim, EARLY=early, BLOCK=block,
                num_warps=max(1, block // 16), launch_pdl=early,
            )  # fmt: skip
    return out, lse
