"""A weight's gradient that grows by chunks of tokens: sum += d^T x, in fp32, for Hopper, in Gluon.

Between two chunks the sum lies in memory. cuBLAS reads and writes a tile of it while nothing is multiplied, which with
2,048 tokens costs a fifth of the product. Here a tile is added to memory from the registers that hold it, by
instructions that wait for nothing (RED). So the sum lies in the order of those registers (`warpgroup.as_held`) until it
is rounded. Warps as in attention: a *loader* copies tiles of d and x into a ring of buffers, two *consumers* multiply
64 rows each.

Tiles are 128 x 256 and rarely a multiple of the programs, one a multiprocessor. What a last round would leave over is
shared out by steps of STEP tokens, evenly, and comes first. A shared tile is added up by its programs one after the
other, its last tokens first: the same bits each time, on GPUs with as many multiprocessors. Each waits for the next in
`index`, which counts the programs backwards, so whoever is waited for was launched before.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .dispatch import multiprocessors
from .warpgroup import as_held, as_rows, held_range, thread_barrier

ROWS = gl.constexpr(64)  # of a consumer, two of which make a tile
COLUMNS = gl.constexpr(256)
STEP = gl.constexpr(64)  # tokens
LEAST = gl.constexpr(4)  # steps of a share: fewer are not worth another addition
STAGES = gl.constexpr(4)


class Piece(NamedTuple):
    """What a program does next: steps [first, first + count) of a tile."""

    tile: Any
    first: Any
    count: Any
    waits: Any  # for the program of the next index, which has what follows of the tile
    tells: Any  # the program of the index before, which has what comes first


class Work(NamedTuple):
    """In steps of tokens: the first `shared` are of tiles that are shared out, and [begin, end) of them this program's;
    after them each program takes whole tiles in turn."""

    index: Any
    begin: Any
    end: Any
    shared: Any
    total: Any
    steps: Any  # of a tile
    across: Any  # tiles side by side


@gluon.jit
def _work(tiles, across, steps):
    programs = gl.num_programs(0)
    index = programs - 1 - gl.program_id(0)
    shared = tiles % programs * steps
    sharers = gl.minimum(programs, (shared + LEAST - 1) // LEAST)
    begin = shared + index * steps
    end = begin
    if index < sharers:
        begin = index * (shared // sharers) + gl.minimum(index, shared % sharers)
        end = begin + shared // sharers
        if index < shared % sharers:
            end += 1
    return Work(index, begin, end, shared, tiles * steps, steps, across)


@gluon.jit
def _piece(work, at):
    """The piece that begins at step `at`."""
    first = at % work.steps
    count = work.steps - first
    if at < work.shared:
        count = gl.minimum(count, work.end - at)
    return Piece(at // work.steps, first, count, first + count < work.steps, first > 0)


@gluon.jit
def _after(work, at, count):
    """The step to go on with."""
    after = at + count
    if at >= work.shared:
        after += (gl.num_programs(0) - 1) * work.steps
    elif after == work.end:
        after = work.shared + work.index * work.steps
    return after


@gluon.jit
def _loader(descriptors, bars, bufs, work):
    d_desc, x_desc = descriptors
    full, empty = bars
    d_s, x_s = bufs
    n = 0
    at = work.begin
    while at < work.total:
        piece = _piece(work, at)
        row = piece.tile // work.across * (2 * ROWS)
        column = piece.tile % work.across * COLUMNS
        for i in range(piece.first, piece.first + piece.count):
            slot = n % STAGES
            mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), d_desc.block_type.nbytes + x_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(d_desc, [i * STEP, row], full.index(slot), d_s.index(slot))
            tma.async_copy_global_to_shared(x_desc, [i * STEP, column], full.index(slot), x_s.index(slot))
            n += 1
        at = _after(work, at, piece.count)


@gluon.jit
def _consumer(total, done, turn, bars, bufs, work, CONSUMER: gl.constexpr, FIRST: gl.constexpr):
    full, empty = bars
    d_s, x_s = bufs
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    SIZE: gl.constexpr = ROWS * COLUMNS
    n = 0
    at = work.begin
    while at < work.total:
        piece = _piece(work, at)
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout=A)
        for i in range(piece.count):
            slot = n % STAGES
            mbarrier.wait(full.index(slot), (n // STAGES) & 1)
            d = d_s.index(slot).slice(CONSUMER * ROWS, ROWS, dim=1).permute((1, 0))
            acc = warpgroup_mma(d, x_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the one before
            mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), count=1, pred=i > 0)
            n += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), count=1)
        place = total + (piece.tile * 2 + CONSUMER).to(gl.int64) * SIZE + held_range(SIZE)
        if piece.waits:
            while gl.atomic_add(done + (work.index + 1) * 2 + CONSUMER, 0, sem="acquire") < turn:
                pass
        if FIRST and not piece.waits:
            gl.store(place, as_held(acc))
        else:
            gl.atomic_add(place, as_held(acc), sem="relaxed")
        if piece.tells:
            thread_barrier()
            gl.atomic_xchg(done + work.index * 2 + CONSUMER, turn, sem="release")
        at = _after(work, at, piece.count)


@gluon.jit(do_not_specialize=["turn", "tiles", "across", "steps"])
def add_product_kernel(d_desc, x_desc, total, done, turn, tiles, across, steps, FIRST: gl.constexpr):
    """FIRST: total holds nothing yet. done (programs * 2,): below turn."""
    d_s = gl.allocate_shared_memory(d_desc.dtype, [STAGES, STEP, 2 * ROWS], d_desc.layout)
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES, STEP, COLUMNS], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    work = _work(tiles, across, steps)
    bars = (full, empty)
    bufs = (d_s, x_s)
    gl.warp_specialize(
        [
            (_consumer, (total, done, turn, bars, bufs, work, 0, FIRST)),
            (_consumer, (total, done, turn, bars, bufs, work, 1, FIRST)),
            (_loader, ((d_desc, x_desc), bars, bufs, work)),
        ],
        [4, 1],
        [240, 24],
    )


@triton.jit
def _round_kernel(total, out, rows, columns, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    half = tl.program_id(0)  # of a tile
    x = as_rows(tl.load(total + half.to(tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)), COLUMNS)
    row = (half // 2 // across * (2 * ROWS) + half % 2 * ROWS + tl.arange(0, ROWS))[:, None]
    column = half // 2 % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = out + row.to(tl.int64) * columns + column
    tl.store(at, x.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))


def _describable(x: Tensor) -> bool:
    rows = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    return x.dtype == torch.bfloat16 and rows and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, columns: int) -> TensorDescriptor:
    block = [STEP.value, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def fits(d: Tensor, x: Tensor) -> bool:
    """Whether `Sum.add` takes these."""
    return _describable(d) and _describable(x)


class Sum:
    """The sum over chunks of d^T x, (rows, columns)."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.shape = rows, columns
        self.across = -(-columns // COLUMNS.value)
        self.tiles = -(-rows // (2 * ROWS.value)) * self.across
        size = self.tiles * 2 * ROWS.value * COLUMNS.value
        self.total = torch.empty(size, dtype=torch.float32, device=device)
        self.done = torch.zeros(2 * multiprocessors(device), dtype=torch.int32, device=device)
        self.turn = 0

    def add(self, d: Tensor, x: Tensor) -> None:
        """d (tokens, rows), x (tokens, columns), at least one token."""
        self.turn += 1
        steps = -(-len(x) // STEP.value)
        programs = min(multiprocessors(x.device), self.tiles * steps)
        add_product_kernel[(programs,)](
            _descriptor(d, 2 * ROWS.value), _descriptor(x, COLUMNS.value), self.total, self.done, self.turn,
            self.tiles, self.across, steps, FIRST=self.turn == 1, num_warps=4, maxnreg=168,
        )  # fmt: skip

    def write(self, out: Tensor) -> None:
        """Rounds the sum into out (rows, columns), contiguous."""
        _round_kernel[(2 * self.tiles,)](
            self.total, out, *self.shape, self.across, ROWS=ROWS.value, COLUMNS=COLUMNS.value, num_warps=8
        )
