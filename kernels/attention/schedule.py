"""Lists of work for the persistent Hopper kernels: which tiles there are, heaviest first.

The lengths of packed documents are on the device, so the list is made there, by one small launch before the kernel.
Document d, from row a to row b, has the tile numbers from a // BLOCK + d on (`portable.py` explains); a tile's weight
is the number of tiles of the other side that it walks over, and its place in the list the number of heavier tiles.
Heaviest first is what lets the last round end evenly: whatever is left then is small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ..dispatch import Launcher, early_launch
from .portable import find_document

# Of an item: its first row, and how many rows its document has from there on; then
#   a tile of queries: first key of the document, keys that the first row sees (if causal), keys of the document;
#   a tile of keys: first query of the document, the same padded, first and end tile of queries, shift: query i sees
#   the item's key c when i - c >= shift (if causal).
COLUMNS = tl.constexpr(8)


@triton.jit
def _weigh(
    cu_own, cu_other, documents, tile, tiles,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Of tile numbers: document, its start, first row, rows from there on, start and length on the other side,
    first and end tile there, weight (0: no such tile)."""
    document = find_document(cu_own, documents, tile, OWN)
    start = tl.load(cu_own + document)
    length = tl.load(cu_own + document + 1) - start
    other_start = tl.load(cu_other + document)
    other = tl.load(cu_other + document + 1) - other_start
    first = (tile - (start // OWN + document)) * OWN
    begin = tile * 0
    if BACKWARD:  # queries from the first that sees a key of the tile on
        if CAUSAL:
            begin = tl.minimum(tl.maximum(first - (length - other), 0), other) // OTHER
        end = (other + OTHER - 1) // OTHER
    else:  # keys up to the last that a query of the tile sees
        visible = other
        if CAUSAL:
            visible = tl.maximum(tl.minimum(other, first + OWN + other - length), 0)
        end = (visible + OTHER - 1) // OTHER
    end = tl.maximum(end, begin + 1)  # one tile, masked, where there is nothing: its results are zeros
    weight = tl.where((tile < tiles) & (first < length), end - begin, 0)
    return document, start, first, length - first, other_start, other, begin, end, weight


@triton.jit(do_not_specialize=["documents", "tiles"], do_not_specialize_on_alignment=["cu_own", "cu_other"])
def _schedule_kernel(
    items, cu_own, cu_other, documents, tiles,
    OWN: tl.constexpr, OTHER: tl.constexpr, CAUSAL: tl.constexpr, BACKWARD: tl.constexpr, LIGHTEST: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()  # whoever works on the list begins, and waits for its end
    tile = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    document, start, first, rows, other_start, other, begin, end, weight = _weigh(
        cu_own, cu_other, documents, tile, tiles, OWN, OTHER, CAUSAL, BACKWARD
    )
    place = tl.zeros((SIZE,), tl.int32)
    existing = 0
    for chunk in range(0, tiles, SIZE):
        rival = chunk + tl.arange(0, SIZE)
        _, _, _, _, _, _, _, _, heavy = _weigh(cu_own, cu_other, documents, rival, tiles, OWN, OTHER, CAUSAL, BACKWARD)
        existing += tl.sum((heavy > 0).to(tl.int32), 0)
        before = (heavy[None, :] == weight[:, None]) & (rival[None, :] < tile[:, None])
        place += tl.sum((before | (heavy[None, :] > weight[:, None])).to(tl.int32), 1)
    if LIGHTEST:
        place = existing - 1 - place
    at = items + place * WIDTH
    mask = weight > 0
    tl.store(at, start + first, mask=mask)
    tl.store(at + 1, rows, mask=mask)
    tl.store(at + 2, other_start, mask=mask)
    if BACKWARD:
        tl.store(at + 3, (other_start // OTHER + document) * OTHER, mask=mask)
        tl.store(at + 4, begin, mask=mask)
        tl.store(at + 5, end, mask=mask)
        tl.store(at + 6, first - (rows + first - other), mask=mask)
    else:
        tl.store(at + 3, first + other - (rows + first) + 1, mask=mask)
        tl.store(at + 4, other, mask=mask)
    tl.store(items + tiles * WIDTH, existing, mask=tl.program_id(0) == 0)
    tl.store(items + tiles * WIDTH + 1, 0, mask=tl.program_id(0) == 0)


_launch = Launcher(_schedule_kernel, num_warps=4)


def schedule(
    cu_own: Tensor, cu_other: Tensor, total: int, own: int, other: int, causal: bool, backward: bool, lightest: bool
) -> tuple[Tensor, int]:
    """Tiles of `own` rows that walk over tiles of `other` rows, heaviest first, and an upper bound of how many.

    cu_own, cu_other: int32 (documents + 1,); total: rows on the own side; lightest: exactly the other way round, so
    that of two tiles of a document the later one comes first. Returns (bound + 1, COLUMNS) int32, whose
    last row holds how many there are and a counter at 0 (`persistent.py`), and bound.
    """
    documents = cu_own.shape[0] - 1
    tiles = total // own + documents
    items = torch.empty((tiles + 1, COLUMNS.value), dtype=torch.int32, device=cu_own.device)
    _launch(
        ((tiles + 127) // 128, 1, 1), (cu_own.device,), items, cu_own, cu_other, documents, tiles,
        OWN=own, OTHER=other, CAUSAL=causal, BACKWARD=backward, LIGHTEST=lightest, WIDTH=COLUMNS.value, SIZE=128,
        EARLY=early_launch(items.device),
    )  # fmt: skip
    return items, tiles
