"""Attention forward and backward in plain Triton: runs on every GPU that Triton knows, and in its interpreter.

Forward (Dao, arXiv 2307.08691): a program owns a tile of queries of one head and walks over the keys, keeping for each
row the running maximum m, the running sum mass and the unnormalised output; scores exist one tile at a time. If causal,
keys that every row of the tile sees need no mask, and the walk is two loops: whole tiles, then masked ones.

Backward: P is recomputed from lse. One kernel owns a tile of keys and walks over the queries of one head, for dK and
dV; another owns a tile of queries and walks over the keys, for dQ. Seven products, where five would do with atomic
additions into dQ, and in exchange nothing depends on the order in which programs run. Query heads that share a key head
leave their parts of dK and dV apart, in fp32, and these are added up afterwards: there would be too few programs else.

The grid for packed documents needs the lengths, which are on the device. Give document d, from row a to row b, the
tile numbers from a // BLOCK + d on, up to the next document's first: there are b // BLOCK - a // BLOCK + 1 of these,
always at least the ceil((b - a) / BLOCK) that it needs, and in all total // BLOCK + documents, which the host knows. A
program finds its document by bisection, and leaves when its tile lies behind the document's end.

Names: b_ offsets of a document's first row, n_ lengths; tiles are [BLOCK_M, D] of queries and [BLOCK_N, D] of keys.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Launcher, interpreting, shared_memory

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# At head_dim 128, fastest first: bytes of shared memory that are needed, BLOCK_M, BLOCK_N, num_stages.
WIDE_TILES = {
    "forward": ((229376, 128, 128, 3), (131072, 128, 64, 3), (98304, 128, 64, 2)),
    "dkdv": ((164864, 64, 128, 3), (98560, 32, 128, 2)),
    "dq": ((163840, 128, 64, 3), (98304, 128, 32, 2)),
}


def block_sizes(kernel: str, head_dim: int, dtype: torch.dtype, shared: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages for "forward", "dkdv" or "dq": what fits registers and shared memory."""
    if interpreting():
        m, n, warps, stages = 32, 16, 1, 1  # small, so that short sequences cross tiles
    elif dtype == torch.float32:  # no tensor cores: operands in registers
        m, n, warps, stages = 32, 32, 8, 1
    elif head_dim <= 64:
        m, n, warps, stages = {"forward": (128, 64, 4, 3), "dkdv": (64, 128, 8, 2), "dq": (128, 64, 8, 2)}[kernel]
    else:
        tiles = WIDE_TILES[kernel]
        _, m, n, stages = next((tile for tile in tiles if tile[0] <= shared), tiles[-1])
        warps = 8
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


@triton.jit
def find_document(cu_seqlens, documents, tile, BLOCK: tl.constexpr):
    """The last document whose first tile is not behind `tile`; a number, or a tensor of numbers."""
    low = tile * 0
    size = documents
    while size > 1:
        half = size // 2
        middle = low + half
        behind = tl.load(cu_seqlens + middle) // BLOCK + middle > tile
        low = tl.where(behind, low, middle)
        size -= half
    return low


@triton.jit
def _locate(tiles, heads, block):
    """This program's (tile, head): heads in blocks whose data fit into the L2 cache, and all of a block's first tiles
    first. If causal, the last programs are then light ones, and the GPU is busy to the end."""
    heads_before = tl.program_id(0) // (tiles * block) * block
    within = tl.program_id(0) % (tiles * block)
    return within // block, (heads_before + within % block).to(tl.int64)


