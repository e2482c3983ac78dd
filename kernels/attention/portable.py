"""Attention forward and backward in plain Triton: runs on every GPU that Triton knows, and in its interpreter.

Forward (Dao, arXiv 2307.08691): a program owns a tile of queries of one head and walks over the keys, keeping for each
row the running maximum m, the running sum mass and the unnormalised output; scores exist one tile at a time. Keys that
every row of the tile sees need no mask, so the walk is two loops: whole tiles, then masked ones.

Backward: P is recomputed from lse. One kernel owns a tile of keys of one key head and walks over the queries of every
head in its group, for dK and dV; another owns a tile of queries and walks over the keys, for dQ. That is seven products
where five would do with atomic additions into dQ, and in exchange nothing depends on the order in which programs run.

The grid for packed documents needs the lengths, which are on the device. Give document d, from row a to row b, the
tile numbers from a // BLOCK + d on, up to the next document's first: there are b // BLOCK - a // BLOCK + 1 of these,
always at least the ceil((b - a) / BLOCK) that it needs, and in all total // BLOCK + documents, which the host knows. A
program finds its document by bisection, and leaves when its tile lies behind the document's end.

Names: b_ offsets of a document's first row, n_ lengths; tiles are [BLOCK_M, D] of queries and [BLOCK_N, D] of keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def block_sizes(kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages for "forward", "dkdv" or "dq": what fits registers and shared memory."""
    if interpreting():
        m, n, warps, stages = 32, 16, 1, 1  # small, so that short sequences cross tiles
    elif dtype == torch.float32:  # no tensor cores: operands in registers
        m, n, warps, stages = 32, 32, 8, 1
    elif kernel == "forward":
        m, n, warps, stages = (128, 64, 4, 3) if head_dim <= 64 else (128, 64, 8, 3)
    elif kernel == "dkdv":  # at head_dim 128 more rows, or a second unmasked loop, spill registers
        m, n, warps, stages = (64, 128, 8, 2) if head_dim <= 64 else (32, 128, 8, 2)
    else:
        m, n, warps, stages = 128, 64, 8, 2
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
def _load(pointer, mask, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    if MASKED:
        x = tl.load(pointer, mask=mask, other=0.0)
    else:
        x = tl.load(pointer)
    if UPCAST:  # the interpreter's bf16 arithmetic is wrong
        x = x.to(tl.float32)
    return x


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


@triton.jit(do_not_specialize=["documents"])
def _forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, documents, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, lse_head,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
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
    everyone, someone = n_k, n_k  # keys seen by every row, by some row
    if CAUSAL:
        everyone = tl.maximum(tl.minimum(n_k, first_row + offset + 1), 0)
        someone = tl.maximum(tl.minimum(n_k, first_row + BLOCK_M + offset), 0)
    whole = everyone // BLOCK_N * BLOCK_N

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E
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


@triton.jit(do_not_specialize=["total"])
def _delta_kernel(
    dout, out, dlse, delta, total, row_stride, head_stride, lse_head, D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta (heads, total) = rowsum(dO * O) - dlse; dout and out are contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    at = row[:, None] * row_stride + head * head_stride + tl.arange(0, D)[None, :]
    mask = row < total
    o = tl.load(out + at, mask=mask[:, None], other=0.0).to(tl.float32)
    do = tl.load(dout + at, mask=mask[:, None], other=0.0).to(tl.float32)
    result = tl.sum(o * do, 1) - tl.load(dlse + head * lse_head + row, mask=mask, other=0.0)
    tl.store(delta + head * lse_head + row, result, mask=mask)


@triton.jit(do_not_specialize=["documents"])
def _dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, documents, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, lse_head, dk_row, dk_head, dv_row, dv_head,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
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
    k_tile = _load(k + position[:, None] * k_row + kv_head * k_head + at[None, :], in_document, True, UPCAST)
    v_tile = _load(v + position[:, None] * v_row + kv_head * v_head + at[None, :], in_document, True, UPCAST)

    first = 0  # the first query tile that sees some of the keys
    if CAUSAL:
        first = tl.maximum(first_column - offset, 0) // BLOCK_M * BLOCK_M
    row = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    dk_tile = tl.zeros((BLOCK_N, D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, D), tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_at = q + head * q_head + (b_q + row) * q_row + at[None, :]
        dout_at = dout + head * dout_head + (b_q + row) * dout_row + at[None, :]
        lse_at = lse + head * lse_head + b_q
        delta_at = delta + head * lse_head + b_q
        # Rows behind the document's end need no mask: their dO, lse and delta load as zero, and so are their parts.
        for start in range(first, n_q, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            shift = tl.cast(start, tl.int64)
            q_tile = _load(q_at + shift * q_row, i[:, None] < n_q, True, UPCAST)  # [BLOCK_M, D]
            lse_i = tl.load(lse_at + i, mask=i < n_q, other=0.0) * LOG2E
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale_log2  # [BLOCK_N, BLOCK_M]
            if CAUSAL:
                lse_i = tl.where(lse_i == -float("inf"), 0.0, lse_i)  # a row that sees nothing
                s = tl.where(column[:, None] <= i[None, :] + offset, s, -float("inf"))
            p = tl.exp2(s - lse_i[None, :])
            dout_tile = _load(dout_at + shift * dout_row, i[:, None] < n_q, True, UPCAST)  # [BLOCK_M, D]
            dv_tile = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            ds = p * (dp - tl.load(delta_at + i, mask=i < n_q, other=0.0)[None, :])
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    dk_at = dk + position[:, None] * dk_row + kv_head * dk_head + at[None, :]
    dv_at = dv + position[:, None] * dv_row + kv_head * dv_head + at[None, :]
    tl.store(dk_at, (dk_tile * tl.cast(scale, tl.float32)).to(dk.dtype.element_ty), mask=in_document)
    tl.store(dv_at, dv_tile.to(dv.dtype.element_ty), mask=in_document)


@triton.jit
def _dq_walk(
    dq, q, dout, lse, delta, k_at, v_at, k_step, v_step, first, last, row, n_k, offset, scale_log2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Folds keys first ... last into dq, which lacks the factor scale."""
    for start in range(first, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        shift = tl.cast(start, tl.int64)
        k = _load(k_at + shift * k_step, column[:, None] < n_k, MASKED, UPCAST)  # [BLOCK_N, D]
        v = _load(v_at + shift * v_step, column[:, None] < n_k, MASKED, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = column[None, :] < n_k
            if CAUSAL:
                visible = visible & (column[None, :] <= row[:, None] + offset)
            s = tl.where(visible, s, -float("inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["documents"])
def _dq_kernel(
    q, k, v, dout, lse, delta, dq, cu_q, cu_k, documents, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, lse_head, dq_row, dq_head,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
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
    delta_row = tl.load(delta + head * lse_head + position, mask=row < n_q, other=0.0)

    column = tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
    k_at = k + head // GROUP * k_head + (b_k + column) * k_row + at[None, :]
    v_at = v + head // GROUP * v_head + (b_k + column) * v_row + at[None, :]
    everyone, someone = n_k, n_k  # keys seen by every row, by some row
    if CAUSAL:
        everyone = tl.maximum(tl.minimum(n_k, first_row + offset + 1), 0)
        someone = tl.maximum(tl.minimum(n_k, first_row + BLOCK_M + offset), 0)
    whole = everyone // BLOCK_N * BLOCK_N
    dq_tile = tl.zeros((BLOCK_M, D), tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * LOG2E
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


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """reference.attention, without waiting for the device. Rows of q, k, v are contiguous."""
    total, heads, head_dim = q.shape
    out = torch.empty((total, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    documents = cu_seqlens_q.shape[0] - 1
    blocks = block_sizes("forward", head_dim, q.dtype)
    if total:
        _forward_kernel[(total // blocks["BLOCK_M"] + documents, heads)](
            q, k, v, out, lse, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), documents, scale,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            out.stride(0), out.stride(1), total,
            GROUP=heads // k.shape[1], D=head_dim, CAUSAL=causal, UPCAST=_upcast(q), **blocks,
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """reference.attention_backward, without waiting for the device. dout, dlse, out, lse are contiguous."""
    total, heads, head_dim = q.shape
    kv_heads, documents = k.shape[1], cu_seqlens_q.shape[0] - 1
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    delta = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    constants = {"GROUP": heads // kv_heads, "D": head_dim, "CAUSAL": causal, "UPCAST": _upcast(q)}
    strides = tuple(x.stride(i) for x in (q, k, v, dout) for i in (0, 1))
    if total:
        _delta_kernel[(triton.cdiv(total, 64), heads)](
            dout, out, dlse, delta, total, out.stride(0), out.stride(1), total, D=head_dim, BLOCK_M=64, num_warps=4
        )
        blocks = block_sizes("dq", head_dim, q.dtype)
        _dq_kernel[(total // blocks["BLOCK_M"] + documents, heads)](
            q, k, v, dout, lse, delta, dq, cu_q, cu_k, documents, scale,
            *strides, total, dq.stride(0), dq.stride(1), **constants, **blocks,
        )  # fmt: skip
    if k.shape[0]:
        blocks = block_sizes("dkdv", head_dim, q.dtype)
        _dkdv_kernel[(k.shape[0] // blocks["BLOCK_N"] + documents, kv_heads)](
            q, k, v, dout, lse, delta, dk, dv, cu_q, cu_k, documents, scale,
            *strides, total, dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), **constants, **blocks,
        )  # fmt: skip
