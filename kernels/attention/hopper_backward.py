"""Attention backward for Hopper (sm_90) in Gluon: five products, of which none waits for another's results to leave.

A work item is a tile of 128 keys and one query head; it walks over the tiles of 64 queries that see the keys. Query
heads that share a key head leave their parts of dK and dV apart, to be added up afterwards: one item for all of them
would read and add to so many heads' Q, dO and dQ at a time that these fall out of the L2 cache. The kinds of warps in a
program:

- one *loader* warp issues TMA copies: K and V once an item, Q, dO, lse and delta into rings of STAGES buffers;
- two *consumers*, warpgroups of 64 keys each, compute S^T = K Q^T and dP^T = V dO^T, and keep dK and dV in registers.
  P^T and dS^T go from registers straight into the products dV += P^T dO and dK += dS^T Q. dQ = dS K sums over the keys
  of both, so they exchange dS^T in shared memory, and each makes one half of dQ's columns and adds it to the fp32 dQ in
  global memory, from registers, waiting for nothing. It does not pass through shared memory, of which the products
  alone read 256 KB a tile: 2,050 cycles at 128 bytes each, beside the 2,560 that they take themselves;
- if DETERMINISTIC, one *gate* warp. The order in which tiles of keys add to dQ is otherwise that in which they finish,
  and the last bits of the sums with it. A counter for each tile of queries says how many tiles of keys have added to
  it, and the gate lets the consumers add when it is their turn: the last tile of keys first. That is the natural order:
  of tiles that begin at the same time on their first queries, a later one comes to a given query earlier. Items are
  taken up in this order too, so whoever is waited for has been taken up before.

The exchange is the only place where consumers meet. It is taken off the critical path by a delay: the dQ of a tile is
made one tile later, when the other's dS has long been there.

lse and delta are padded: every document begins at a multiple of 64 rows, and rows behind its end have lse = +inf, which
makes their P and dS zero. So the last tile of a document needs no mask, and dQ (padded alike) no bounds.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from ..warpgroup import as_held, held_range, not_earlier, thread_barrier
from .persistent import Work, locate, make_ring, take, told
from .schedule import COLUMNS

ROWS = gl.constexpr(64)  # queries of a tile
KEYS = gl.constexpr(64)  # keys of a consumer


class Descriptors(NamedTuple):
    q: Any
    k: Any
    v: Any
    do: Any
    lse: Any
    delta: Any


class Barriers(NamedTuple):
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    q_full: Any
    q_empty: Any
    do_full: Any
    do_empty: Any
    ds_full: Any
    ds_empty: Any
    granted: Any
    added: Any


class Buffers(NamedTuple):
    """Shared memory: k, v (2, KEYS, D), one each a consumer; q, do (STAGES, ROWS, D); ds (2 * 2, KEYS, ROWS), two tiles
    of both consumers; lse, delta (STAGES, ROWS), fp32."""

    k: Any
    v: Any
    q: Any
    do: Any
    ds: Any
    lse: Any
    delta: Any


class Item(NamedTuple):
    key: Any  # first row of keys
    keys: Any  # how many the document has from there on
    query: Any  # first row of the document's queries
    padded: Any  # the same, padded
    first: Any  # first tile of queries
    end: Any
    shift: Any  # query i sees key c of the item when i - c >= shift


@gluon.jit
def _item(at):
    return Item(
        key=gl.load(at), keys=gl.load(at + 1), query=gl.load(at + 2), padded=gl.load(at + 3),
        first=gl.load(at + 4), end=gl.load(at + 5), shift=gl.load(at + 6),
    )  # fmt: skip


@gluon.jit
def _loader(shared, counter, group, strides, STAGES: gl.constexpr):
    desc, bars, bufs, work, padded_total = shared
    q_head, do_head, k_head, v_head = strides
    count = 0
    number = 0
    index = gl.program_id(0)
    while index < work.num_items:
        at, head = locate(work, index)
        item = _item(at)
        kv_head = head // group
        mbarrier.wait(bars.k_empty.index(0), (number & 1) ^ 1)
        mbarrier.expect(bars.k_full.index(0), 2 * desc.k.block_type.nbytes)
        for c in gl.static_range(2):
            tma.async_copy_global_to_shared(
                desc.k, [item.key + c * KEYS, kv_head * k_head], bars.k_full.index(0), bufs.k.index(c)
            )
        for i in range(item.first, item.end):
            slot = count % STAGES
            empty = ((count // STAGES) & 1) ^ 1
            row = item.query + i * ROWS
            padded_row = head * padded_total + item.padded + i * ROWS
            mbarrier.wait(bars.q_empty.index(slot), empty)
            mbarrier.expect(bars.q_full.index(slot), desc.q.block_type.nbytes + ROWS * 4)
            tma.async_copy_global_to_shared(desc.q, [row, head * q_head], bars.q_full.index(slot), bufs.q.index(slot))
            tma.async_copy_global_to_shared(desc.lse, [padded_row], bars.q_full.index(slot), bufs.lse.index(slot))
            if i == item.first:
                mbarrier.wait(bars.v_empty.index(0), (number & 1) ^ 1)
                mbarrier.expect(bars.v_full.index(0), 2 * desc.v.block_type.nbytes)
                for c in gl.static_range(2):
                    tma.async_copy_global_to_shared(
                        desc.v, [item.key + c * KEYS, kv_head * v_head], bars.v_full.index(0), bufs.v.index(c)
                    )
            mbarrier.wait(bars.do_empty.index(slot), empty)
            mbarrier.expect(bars.do_full.index(slot), desc.do.block_type.nbytes + ROWS * 4)
            tma.async_copy_global_to_shared(
                desc.do, [row, head * do_head], bars.do_full.index(slot), bufs.do.index(slot)
            )
            tma.async_copy_global_to_shared(desc.delta, [padded_row], bars.do_full.index(slot), bufs.delta.index(slot))
            count += 1
        index = take(work, counter, number)
        number += 1


@gluon.jit
def _dq_product(count, bars, bufs, CONSUMER: gl.constexpr, HALF: gl.constexpr, H: gl.constexpr):
    """Issues this consumer's half of the columns of dQ of the count-th tile."""
    buffer = count % 2
    mbarrier.wait(bars.ds_full.index(buffer), (count // 2) & 1)
    zero = gl.zeros([ROWS, HALF], gl.float32, layout=H)
    k0 = bufs.k.index(0).slice(CONSUMER * HALF, HALF, dim=1)
    k1 = bufs.k.index(1).slice(CONSUMER * HALF, HALF, dim=1)
    dq = warpgroup_mma(bufs.ds.index(buffer * 2).permute((1, 0)), k0, zero, use_acc=False, is_async=True)
    return warpgroup_mma(bufs.ds.index(buffer * 2 + 1).permute((1, 0)), k1, dq, is_async=True)


@gluon.jit
def _dq_add(dq, at, count, bars, CONSUMER: gl.constexpr, HALF: gl.constexpr, DETERMINISTIC: gl.constexpr):
    """Adds this consumer's half of dQ of the count-th tile to the tile in global memory that begins at `at`."""
    mbarrier.arrive(bars.ds_empty.index(count % 2), count=1)
    at = at + CONSUMER * ROWS * HALF + held_range(ROWS * HALF)
    if DETERMINISTIC:
        mbarrier.wait(bars.granted.index(0), count & 1)
    gl.atomic_add(at, as_held(dq), sem="relaxed")  # in the order of registers, which hopper.py undoes
    if DETERMINISTIC:
        thread_barrier()
        mbarrier.arrive(bars.added.index(0), count=1)


@gluon.jit
def _tile(
    i, count, dk, dv, dq_at, bars, bufs, item, scale_log2,
    CONSUMER: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr, CAUSAL: gl.constexpr,
    DETERMINISTIC: gl.constexpr, MASKED: gl.constexpr, FIRST: gl.constexpr,
    S: gl.constexpr, A: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """Query tile i, the count-th of this program; FIRST of an item: no dQ is pending."""
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    slot = count % STAGES
    phase = (count // STAGES) & 1
    zero = gl.zeros([KEYS, ROWS], gl.float32, layout=S)
    q = bufs.q.index(slot)
    do = bufs.do.index(slot)
    mbarrier.wait(bars.q_full.index(slot), phase)
    s = warpgroup_mma(bufs.k.index(CONSUMER), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(bars.do_full.index(slot), phase)
    dp = warpgroup_mma(bufs.v.index(CONSUMER), do.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    lse = bufs.lse.index(slot).load(gl.SliceLayout(0, S))  # not earlier: registers are short while S and dP are made
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
    if MASKED:
        c = CONSUMER * KEYS + gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, S)), 1)
        if CAUSAL:
            r = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, S)), 0)
            p = gl.where(r >= not_earlier(c + item.shift - i * ROWS), p, 0.0)
        else:
            p = gl.where(c < item.keys, p, 0.0)
    dv = warpgroup_mma(gl.convert_layout(p.to(bufs.do.dtype), P), do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = bufs.delta.index(slot).load(gl.SliceLayout(0, S))
    ds = (p * (dp - gl.expand_dims(delta, 0))).to(bufs.q.dtype)
    if not FIRST:
        dq = _dq_product(count - 1, bars, bufs, CONSUMER, HALF, H)
    dk = warpgroup_mma(gl.convert_layout(ds, P), q, dk, is_async=True)
    mbarrier.wait(bars.ds_empty.index(count % 2), ((count // 2) & 1) ^ 1)
    bufs.ds.index(count % 2 * 2 + CONSUMER).store(ds)
    fence_async_shared()
    # Also: every thread has read lse and delta, so the arrivals below free their slots too.
    thread_barrier()
    mbarrier.arrive(bars.ds_full.index(count % 2), count=1)
    if FIRST:
        dv = warpgroup_mma_wait(1, deps=[dv])
    else:
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
    mbarrier.arrive(bars.do_empty.index(slot), count=1)
    if not FIRST:
        _dq_add(dq, dq_at + (i - 1) * (ROWS * HALF * 2), count - 1, bars, CONSUMER, HALF, DETERMINISTIC)
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(bars.q_empty.index(slot), count=1)
    return dk, dv


@gluon.jit
def _consumer(
    shared, outputs, strides, scale, scale_log2,
    CONSUMER: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, D: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    _desc, bars, bufs, work, padded_total = shared
    dk_out, dv_out, dq_sum = outputs
    dk_row, dk_head, dv_row, dv_head = strides
    HALF: gl.constexpr = D // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    H: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    count = 0
    number = 0
    index = gl.program_id(0)
    while index < work.num_items:
        at, head = locate(work, index)
        item = _item(at)
        unmasked = item.first  # the first tile that needs no mask
        if CAUSAL:
            unmasked = gl.minimum((item.shift + CONSUMER * KEYS + KEYS + ROWS - 2) // ROWS, item.end)
        elif item.keys < 2 * KEYS:
            unmasked = item.end
        dq_at = dq_sum + (head * padded_total + item.padded).to(gl.int64) * D
        dk = gl.zeros([KEYS, D], gl.float32, layout=A)
        dv = gl.zeros([KEYS, D], gl.float32, layout=A)
        mbarrier.wait(bars.k_full.index(0), number & 1)
        mbarrier.wait(bars.v_full.index(0), number & 1)
        dk, dv = _tile(
            item.first, count, dk, dv, dq_at, bars, bufs, item, scale_log2,
            CONSUMER, STAGES, HALF, CAUSAL, DETERMINISTIC, True, True, S, A, H,
        )  # fmt: skip
        middle = gl.maximum(unmasked, item.first + 1)
        for i in range(item.first + 1, middle):
            dk, dv = _tile(
                i, count + i - item.first, dk, dv, dq_at, bars, bufs, item, scale_log2,
                CONSUMER, STAGES, HALF, CAUSAL, DETERMINISTIC, True, False, S, A, H,
            )  # fmt: skip
        for i in range(middle, item.end):
            dk, dv = _tile(
                i, count + i - item.first, dk, dv, dq_at, bars, bufs, item, scale_log2,
                CONSUMER, STAGES, HALF, CAUSAL, DETERMINISTIC, False, False, S, A, H,
            )  # fmt: skip
        count += item.end - item.first
        dq = _dq_product(count - 1, bars, bufs, CONSUMER, HALF, H)
        mbarrier.arrive(bars.v_empty.index(0), count=1)
        # Read again: kept over the loops these numbers would cost it registers.
        at, head = locate(work, index)
        item = _item(at)
        c = gl.expand_dims(CONSUMER * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, A)), 1)
        d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, A)), 0)
        row = item.key.to(gl.int64) + c
        dk_at = dk_out + head.to(gl.int64) * dk_head + row * dk_row + d
        dv_at = dv_out + head.to(gl.int64) * dv_head + row * dv_row + d
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(bars.k_empty.index(0), count=1)
        dq_at = dq_sum + (head * padded_total + item.padded + (item.end - 1) * ROWS).to(gl.int64) * D
        _dq_add(dq, dq_at, count - 1, bars, CONSUMER, HALF, DETERMINISTIC)
        gl.store(dv_at, dv.to(dv_out.dtype.element_ty), mask=c < item.keys)
        gl.store(dk_at, (dk * scale).to(dk_out.dtype.element_ty), mask=c < item.keys)
        index = told(work, number)
        number += 1


@gluon.jit
def _gate(shared, turns, CAUSAL: gl.constexpr, DETERMINISTIC: gl.constexpr):
    _desc, bars, _bufs, work, padded_total = shared
    count = 0
    number = 0
    index = gl.program_id(0)
    if not DETERMINISTIC:
        index = work.num_items
    while index < work.num_items:
        at, head = locate(work, index)
        item = _item(at)
        turns_at = turns + (head * padded_total + item.padded) // ROWS
        later = (item.keys - 1) // (2 * KEYS)  # tiles of keys
        for i in range(item.first, item.end):
            before = later
            if CAUSAL:  # of these tiles, those that this tile of queries sees
                before = gl.minimum(later, (i * ROWS + ROWS - 1 - item.shift) // (2 * KEYS))
            while gl.atomic_add(turns_at + i, 0, sem="acquire") < before:
                pass
            mbarrier.arrive(bars.granted.index(0), count=1)
            mbarrier.wait(bars.added.index(0), count & 1)
            gl.atomic_add(turns_at + i, 1, sem="release")
            count += 1
        index = told(work, number)
        number += 1


@gluon.jit(do_not_specialize=["num_tiles", "heads", "block", "group", "padded_total"])
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dk_out, dv_out, dq_sum, turns, items, num_tiles,
    heads, block, group, padded_total, scale, scale_log2, q_head, do_head, k_head, v_head,
    dk_row, dk_head, dv_row, dv_head,
    D: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, DETERMINISTIC: gl.constexpr,
):  # fmt: skip
    """dk_out, dv_out: of every query head; items: `schedule.py`. dq_sum (heads * padded_total / ROWS, ROWS * D) fp32 is
    added to, the numbers of each tile of queries in `as_held`'s order; turns (heads * padded_total / ROWS): zeros."""
    k_s = gl.allocate_shared_memory(q_desc.dtype, [2, KEYS, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [2, KEYS, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, ROWS, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, ROWS, D], do_desc.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], q_desc.dtype)
    ds_s = gl.allocate_shared_memory(q_desc.dtype, [4, KEYS, ROWS], DS)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], lse_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], delta_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    granted = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full.index(0), count=1)
    mbarrier.init(v_full.index(0), count=1)
    mbarrier.init(k_empty.index(0), count=2)
    mbarrier.init(v_empty.index(0), count=2)
    mbarrier.init(granted.index(0), count=1)
    mbarrier.init(added.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
    desc = Descriptors(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc)
    bars = Barriers(
        k_full, v_full, k_empty, v_empty, q_full, q_empty, do_full, do_empty, ds_full, ds_empty, granted, added
    )  # fmt: skip
    bufs = Buffers(k_s, v_s, q_s, do_s, ds_s, lse_s, delta_s)
    ring = make_ring(3 if DETERMINISTIC else 2)
    fence_async_shared()
    gdc_wait()  # for the list, and what was made before it
    tiles = gl.load(items + num_tiles * COLUMNS)
    work = Work(ring, items, tiles, tiles * heads, block)
    shared = (desc, bars, bufs, work, padded_total)
    counter = items + num_tiles * COLUMNS + 1
    outputs = (dk_out, dv_out, dq_sum)
    strides = (dk_row, dk_head, dv_row, dv_head)
    gl.warp_specialize(
        [
            (_consumer, (shared, outputs, strides, scale, scale_log2, 0, STAGES, CAUSAL, D, DETERMINISTIC)),
            (_consumer, (shared, outputs, strides, scale, scale_log2, 1, STAGES, CAUSAL, D, DETERMINISTIC)),
            (_loader, (shared, counter, group, (q_head, do_head, k_head, v_head), STAGES)),
            (_gate, (shared, turns, CAUSAL, DETERMINISTIC)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
