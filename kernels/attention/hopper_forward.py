"""Attention forward for Hopper (sm_90) in Gluon: the tensor cores never wait for memory, a quarter of the time for a
softmax.

Three kinds of warps share a program. One *producer* warp only issues TMA copies: Q tiles, and K and V tiles into rings
of STAGES buffers. Two *consumers*, warpgroups of 64 query rows each, own the arithmetic. Two overlaps keep the tensor
cores busy (FlashAttention-3, arXiv 2407.08608):

- inside a consumer, the scores of tile i are issued before the product of tile i - 1 with V, which then runs during the
  softmax of tile i (the assembler must be kept from waiting for it before the softmax: `_before_waiting`);
- between the consumers, one computes its softmax while the other has the tensor cores. A softmax is longer than the
  other's two products, so they fall into alternation by themselves; taking turns by a token cost 1 %.

Programs are persistent, one per multiprocessor, and walk a list of work items (`schedule.py`), heaviest first: the
producer fetches the next item's tiles while the consumers still finish this one. Keys are walked backwards from the
diagonal, so that the masked tiles come first and the loop over the others carries no mask.

Barriers are counted over the whole life of a program: use n of a ring has slot n % STAGES and phase (n // STAGES) & 1.
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

from ..warpgroup import not_earlier, thread_barrier
from .persistent import Work, locate, make_ring, take, told
from .schedule import COLUMNS

LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # query rows of a consumer
CONSUMERS = gl.constexpr(2)
KEYS = 128  # of a tile
# The layout of a consumer's scores as (ROWS, KEYS / 8, 4, 2): column 8a + 2b + c is (a, b, c), and b is the thread.
PARTS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [8, 0, 0, 0]] + [[0, 2**i, 0, 0] for i in range(4)],
        lane_bases=[[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[64, KEYS // 8, 4, 2],
    )
)


class Descriptors(NamedTuple):
    q: Any
    k: Any
    v: Any
    o: Any


class Barriers(NamedTuple):
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


class Buffers(NamedTuple):
    """Shared memory: q (2 * CONSUMERS, ROWS, D), of this item and the next, for whose keys the producer would wait
    otherwise until this one's queries are done with; o (CONSUMERS, ROWS, D); k, v (STAGES, BLOCK_N, D)."""

    q: Any
    k: Any
    v: Any
    o: Any


class Strides(NamedTuple):
    """Columns between heads in the descriptors' two dimensions."""

    q: Any
    k: Any
    v: Any
    o: Any


