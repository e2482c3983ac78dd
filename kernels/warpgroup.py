"""What the Gluon kernels for Hopper share: beneath Gluon, and about the registers of a warpgroup (four warps)."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the older name is triton 3.6's

FLAT = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))  # four numbers a thread, side by side


@gluon.jit
def not_earlier(x):
    """x, which nothing that depends on it can be computed before: 64 comparisons that wait for scores do not fit the
    predicate registers, and packing them into others takes more instructions than they do."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def as_held(x):
    """x (64, n), a product of a warpgroup, as (64 n,) in an order in which each thread's numbers, which stay where they
    are, lie side by side in fours: 16 bytes to store or add at a time. `as_rows` undoes it."""
    n: gl.constexpr = x.shape[1]
    x = x.reshape([4, 2, 8, n // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5])
    return gl.convert_layout(x.reshape([64 * n]), FLAT)


@gluon.jit
def held_range(SIZE: gl.constexpr):
    """0 ... SIZE - 1, of which each thread has those of the numbers that `as_held` leaves it."""
    return gl.arange(0, SIZE, layout=FLAT)


@triton.jit
def as_rows(x, COLUMNS: tl.constexpr):
    """(64 * COLUMNS,) as `as_held` leaves it, also of several products side by side, as (64, COLUMNS) in `tl`."""
    x = tl.reshape(x, (COLUMNS // 8, 4, 8, 4, 2, 2))
    return tl.reshape(tl.permute(x, (1, 4, 2, 0, 3, 5)), (64, COLUMNS))
