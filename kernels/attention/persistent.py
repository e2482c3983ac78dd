"""How the programs of a persistent Hopper kernel share out the work items, in Gluon.

One program a multiprocessor. Each begins with the item of its own number; whoever is done takes the next one from a
counter in global memory. Only one warp of a program asks (`take`), ahead of time; the others are told through a ring of
two places in shared memory (`told`).

The order of items decides what the L2 cache holds. Programs that run at the same time should read the same keys (or
add to the same dQ), so the heads are taken in blocks whose data fit there together, and within a block the heaviest
tiles of all its heads come first.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..warpgroup import thread_barrier
from .schedule import COLUMNS


class Work(NamedTuple):
    """ring: `make_ring`; items (tiles + 1, COLUMNS): `schedule.py`; num_items = tiles * heads; block: of heads."""

    ring: Any
    items: Any
    tiles: Any
    num_items: Any
    block: Any


@gluon.jit
def make_ring(READERS: gl.constexpr):
    """(place, full, empty) for `take` and `told`; READERS: how many partitions are told."""
    place = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return place, full, empty


@gluon.jit
def take(work, counter, number):
    """The number-th item after the first, for the warp that asks; it also tells the others."""
    place, full, empty = work.ring
    slot = number % 2
    item = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
    mbarrier.wait(empty.index(slot), ((number // 2) & 1) ^ 1)
    place.index(slot).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + item)
    thread_barrier()
    mbarrier.arrive(full.index(slot), count=1)
    return item


@gluon.jit
def told(work, number):
    """The same for everybody else."""
    place, full, empty = work.ring
    slot = number % 2
    mbarrier.wait(full.index(slot), (number // 2) & 1)
    item = gl.max(place.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    thread_barrier()  # all have read before the place is free
    mbarrier.arrive(empty.index(slot), count=1)
    return item


@gluon.jit
def locate(work, item):
    """(the item's row in the list, its head): within a block of heads, the heaviest tiles of all of them first."""
    within = item % (work.tiles * work.block)
    head = item // (work.tiles * work.block) * work.block + within % work.block
    return work.items + within // work.block * COLUMNS, head
