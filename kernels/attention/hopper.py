"""Launches the Hopper kernels: hopper_forward.py and hopper_backward.py hold them, schedule.py their work lists.

The same two functions as portable.py. What the copy engine (TMA) reads is described by a *tensor descriptor*: a base,
two dimensions, one stride. Heads lie in the second dimension, at multiples of the head stride, which need not be the
head's width: columns may run past a row's end in memory. So one descriptor serves every layout of (total, heads,
head_dim) whose rows are contiguous, views of the fused QKV tensor included, and nothing is copied.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..dispatch import Launcher, multiprocessors
from ..warpgroup import as_rows
from .hopper_backward import backward_kernel
from .hopper_forward import KEYS, forward_kernel
from .portable import LOG2E, add_parts, find_document, heads_in_cache, make_parts
from .schedule import schedule

QUERIES = 128  # tile of an item, forward
BACKWARD_KEYS, BACKWARD_QUERIES = 128, 64


@functools.cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    if len(shape) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(shape), kinds[dtype])


def _describable(x: Tensor) -> Tensor:
    """x (total, heads, head_dim), of 2 bytes an element, or a copy where the copy engine cannot read it."""
    row, head, one = x.stride()
    aligned = (row | head) % 8 == 0 and x.data_ptr() % 16 == 0
    if aligned and one == 1 and 0 < row < 2**31 and x.shape[1] * head < 2**31:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() would return what only begins at an odd place


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(x, shape, strides, list(block), _layout(block, x.dtype))


def _head_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows and one head of x; head h begins at column h * x.stride(1)."""
    total, heads, head_dim = x.shape
    row, head, _ = x.stride()
    return _descriptor(x, [total, (heads - 1) * head + head_dim], [row, 1], (rows, head_dim))


def _key(*tensors: Tensor) -> tuple[Any, ...] | None:
    """What decides the compilation of kernels that get these tensors' strides (`Launcher`)."""
    strides = 0
    for x in tensors:
        strides |= x.stride(0) | x.stride(1)
    return (x.device, x.dtype) if strides % 16 == 0 else None


