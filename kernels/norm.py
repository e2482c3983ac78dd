"""RMSNorm, with the residual addition before it.

    h = x + residual                        (only when residual is given; rounded to x.dtype)
    rstd = 1 / sqrt(mean(h^2) + eps)        fp32
    y = weight * round(h * rstd)            round: to x.dtype, as transformers' Llama does

Backward, with n = h * rstd and g = dy * weight:

    dh = rstd * (g - n * mean(g * n)) + dsum        dsum: gradient of the returned sum
    dweight = sum over rows of dy * round(n)

The hard part is dweight: a sum over rows where rows are the parallel dimension. Atomics would make its last bits depend
on the order of arrival, so each program walks its own rows, keeps its sum in registers, and writes one row of a small
fp32 matrix that a second kernel sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .dispatch import Kernel, check, early_launch, floating, next_power_of_2, shared_memory, use_triton

if TYPE_CHECKING:
    import triton.language as tl

MULTIPROCESSORS = 132  # an H200's; a constant, so that sums do not vary
ROWS_BYTES = 192 * 1024  # of rows that are waited for, at most, in a multiprocessor's shared memory (Hopper: 227 KB)
FINISH_COLUMNS = 16  # 64 bytes a row: as many programs as there are multiprocessors for 2048 columns


@Kernel
def _forward_kernel(
    x, residual, weight, y, total, rstd, x_stride, residual_stride, columns, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    # What an op writes, the next one reads: evict_last keeps it in the L2 cache. With it on all of a row's accesses a
    # pass takes 2 to 5 % less time; on loads or stores alone it gains less at 4096 and 7168 columns.
    source = x + row * x_stride + at
    h = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if HAS_RESIDUAL:
        source = residual + row * residual_stride + at
        h += tl.load(source, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        h = h.to(total.dtype.element_ty)
        tl.store(total + row * columns + at, h, mask=mask, eviction_policy="evict_last")
        h = h.to(tl.float32)
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    # eps reaches a compiled graph as fp64 and would promote all of this
    scale = 1.0 / tl.sqrt_rn(tl.sum(h * h, axis=0) / columns + tl.cast(eps, tl.float32))
    tl.store(rstd + row, scale)
    normed = (h * scale).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * columns + at, (normed * w).to(y.dtype.element_ty), mask=mask, eviction_policy="evict_last")


@Kernel
def _backward_kernel(
    dy, dsum, x, weight, rstd, dx, partial, rows, x_stride, columns,
    HAS_DSUM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.arange(0, BLOCK)
    mask = at < columns
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    scale = tl.load(rstd + tl.program_id(0))
    # The next rows are on their way while this one is reduced: loading, reducing and storing in turn would leave the
    # memory idle half of the time.
    for i in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(i, tl.int64)
        next_scale = tl.load(rstd + tl.minimum(i + tl.num_programs(0), rows - 1))
        n = tl.load(x + row * x_stride + at, mask=mask, other=0.0).to(tl.float32) * scale
        d = tl.load(dy + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        dw += d * n.to(dx.dtype.element_ty).to(tl.float32)
        g = d * w
        result = scale * (g - n * (tl.sum(g * n, axis=0) / columns))
        if HAS_DSUM:
            result += tl.load(dsum + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * columns + at, result.to(dx.dtype.element_ty), mask=mask, eviction_policy="evict_last")
        scale = next_scale
    tl.store(partial + tl.program_id(0).to(tl.int64) * columns + at, dw, mask=mask)


@Kernel
def _finish_kernel(
    partial, dweight, programs, columns,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """dweight (columns,) = the sum over the rows of partial (programs, columns), PROGRAMS at most."""
    if EARLY:  # launched while these are still being computed
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, PROGRAMS, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + row * columns + at, mask=(row < programs) & (at < columns), other=0.0)
    out = tl.sum(total, axis=0)[None, :]
    tl.store(dweight + at, out.to(dweight.dtype.element_ty), mask=at < columns)


def _warps(block: int) -> int:
    return min(max(1, block // 512), 8 if block <= 8192 else 16)


def _unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "the Triton kernels do not compute in float64"
    return "a row of more than 65536 elements does not fit one program" if x.shape[1] > 65536 else None


@torch.library.custom_op("deepseek_coder::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (rows, columns), rstd (rows,) fp32, and x + residual, empty without a residual."""
    if not use_triton(x, _unsupported(x)):
        total = x.new_empty(0) if residual is None else x + residual
        y, rstd = reference.rms_norm(x if residual is None else total, weight, eps)
        return y.contiguous(), rstd, total.contiguous()
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    total = torch.empty((rows, columns) if residual is not None else (0,), dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = next_power_of_2(columns)
        _forward_kernel[(rows,)](
            x, x if residual is None else residual, weight.contiguous(), y, total, rstd,
            x.stride(0), 0 if residual is None else residual.stride(0), columns, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return y, rstd, total


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[0], dtype=reference.wide(x.dtype))
    return x.new_empty(x.shape), rstd, x.new_empty(x.shape if residual is not None else (0,))


@torch.library.custom_op("deepseek_coder::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    if not use_triton(x, _unsupported(x)):
        dx, dweight = reference.rms_norm_backward(dy, dsum, x, weight, rstd)
        return dx.contiguous(), dweight
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    dx = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if rows == 0:
        return dx, torch.zeros_like(weight)
    block = next_power_of_2(columns)
    together = min(4, max(1, 8192 // block))  # programs of a multiprocessor
    most = MULTIPROCESSORS * together
    programs = min(rows, most)
    partial = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    dweight = torch.empty(columns, dtype=weight.dtype, device=x.device)
    early = early_launch(x.device)
    row_bytes = block * x.element_size() * (2 if dsum is None else 3)
    rows_bytes = max(0, min(ROWS_BYTES, shared_memory(x.device) - 4096))  # the reductions take some
    stages = min(4, 1 + rows_bytes // together // row_bytes)  # one row less than that is on its way
    _backward_kernel[(programs,)](
        dy.contiguous(), dy if dsum is None else dsum.contiguous(), x, weight.contiguous(), rstd, dx, partial,
        rows, x.stride(0), columns, HAS_DSUM=dsum is not None, BLOCK=block, STAGES=stages, EARLY=early,
        num_warps=_warps(block),
    )  # fmt: skip
    _finish_kernel[(-(-columns // FINISH_COLUMNS),)](
        partial, dweight, programs, columns, PROGRAMS=most, ROWS=64, COLUMNS=FINISH_COLUMNS, EARLY=early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return dx, dweight


@_rms_norm_backward.register_fake
def _(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, rstd, total = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, weight, rstd)
    ctx.set_materialize_grads(False)  # nobody has a gradient for rstd: zeros for it would cost a launch


def _backward(ctx, dy, _drstd, dtotal):
    x, weight, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight = _rms_norm_backward(dy, dtotal if ctx.has_residual else None, x, weight, rstd)
    return dx, dweight, None, dx if ctx.has_residual else None


_rms_norm.register_autograd(_backward, setup_context=_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension; with a residual, of x + residual.

    x, residual (..., columns), weight (columns,): one dtype and device. Statistics in fp32; the normalised value is
    rounded to x.dtype before the product with weight, as in transformers' Llama. Differentiable once, in reverse mode;
    the weight's gradient is summed in fp32 in a fixed order.

    Returns y, or (y, x + residual) when a residual is given. ValueError when shapes, dtypes or devices do not fit.
    """
    fits = x.dim() > 0 and x.shape[-1] > 0 and weight.shape == x.shape[-1:]
    check(fits, lambda: f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    check(floating(x), lambda: f"rms_norm: x must be floating point of 16 bits or more, not {x.dtype}")
    same = weight.dtype == x.dtype and weight.device == x.device
    check(same, lambda: f"rms_norm: x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}")
    rows = x.reshape(-1, x.shape[-1])
    if residual is None:
        return _rms_norm(rows, weight, eps, None)[0].view(x.shape)
    same = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
    check(
        same,
        lambda: (
            f"rms_norm: residual {tuple(residual.shape)} {residual.dtype} on {residual.device} "
            f"must be like x {tuple(x.shape)} {x.dtype} on {x.device}"
        ),
    )
    y, _, total = _rms_norm(rows, weight, eps, residual.reshape(rows.shape))
    return y.view(x.shape), total.view(x.shape)