@gluon.jit
def _key_tiles(seen, n_k, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """How many tiles of keys an item walks over: those that its last row sees, at least one."""
    visible = n_k
    if CAUSAL:
        visible = gl.minimum(n_k, seen + (CONSUMERS * ROWS - 1))
    return gl.maximum((visible + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _producer(
    shared, counter, group,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    desc, bars, bufs, work, strides = shared
    count = 0
    number = 0
    item = gl.program_id(0)
    while item < work.num_items:
        at, head = locate(work, item)
        row = gl.load(at)
        key = gl.load(at + 2)
        tiles = _key_tiles(gl.load(at + 3), gl.load(at + 4), BLOCK_N, CAUSAL)
        k_column = head // group * strides.k
        v_column = head // group * strides.v
        for i in range(tiles):
            slot = count % STAGES
            empty = ((count // STAGES) & 1) ^ 1
            position = key + (tiles - 1 - i) * BLOCK_N
            if i == 0:
                for c in gl.static_range(2):
                    q_slot = number % 2 * CONSUMERS + c
                    mbarrier.wait(bars.q_empty.index(q_slot), ((number // 2) & 1) ^ 1)
                    mbarrier.expect(bars.q_full.index(q_slot), desc.q.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        desc.q, [row + c * ROWS, head * strides.q], bars.q_full.index(q_slot), bufs.q.index(q_slot)
                    )
            mbarrier.wait(bars.k_empty.index(slot), empty)
            mbarrier.expect(bars.k_full.index(slot), desc.k.block_type.nbytes)
            tma.async_copy_global_to_shared(desc.k, [position, k_column], bars.k_full.index(slot), bufs.k.index(slot))
            mbarrier.wait(bars.v_empty.index(slot), empty)
            mbarrier.expect(bars.v_full.index(slot), desc.v.block_type.nbytes)
            tma.async_copy_global_to_shared(desc.v, [position, v_column], bars.v_full.index(slot), bufs.v.index(slot))
            count += 1
        item = take(work, counter, number)
        number += 1


@gluon.jit
def _scores(q, bars, bufs, count, S: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Issues Q K^T of the count-th tile."""
    slot = count % STAGES
    mbarrier.wait(bars.k_full.index(slot), (count // STAGES) & 1)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
    return warpgroup_mma(q, bufs.k.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _softmax(s, m, scale_log2, MASKED: gl.constexpr):
    """(exponentials, factor by which earlier ones shrink, new maxima); scale_log2 turns scores into exponents of 2."""
    new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    safe = new
    if MASKED:
        safe = gl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing: -inf - -inf is NaN
    p = gl.exp2(s * scale_log2 - gl.expand_dims(safe, 1))
    return p, gl.exp2(m - safe), new


@gluon.jit
def _before_waiting(x):
    """x, nonnegative: made before any wait that stands behind. The assembler would move such a wait up, since nothing
    that it waits for is needed for x; but it moves no wait over an instruction that sleeps, even never."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; setp.lt.f32 never, $1, 0f00000000; @never nanosleep.u32 1; mov.b32 $0, $1; }",
        "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _row_sums(p):
    """Sums over the columns that a thread holds of each row: (ROWS, 4), for the four threads of a row."""
    return gl.sum(gl.sum(gl.convert_layout(p.reshape([ROWS, p.shape[1] // 8, 4, 2]), PARTS), 3), 1)


@gluon.jit
def _masked(s, first, seen, n_k, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, S: gl.constexpr):
    """Scores of keys first ... with those that a row does not see at -inf; row 0 sees `seen` keys if CAUSAL."""
    limit = gl.full([ROWS], 0, gl.int32, layout=gl.SliceLayout(1, S)) + n_k
    if CAUSAL:
        limit = gl.minimum(limit, seen + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)))
    limit = not_earlier(limit - first)
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    return gl.where(gl.expand_dims(column, 0) < gl.expand_dims(limit, 1), s, -float("inf"))


@gluon.jit
def _fold(
    q, acc, mass, m, p, count, bars, bufs, first, seen, n_k, scale_log2,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, MASKED: gl.constexpr,
    S: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Issues the scores of tile `count`, folds the exponentials p of the tile before into acc, makes new ones."""
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    slot = count % STAGES
    before = (count - 1) % STAGES
    s = _scores(q, bars, bufs, count, S, BLOCK_N, STAGES)
    p16 = gl.convert_layout(p.to(bufs.v.dtype), P)
    mbarrier.wait(bars.v_full.index(before), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(p16, bufs.v.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(bars.k_empty.index(slot), count=1)
    if MASKED:
        s = _masked(s, first, seen, n_k, BLOCK_N, CAUSAL, S)
    p, shrink, m = _softmax(s, m, scale_log2, MASKED)
    MASS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, PARTS)))
    mass = mass * gl.expand_dims(gl.convert_layout(shrink, MASS), 1) + _row_sums(p)
    mass = _before_waiting(mass)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(bars.v_empty.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    return acc, mass, m, p


@gluon.jit
def _consumer(
    shared, outputs, scale_log2,
    CONSUMER: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    desc, bars, bufs, work, strides = shared
    out, lse, out_row, total = outputs
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    count = 0
    number = 0
    item = gl.program_id(0)
    while item < work.num_items:
        at, head = locate(work, item)
        row = gl.load(at) + CONSUMER * ROWS
        rows = gl.load(at + 1) - CONSUMER * ROWS
        seen = gl.load(at + 3)
        n_k = gl.load(at + 4)
        tiles = _key_tiles(seen, n_k, BLOCK_N, CAUSAL)
        seen += CONSUMER * ROWS
        everyone = n_k  # keys that every row of this consumer sees
        if CAUSAL:
            everyone = gl.maximum(gl.minimum(n_k, seen), 0)
        unmasked = gl.minimum(everyone // BLOCK_N, tiles - 1)  # tiles; they come last

        m = gl.full([ROWS], -float("inf"), gl.float32, layout=gl.SliceLayout(1, S))
        acc = gl.zeros([ROWS, D], gl.float32, layout=OUT)
        q_slot = number % 2 * CONSUMERS + CONSUMER
        q = bufs.q.index(q_slot)
        mbarrier.wait(bars.q_full.index(q_slot), (number // 2) & 1)
        s = _scores(q, bars, bufs, count, S, BLOCK_N, STAGES)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(bars.k_empty.index(count % STAGES), count=1)
        s = _masked(s, (tiles - 1) * BLOCK_N, seen, n_k, BLOCK_N, CAUSAL, S)
        p, _, m = _softmax(s, m, scale_log2, True)
        mass = _row_sums(p)
        if CAUSAL:  # else the first tile is the only one that may need a mask
            for i in range(1, tiles - unmasked):
                acc, mass, m, p = _fold(
                    q, acc, mass, m, p, count + i, bars, bufs, (tiles - 1 - i) * BLOCK_N, seen, n_k, scale_log2,
                    BLOCK_N, STAGES, CAUSAL, True, S, OUT,
                )  # fmt: skip
        for i in range(tiles - unmasked, tiles):
            acc, mass, m, p = _fold(
                q, acc, mass, m, p, count + i, bars, bufs, 0, seen, n_k, scale_log2,
                BLOCK_N, STAGES, CAUSAL, False, S, OUT,
            )  # fmt: skip
        count += tiles
        mbarrier.arrive(bars.q_empty.index(q_slot), count=1)
        last = (count - 1) % STAGES
        p16 = gl.convert_layout(p.to(bufs.v.dtype), P)
        mbarrier.wait(bars.v_full.index(last), ((count - 1) // STAGES) & 1)
        acc = warpgroup_mma(p16, bufs.v.index(last), acc, is_async=True)
        # Rows that see no key have mass 0 and m = -inf: they give zeros, and lse = -inf.
        index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        mass = gl.convert_layout(gl.sum(mass, 1), gl.SliceLayout(1, S))
        empty = mass == 0.0
        mass = gl.where(empty, 1.0, mass)
        gl.store(lse + head.to(gl.int64) * total + row + index, (m + gl.log2(mass)) * LN2, mask=index < rows)
        inverse = gl.convert_layout(gl.where(empty, 0.0, 1.0 / mass), gl.SliceLayout(1, OUT))
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(bars.v_empty.index(last), count=1)
        result = (acc * gl.expand_dims(inverse, 1)).to(bufs.q.dtype)
        if rows >= ROWS:
            tma.store_wait(0)
            thread_barrier()
            bufs.o.index(CONSUMER).store(result)
            fence_async_shared()
            thread_barrier()
            tma.async_copy_shared_to_global(desc.o, [row, head * strides.o], bufs.o.index(CONSUMER))
        elif rows > 0:
            r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
            d = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
            pointer = out + row.to(gl.int64) * out_row + head.to(gl.int64) * strides.o
            pointer = pointer + gl.expand_dims(r, 1) * out_row + gl.expand_dims(d, 0)
            gl.store(pointer, result, mask=gl.expand_dims(r, 1) < rows)
        item = told(work, number)
        number += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "total", "heads", "block", "group"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, out, lse, items, num_tiles, total, heads, block, group, scale_log2,
    q_head, k_head, v_head, o_head, out_row,
    D: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """items: `schedule.py`; *_head: columns between heads in the descriptors' two dimensions; lse (heads, total)."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2 * CONSUMERS, ROWS, D], q_desc.layout)
    o_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, ROWS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    desc = Descriptors(q_desc, k_desc, v_desc, o_desc)
    bars = Barriers(q_full, q_empty, k_full, k_empty, v_full, v_empty)
    bufs = Buffers(q_s, k_s, v_s, o_s)
    strides = Strides(q_head, k_head, v_head, o_head)
    ring = make_ring(CONSUMERS)
    fence_async_shared()
    gdc_wait()  # for the list, and what was made before it
    tiles = gl.load(items + num_tiles * COLUMNS)
    work = Work(ring, items, tiles, tiles * heads, block)
    shared = (desc, bars, bufs, work, strides)
    outputs = (out, lse, out_row, total)
    gl.warp_specialize(
        [
            (_consumer, (shared, outputs, scale_log2, 0, BLOCK_N, STAGES, CAUSAL, D)),
            (_consumer, (shared, outputs, scale_log2, 1, BLOCK_N, STAGES, CAUSAL, D)),
            (_producer, (shared, items + num_tiles * COLUMNS + 1, group, BLOCK_N, STAGES, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )
