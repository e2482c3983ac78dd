"""Launches the Hopper kernels: hopper_forward.py and hopper_backward.py hold them, schedule.py their work lists.

The same two functions as portable.py. What the copy engine (TMA) reads is described by a *tensor descriptor*: a base,
two dimensions, one stride. Heads lie in the second dimension, at multiples of the head stride, which need not be the
head's width: columns may run past a row's end in memory. So one descriptor serves every layout of (total, heads,
head_dim) whose rows are contiguous, views of the fused QKV tensor included, and nothing is copied.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward import backward_kernel
from .hopper_forward import forward_kernel
from .portable import LOG2E, find_document
from .schedule import schedule

QUERIES, KEYS = 128, 128  # tile of an item, forward
BACKWARD_KEYS, BACKWARD_QUERIES = 128, 64
L2_BYTES = 20 << 20  # of 50 MB or more: a part of the cache is copies of what lies in its other half


@functools.cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    if len(shape) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(shape), kinds[dtype])


def _describable(x: Tensor) -> Tensor:
    """x (total, heads, head_dim), or a copy where the copy engine cannot read it."""
    aligned = x.stride(0) > 0 and x.data_ptr() % 16 == 0 and not any(s * x.element_size() % 16 for s in x.stride()[:2])
    reach = x.shape[1] * x.stride(1)
    return x if x.stride(2) == 1 and aligned and reach < 2**31 else x.contiguous()


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows and one head of x; head h begins at column h * x.stride(1)."""
    total, heads, head_dim = x.shape
    block = (rows, head_dim)
    columns = (heads - 1) * x.stride(1) + head_dim
    return TensorDescriptor(x, [total, columns], [x.stride(0), 1], list(block), _layout(block, x.dtype))