@triton.jit
def _load(pointer, mask, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    if MASKED:
        x = tl.load(pointer, mask=mask, other=0.0)
    else:
        x = tl.load(pointer)
    if UPCAST:  # the interpreter's bf16 arithmetic is wrong
        x = x.to(tl.float32)
    return x


@triton.jit
def _walks(first_row, n_k, offset, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the walk over unmasked tiles of keys ends and the one over masked tiles begins, and where that ends."""
    if not CAUSAL:
        return tl.cast(0, tl.int32), n_k  # one loop: the assembler lets the products of two wait for each other
    everyone = tl.maximum(tl.minimum(n_k, first_row + offset + 1), 0)  # keys that every row sees
    return everyone // BLOCK_N * BLOCK_N, tl.maximum(tl.minimum(n_k, first_row + BLOCK_M + offset), 0)


@triton.jit
def _forward_walk(
    q, acc, mass, m, k_at, v_at, k_step, v_step, first, last, row, n_k, offset, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Folds keys first ... last into (acc, mass, m); scale_log2 turns scores into exponents of 2."""
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        shift = tl.cast(start, tl.int64)
        k = _load(k_at + shift * k_step, column[None, :] < n_k, MASKED, UPCAST)  # [D, BLOCK_N]
        s = tl.dot(q, k, input_precision="ieee") * scale_log2
        if MASKED:
            visible = column[None, :] < n_k
            if CAUSAL:
                visible = visible & (column[None, :] <= row[:, None] + offset)
            s = tl.where(visible, s, -float("inf"))
        new = tl.maximum(m, tl.max(s, 1))
        safe = new
        if MASKED:
            safe = tl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing: -inf - -inf is NaN
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        mass = mass * shrink + tl.sum(p, 1)
        v = _load(v_at + shift * v_step, column[:, None] < n_k, MASKED, UPCAST)  # [BLOCK_N, D]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = new
    return acc, mass, m


@triton.jit(do_not_specialize=["documents", "tiles", "heads", "block"])
def _forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, documents, tiles, heads, block, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, lse_head,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head = _locate(tiles, heads, block)
    tile = tiles - 1 - tile  # if causal, the heaviest first
    document = find_document(cu_q, documents, tile, BLOCK_M)
    b_q = tl.load(cu_q + document)
    n_q = tl.load(cu_q + document + 1) - b_q
    first_row = (tile - (b_q // BLOCK_M + document)) * BLOCK_M
    if first_row >= n_q:
        return
    b_k = tl.load(cu_k + document)
    n_k = tl.load(cu_k + document + 1) - b_k
    offset = n_k - n_q
    row = first_row + tl.arange(0, BLOCK_M)
    at = tl.arange(0, D)
    in_document = row[:, None] < n_q
    position = (b_q + row).to(tl.int64)
    q_tile = _load(q + position[:, None] * q_row + head * q_head + at[None, :], in_document, True, UPCAST)

    column = tl.arange(0, BLOCK_N)
    k_base = k + b_k.to(tl.int64) * k_row + head // GROUP * k_head
    v_base = v + b_k.to(tl.int64) * v_row + head // GROUP * v_head
    k_at = k_base + column[None, :].to(tl.int64) * k_row + at[:, None]
    v_at = v_base + column[:, None].to(tl.int64) * v_row + at[None, :]
    whole, someone = _walks(first_row, n_k, offset, CAUSAL, BLOCK_M, BLOCK_N)

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E
    if CAUSAL:
        acc, mass, m = _forward_walk(
            q_tile, acc, mass, m, k_at, v_at, k_row, v_row, 0, whole, row, n_k, offset, scale_log2,
            CAUSAL, False, UPCAST, BLOCK_N,
        )  # fmt: skip
    acc, mass, m = _forward_walk(
        q_tile, acc, mass, m, k_at, v_at, k_row, v_row, whole, someone, row, n_k, offset, scale_log2,
        CAUSAL, True, UPCAST, BLOCK_N,
    )  # fmt: skip
    # Rows that see no key have mass 0 and m = -inf: they give zeros, and lse = -inf.
    mass = tl.where(mass == 0.0, 1.0, mass)
    acc = acc / mass[:, None]
    out_at = out + position[:, None] * out_row + head * out_head + at[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=in_document)
    tl.store(lse + head * lse_head + position, (m + tl.log2(mass)) * LN2, mask=row < n_q)


@triton.jit(do_not_specialize=["documents", "tiles", "heads", "block"])
def _dkdv_kernel(
    q, k, v, dout, sums, dk, dv, cu_q, cu_k, documents, tiles, heads, block, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, sums_rows, dk_row, dk_head, dv_row, dv_head,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr, SUMS_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk, dv: of every query head. sums: as _dq_kernel leaves them, SUMS_BLOCK its BLOCK_M."""
    tile, head = _locate(tiles, heads, block)
    document = find_document(cu_k, documents, tile, BLOCK_N)
    b_k = tl.load(cu_k + document)
    n_k = tl.load(cu_k + document + 1) - b_k
    first_column = (tile - (b_k // BLOCK_N + document)) * BLOCK_N
    if first_column >= n_k:
        return
    b_q = tl.load(cu_q + document)
    n_q = tl.load(cu_q + document + 1) - b_q
    offset = n_k - n_q
    column = first_column + tl.arange(0, BLOCK_N)
    at = tl.arange(0, D)
    in_document = column[:, None] < n_k
    position = (b_k + column).to(tl.int64)
    k_tile = _load(k + position[:, None] * k_row + head // GROUP * k_head + at[None, :], in_document, True, UPCAST)
    v_tile = _load(v + position[:, None] * v_row + head // GROUP * v_head + at[None, :], in_document, True, UPCAST)

    first = 0  # the first query tile that sees some of the keys
    if CAUSAL:
        first = tl.maximum(first_column - offset, 0) // BLOCK_M * BLOCK_M
    row = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    q_at = q + head * q_head + (b_q + row) * q_row + at[None, :]
    dout_at = dout + head * dout_head + (b_q + row) * dout_row + at[None, :]
    lse_at = sums + head * 2 * sums_rows + (b_q // SUMS_BLOCK + document) * SUMS_BLOCK
    dk_tile = tl.zeros((BLOCK_N, D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, D), tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E
    # One loop, masked throughout: with a second one the accumulators would be moved between registers from one to the
    # other, and for that the assembler makes every product of the kernel wait for the one before. Rows behind the
    # document's end: their q, dO, lse and Delta are zero, and so are their parts.
    for start in range(first, n_q, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        shift = tl.cast(start, tl.int64)
        q_tile = _load(q_at + shift * q_row, i[:, None] < n_q, True, UPCAST)  # [BLOCK_M, D]
        lse_i = tl.load(lse_at + i)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale_log2  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(s - lse_i[None, :])
        if CAUSAL:
            p = tl.where(column[:, None] - offset <= i[None, :], p, 0.0)
        dout_tile = _load(dout_at + shift * dout_row, i[:, None] < n_q, True, UPCAST)  # [BLOCK_M, D]
        dv_tile = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
        ds = p * (dp - tl.load(lse_at + sums_rows + i)[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    dk_at = dk + position[:, None] * dk_row + head * dk_head + at[None, :]
    dv_at = dv + position[:, None] * dv_row + head * dv_head + at[None, :]
    tl.store(dk_at, (dk_tile * tl.cast(scale, tl.float32)).to(dk.dtype.element_ty), mask=in_document)
    tl.store(dv_at, dv_tile.to(dv.dtype.element_ty), mask=in_document)


@triton.jit(do_not_specialize=["total", "group"])
def _add_parts_kernel(
    dk_parts, dv_parts, dk, dv, total, group, dk_row, dk_head, dv_row, dv_head, D: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    kv_head = tl.program_id(1).to(tl.int64)
    mask = row < total
    d = tl.arange(0, D)[None, :]
    at = (row * tl.num_programs(1) + kv_head) * group * D + d
    dk_sum = tl.zeros((ROWS, D), tl.float32)
    dv_sum = tl.zeros((ROWS, D), tl.float32)
    for member in range(group):
        dk_sum += tl.load(dk_parts + at + member * D, mask=mask, other=0.0)
        dv_sum += tl.load(dv_parts + at + member * D, mask=mask, other=0.0)
    tl.store(dk + row * dk_row + kv_head * dk_head + d, dk_sum.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + row * dv_row + kv_head * dv_head + d, dv_sum.to(dv.dtype.element_ty), mask=mask)


_launch_add_parts = Launcher(_add_parts_kernel, num_warps=4)


def make_parts(k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Room for the parts of dk and dv that each query head contributes: (total, heads, head_dim), fp32."""
    dk, dv = torch.empty((2, k.shape[0], heads, k.shape[2]), dtype=torch.float32, device=k.device)
    return dk, dv


def add_parts(dk_parts: Tensor, dv_parts: Tensor, dk: Tensor, dv: Tensor) -> None:
    """dk and dv (total, kv_heads, head_dim) = the sums of `make_parts` over the query heads of each key head."""
    total, kv_heads, head_dim = dk.shape
    strides = (dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1))
    key = (dk.device, dk.dtype) if not any(stride % 16 for stride in strides) else None
    _launch_add_parts(
        (triton.cdiv(total, 16), kv_heads, 1), key, dk_parts, dv_parts, dk, dv, total, dk_parts.shape[1] // kv_heads,
        *strides, D=head_dim, ROWS=16,
    )  # fmt: skip


@triton.jit
def _dq_walk(
    dq, q, dout, lse, delta, k_at, v_at, k_step, v_step, first, last, row, n_k, offset, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Folds keys first ... last into dq, which lacks the factor scale; lse to the base 2."""
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        shift = tl.cast(start, tl.int64)
        k = _load(k_at + shift * k_step, column[:, None] < n_k, MASKED, UPCAST)  # [BLOCK_N, D]
        v = _load(v_at + shift * v_step, column[:, None] < n_k, MASKED, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            visible = column[None, :] < n_k
            if CAUSAL:
                visible = visible & (column[None, :] <= row[:, None] + offset)
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["documents", "tiles", "heads", "block"])
def _dq_kernel(
    q, k, v, dout, out, lse, dlse, sums, dq, cu_q, cu_k, documents, tiles, heads, block, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, lse_head, sums_rows, dq_row, dq_head,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums (heads, 2, sums_rows): lse to the base 2 and Delta, of each tile's rows, behind the document's end too."""
    tile, head = _locate(tiles, heads, block)
    tile = tiles - 1 - tile  # if causal, the heaviest first
    document = find_document(cu_q, documents, tile, BLOCK_M)
    b_q = tl.load(cu_q + document)
    n_q = tl.load(cu_q + document + 1) - b_q
    first_row = (tile - (b_q // BLOCK_M + document)) * BLOCK_M
    if first_row >= n_q:
        return
    b_k = tl.load(cu_k + document)
    n_k = tl.load(cu_k + document + 1) - b_k
    offset = n_k - n_q
    row = first_row + tl.arange(0, BLOCK_M)
    at = tl.arange(0, D)
    in_document = row[:, None] < n_q
    position = (b_q + row).to(tl.int64)
    q_tile = _load(q + position[:, None] * q_row + head * q_head + at[None, :], in_document, True, UPCAST)
    dout_at = dout + position[:, None] * dout_row + head * dout_head + at[None, :]
    dout_tile = _load(dout_at, in_document, True, UPCAST)
    lse_row = tl.load(lse + head * lse_head + position, mask=row < n_q, other=0.0) * LOG2E
    lse_row = tl.where(lse_row == -float("inf"), 0.0, lse_row)  # a row that sees nothing
    # Delta = rowsum(dO * O) - dlse, which the kernel for dK and dV needs too: with lse, in a place of which that kernel
    # may read whole tiles. out has the strides of dout.
    out_tile = _load(out + position[:, None] * dout_row + head * dout_head + at[None, :], in_document, True, UPCAST)
    delta_row = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        delta_row -= tl.load(dlse + head * lse_head + position, mask=row < n_q, other=0.0)
    lse_at = sums + head * 2 * sums_rows + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(lse_at, lse_row)
    tl.store(lse_at + sums_rows, delta_row)

    column = tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
    k_at = k + head // GROUP * k_head + (b_k + column) * k_row + at[None, :]
    v_at = v + head // GROUP * v_head + (b_k + column) * v_row + at[None, :]
    whole, someone = _walks(first_row, n_k, offset, CAUSAL, BLOCK_M, BLOCK_N)
    dq_tile = tl.zeros((BLOCK_M, D), tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E
    if CAUSAL:
        dq_tile = _dq_walk(
            dq_tile, q_tile, dout_tile, lse_row, delta_row, k_at, v_at, k_row, v_row, 0, whole, row, n_k, offset,
            scale_log2, CAUSAL, False, UPCAST, BLOCK_N,
        )  # fmt: skip
    dq_tile = _dq_walk(
        dq_tile, q_tile, dout_tile, lse_row, delta_row, k_at, v_at, k_row, v_row, whole, someone, row, n_k, offset,
        scale_log2, CAUSAL, True, UPCAST, BLOCK_N,
    )  # fmt: skip
    dq_at = dq + position[:, None] * dq_row + head * dq_head + at[None, :]
    tl.store(dq_at, (dq_tile * tl.cast(scale, tl.float32)).to(dq.dtype.element_ty), mask=in_document)


def _upcast(x: Tensor) -> bool:
    return interpreting() and x.dtype == torch.bfloat16


L2_BYTES = 20 << 20  # of the cache: on Hopper, a part of its 50 MB is copies of what lies in the other half


@functools.lru_cache(maxsize=1024)
def heads_in_cache(heads: int, rows: int, head_dim: int, element_size: int) -> int:
    """How many heads are worked on together: as many as divide `heads` and keep in the L2 cache what they read again
    and again, and as much that passes through: four tensors in all."""
    size = 4 * rows * head_dim * element_size
    return max((n for n in range(1, heads + 1) if heads % n == 0 and n * size <= L2_BYTES), default=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """reference.attention, without waiting for the device. Rows of q, k, v are contiguous."""
    total, heads, head_dim = q.shape
    out = torch.empty((total, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    documents, group = cu_seqlens_q.shape[0] - 1, heads // k.shape[1]
    blocks = block_sizes("forward", head_dim, q.dtype, shared_memory(q.device))
    if total:
        tiles = total // blocks["BLOCK_M"] + documents
        block = group * heads_in_cache(k.shape[1], k.shape[0], head_dim, k.element_size())
        _forward_kernel[(tiles * heads,)](
            q, k, v, out, lse, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
            documents, tiles, heads, block, scale,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            out.stride(0), out.stride(1), total,
            GROUP=group, D=head_dim, CAUSAL=causal, UPCAST=_upcast(q), **blocks,
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool, deterministic: bool,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """reference.attention_backward, without waiting for the device. dout, dlse, out, lse are contiguous."""
    total, heads, head_dim = q.shape
    kv_heads, documents = k.shape[1], cu_seqlens_q.shape[0] - 1
    group = heads // kv_heads
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    constants = {"GROUP": group, "D": head_dim, "CAUSAL": causal, "UPCAST": _upcast(q)}
    strides = tuple(x.stride(i) for x in (q, k, v, dout) for i in (0, 1))
    blocks = block_sizes("dq", head_dim, q.dtype, shared_memory(q.device))
    sums_block, tiles = blocks["BLOCK_M"], total // blocks["BLOCK_M"] + documents
    sums = torch.empty((heads, 2, tiles * sums_block), dtype=torch.float32, device=q.device)
    if total:
        block = group * heads_in_cache(kv_heads, k.shape[0], head_dim, q.element_size())
        _dq_kernel[(tiles * heads,)](
            q, k, v, dout, out, lse, dlse, sums, dq, cu_q, cu_k, documents, tiles, heads, block, scale,
            *strides, total, sums.shape[2], dq.stride(0), dq.stride(1), **constants, **blocks,
        )  # fmt: skip
    if k.shape[0]:
        blocks = block_sizes("dkdv", head_dim, q.dtype, shared_memory(q.device))
        tiles = k.shape[0] // blocks["BLOCK_N"] + documents
        block = heads_in_cache(heads, total, head_dim, q.element_size())
        dk_parts, dv_parts = (dk, dv) if group == 1 else make_parts(k, heads)
        part_strides = tuple(x.stride(i) for x in (dk_parts, dv_parts) for i in (0, 1))
        _dkdv_kernel[(tiles * heads,)](
            q, k, v, dout, sums, dk_parts, dv_parts, cu_q, cu_k, documents, tiles, heads, block, scale,
            *strides, sums.shape[2], *part_strides, SUMS_BLOCK=sums_block, **constants, **blocks,
        )  # fmt: skip
        if group > 1:
            add_parts(dk_parts, dv_parts, dk, dv)