_launch_forward = Launcher(forward_kernel, num_warps=4, maxnreg=168, launch_pdl=True)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """reference.attention, without waiting for the device: fp16 or bf16, head_dim 64 or 128, no empty tensors."""
    total, heads, head_dim = q.shape
    q, k, v = (_describable(x) for x in (q, k, v))
    out = torch.empty((total, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    items, tiles = schedule(cu_q, cu_k, total, QUERIES, KEYS, causal, backward=False, lightest=False)
    group, kv_heads = heads // k.shape[1], k.shape[1]
    block = group * heads_in_cache(kv_heads, k.shape[0], head_dim, k.element_size())
    _launch_forward(
        (min(multiprocessors(q.device), tiles * heads), 1, 1), _key(q, k, v),
        _head_descriptor(q, 64), _head_descriptor(k, KEYS), _head_descriptor(v, KEYS), _head_descriptor(out, 64),
        out, lse, items, tiles, total, heads, block, group, scale * LOG2E.value,
        q.stride(1), k.stride(1), v.stride(1), out.stride(1), out.stride(0),
        D=head_dim, CAUSAL=causal, BLOCK_N=KEYS, STAGES=2,
    )  # fmt: skip
    return out, lse


@triton.jit
def _padded_tile(cu_q, documents, tile, ROWS: tl.constexpr):
    """Of a tile number: its rows in the packed tensor, which of them exist, and its rows in padded ones."""
    document = find_document(cu_q, documents, tile, ROWS)
    start = tl.load(cu_q + document)
    index = tl.arange(0, ROWS)
    row = (start + (tile - (start // ROWS + document)) * ROWS + index).to(tl.int64)
    return row, row < tl.load(cu_q + document + 1), tile.to(tl.int64) * ROWS + index


@triton.jit(
    do_not_specialize=["documents", "total", "padded_total"],
    do_not_specialize_on_alignment=["lse", "dlse", "cu_q"],
)  # fmt: skip
def _prepare_kernel(
    dout, out, lse, dlse, lse_padded, delta_padded, dq_sum, turns, cu_q, documents, total, padded_total,
    dout_row, dout_head, out_row, out_head, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta = rowsum(dO * O) - dlse, padded; dq_sum = 0, turns = 0. Behind `schedule`."""
    gdc_launch_dependents()
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row, mask, padded = _padded_tile(cu_q, documents, tile, ROWS)
    padded += head * padded_total
    d = tl.arange(0, D)[None, :]
    o = tl.load(out + row[:, None] * out_row + head * out_head + d, mask=mask[:, None], other=0.0).to(tl.float32)
    do = tl.load(dout + row[:, None] * dout_row + head * dout_head + d, mask=mask[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    if dlse is not None:
        delta -= tl.load(dlse + head * total + row, mask=mask, other=0.0)
    lse_row = tl.load(lse + head * total + row, mask=mask, other=-float("inf"))
    lse_row = tl.where(lse_row == -float("inf"), float("inf"), lse_row * LOG2E)  # then P is zero
    tl.store(lse_padded + padded, lse_row)
    tl.store(delta_padded + padded, delta)
    tl.store(dq_sum + padded[:, None] * D + d, tl.zeros((ROWS, D), tl.float32))  # in whatever order
    tl.store(turns + head * (padded_total // ROWS) + tile, 0)
    gdc_wait()  # whoever waits for this kernel waits for the one before it too


@triton.jit(do_not_specialize=["documents", "padded_total"], do_not_specialize_on_alignment=["cu_q"])
def _finish_kernel(
    dq_sum, dq, cu_q, documents, padded_total, scale, dq_row, dq_head, D: tl.constexpr, ROWS: tl.constexpr
):
    """dq = scale * dq_sum, out of its padded rows and the order of registers."""
    gdc_wait()
    head = tl.program_id(1).to(tl.int64)
    row, mask, _ = _padded_tile(cu_q, documents, tl.program_id(0), ROWS)
    first = head * padded_total + tl.program_id(0).to(tl.int64) * ROWS
    x = as_rows(tl.load(dq_sum + first * D + tl.arange(0, ROWS * D)), D) * tl.cast(scale, tl.float32)
    d = tl.arange(0, D)[None, :]
    at = dq + row[:, None] * dq_row + head * dq_head + d
    tl.store(at, x.to(dq.dtype.element_ty), mask=mask[:, None])


# Each of a pass's kernels begins while the one before it still runs, and waits for its end where it needs it.
_launch_prepare = Launcher(_prepare_kernel, num_warps=4, launch_pdl=True)
_launch_backward = Launcher(backward_kernel, num_warps=4, maxnreg=168, launch_pdl=True)
_launch_finish = Launcher(_finish_kernel, num_warps=4, launch_pdl=True)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool, deterministic: bool,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """reference.attention_backward, without waiting for the device."""
    total, heads, head_dim = q.shape
    kv_heads, documents, device = k.shape[1], cu_seqlens_q.shape[0] - 1, q.device
    q, k, v, dout, out = (_describable(x) for x in (q, k, v, dout, out))
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    padded_tiles = total // BACKWARD_QUERIES + documents
    padded_total = padded_tiles * BACKWARD_QUERIES
    lse_padded, delta_padded = torch.empty((2, heads * padded_total), dtype=torch.float32, device=device)
    dq_sum = torch.empty(heads * padded_total * head_dim, dtype=torch.float32, device=device)
    turns = torch.empty(heads * padded_tiles, dtype=torch.int32, device=device)
    items, tiles = schedule(
        cu_k, cu_q, k.shape[0], BACKWARD_KEYS, BACKWARD_QUERIES, causal, backward=True, lightest=deterministic
    )
    key = _key(q, k, v, dout, out, dq, dk, dv)
    _launch_prepare(
        (padded_tiles, heads, 1), key and (*key, dlse is None),
        dout, out, lse, dlse, lse_padded, delta_padded, dq_sum, turns, cu_q, documents, total, padded_total,
        dout.stride(0), dout.stride(1), out.stride(0), out.stride(1), D=head_dim, ROWS=BACKWARD_QUERIES,
    )  # fmt: skip
    group = heads // kv_heads
    dk_parts, dv_parts = (dk, dv) if group == 1 else make_parts(k, heads)
    block = heads_in_cache(heads, total, head_dim, q.element_size())
    _launch_backward(
        (min(multiprocessors(device), tiles * heads), 1, 1), key and (*key, group == 1),
        _head_descriptor(q, BACKWARD_QUERIES), _head_descriptor(k, 64), _head_descriptor(v, 64),
        _head_descriptor(dout, BACKWARD_QUERIES),
        _descriptor(lse_padded, [heads * padded_total], [1], (BACKWARD_QUERIES,)),
        _descriptor(delta_padded, [heads * padded_total], [1], (BACKWARD_QUERIES,)),
        dk_parts, dv_parts, dq_sum, turns, items, tiles, heads, block, group,
        padded_total, scale, scale * LOG2E.value, q.stride(1), dout.stride(1), k.stride(1), v.stride(1),
        dk_parts.stride(0), dk_parts.stride(1), dv_parts.stride(0), dv_parts.stride(1),
        D=head_dim, CAUSAL=causal, STAGES=2, DETERMINISTIC=deterministic,
    )  # fmt: skip
    _launch_finish(
        (padded_tiles, heads, 1), key, dq_sum, dq, cu_q, documents, padded_total, scale, dq.stride(0), dq.stride(1),
        D=head_dim, ROWS=BACKWARD_QUERIES,
    )  # fmt: skip
    if group > 1:
        add_parts(dk_parts, dv_parts, dk, dv)