def _flat_descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), _layout(block, x.dtype))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _block(heads: int, bytes_per_head: int) -> int:
    """How many heads are worked on together: as many as divide `heads` and keep their data in the L2 cache."""
    return max((n for n in range(1, heads + 1) if heads % n == 0 and n * bytes_per_head <= L2_BYTES), default=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """reference.attention, without waiting for the device: fp16 or bf16, head_dim 64 or 128, no empty tensors."""
    total, heads, head_dim = q.shape
    q, k, v = (_describable(x) for x in (q, k, v))
    out = torch.empty((total, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    items, tiles = schedule(
        cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), total, QUERIES, KEYS, causal, backward=False
    )
    group, kv_heads = heads // k.shape[1], k.shape[1]
    block = group * _block(kv_heads, 2 * k.shape[0] * head_dim * k.element_size())
    forward_kernel[(min(_multiprocessors(q.device), tiles * heads),)](
        _descriptor(q, 64), _descriptor(k, KEYS), _descriptor(v, KEYS), _descriptor(out, 64), out, lse, items, tiles,
        total, heads, block, group, scale * LOG2E.value,
        q.stride(1), k.stride(1), v.stride(1), out.stride(1), out.stride(0),
        D=head_dim, CAUSAL=causal, BLOCK_N=KEYS, STAGES=2, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["documents", "total", "padded_total"])
def _prepare_kernel(
    dout, out, lse, dlse, lse_padded, delta_padded, dq_sum, cu_q, documents, total, padded_total,
    dout_row, dout_head, out_row, out_head, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta = rowsum(dO * O) - dlse, padded; dq_sum = 0."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    document = find_document(cu_q, documents, tile, ROWS)
    start = tl.load(cu_q + document)
    end = tl.load(cu_q + document + 1)
    index = tl.arange(0, ROWS)
    row = (start + (tile - (start // ROWS + document)) * ROWS + index).to(tl.int64)
    mask = row < end
    d = tl.arange(0, D)[None, :]
    o = tl.load(out + row[:, None] * out_row + head * out_head + d, mask=mask[:, None], other=0.0).to(tl.float32)
    do = tl.load(dout + row[:, None] * dout_row + head * dout_head + d, mask=mask[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1) - tl.load(dlse + head * total + row, mask=mask, other=0.0)
    lse_row = tl.load(lse + head * total + row, mask=mask, other=-float("inf"))
    lse_row = tl.where(lse_row == -float("inf"), float("inf"), lse_row * LOG2E)  # then P is zero
    padded = head * padded_total + tile.to(tl.int64) * ROWS + index
    tl.store(lse_padded + padded, lse_row)
    tl.store(delta_padded + padded, delta)
    tl.store(dq_sum + padded[:, None] * D + d, tl.zeros((ROWS, D), tl.float32))


@triton.jit(do_not_specialize=["documents", "padded_total"])
def _finish_kernel(
    dq_sum, dq, cu_q, documents, padded_total, scale, dq_row, dq_head, D: tl.constexpr, ROWS: tl.constexpr
):
    """dq = scale * dq_sum, out of its padded rows."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    document = find_document(cu_q, documents, tile, ROWS)
    start = tl.load(cu_q + document)
    end = tl.load(cu_q + document + 1)
    index = tl.arange(0, ROWS)
    row = (start + (tile - (start // ROWS + document)) * ROWS + index).to(tl.int64)
    d = tl.arange(0, D)[None, :]
    padded = head * padded_total + tile.to(tl.int64) * ROWS + index
    x = tl.load(dq_sum + padded[:, None] * D + d) * tl.cast(scale, tl.float32)
    at = dq + row[:, None] * dq_row + head * dq_head + d
    tl.store(at, x.to(dq.dtype.element_ty), mask=(row < end)[:, None])


def attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """reference.attention_backward, without waiting for the device; the order in which dQ is summed is not fixed."""
    total, heads, head_dim = q.shape
    kv_heads, documents, device = k.shape[1], cu_seqlens_q.shape[0] - 1, q.device
    q, k, v, dout = (_describable(x) for x in (q, k, v, dout))
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    padded_tiles = total // BACKWARD_QUERIES + documents
    padded_total = padded_tiles * BACKWARD_QUERIES
    lse_padded, delta_padded = torch.empty((2, heads * padded_total), dtype=torch.float32, device=device)
    dq_sum = torch.empty((heads * padded_total, head_dim), dtype=torch.float32, device=device)
    _prepare_kernel[(padded_tiles, heads)](
        dout, out, lse, dlse, lse_padded, delta_padded, dq_sum, cu_q, documents, total, padded_total,
        dout.stride(0), dout.stride(1), out.stride(0), out.stride(1), D=head_dim, ROWS=BACKWARD_QUERIES, num_warps=4,
    )  # fmt: skip
    items, tiles = schedule(cu_k, cu_q, k.shape[0], BACKWARD_KEYS, BACKWARD_QUERIES, causal, backward=True)
    group = heads // kv_heads
    dk_parts, dv_parts = dk, dv
    if group > 1:
        dk_parts, dv_parts = torch.empty((2, k.shape[0], heads, head_dim), dtype=torch.float32, device=device)
    block = _block(heads, total * head_dim * (2 * q.element_size() + 4))  # Q, dO and fp32 dQ
    backward_kernel[(min(_multiprocessors(device), tiles * heads),)](
        _descriptor(q, BACKWARD_QUERIES), _descriptor(k, 64), _descriptor(v, 64), _descriptor(dout, BACKWARD_QUERIES),
        _flat_descriptor(dq_sum, BACKWARD_QUERIES, head_dim // 2), _flat_descriptor(lse_padded, BACKWARD_QUERIES),
        _flat_descriptor(delta_padded, BACKWARD_QUERIES), dk_parts, dv_parts, items, tiles, heads, block, group,
        padded_total, scale, scale * LOG2E.value, q.stride(1), dout.stride(1), k.stride(1), v.stride(1),
        dk_parts.stride(0), dk_parts.stride(1), dv_parts.stride(0), dv_parts.stride(1),
        D=head_dim, CAUSAL=causal, STAGES=2, num_warps=4, maxnreg=168,
    )  # fmt: skip
    _finish_kernel[(padded_tiles, heads)](
        dq_sum, dq, cu_q, documents, padded_total, scale, dq.stride(0), dq.stride(1),
        D=head_dim, ROWS=BACKWARD_QUERIES, num_warps=4,
    )  # fmt: skip
    if group > 1:
        dk.copy_(dk_parts.unflatten(1, (kv_heads, group)).sum(2))
        dv.copy_(dv_parts.unflatten(1, (kv_heads, group)).sum(2))
