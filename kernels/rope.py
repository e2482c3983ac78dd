"""Rotary position embedding, in place on the fused projection.

    angle(p, i) = p * f(i),    f(i) = theta^(-2 i / head_dim) / factor,    i = 0 ... head_dim / 2 - 1
    (a_i, b_i) -> (a_i cos - b_i sin, b_i cos + a_i sin)      a = first half of a head, b = second half

A row of qkv is [all q heads; all k heads; all v heads]; the q and k heads are adjacent, so they are one run of heads,
and v is left alone. A rotation's inverse is the rotation by -angle, and the gradient of a rotation is the inverse
rotation of the gradient: the backward needs nothing but the positions.

The hard part is autograd of an op that writes its input. `register_autograd` refuses mutating ops, and a mutating op
without it passes gradients through as if it were the identity, silently. So the mutating custom op (opaque to
autograd) stands inside an `autograd.Function` that declares the write with `mark_dirty`. That is right in eager code
only: compiled by torch 2.11, callers who go on with the argument instead of the result get unrotated gradients, and
torch 2.13 refuses to trace `mark_dirty` where no gradient is wanted. Compiled code therefore calls an op that rotates a
copy, and writes the result back with `copy_`, which every version understands, and which the compiler removes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .dispatch import Kernel, check, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl


@Kernel
def _kernel(
    x, positions, inverse_frequencies, row_stride, heads, sign, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    frequency = tl.load(inverse_frequencies + at, mask=at < HALF, other=0.0)
    angle = tl.load(positions + row).to(tl.float32) * frequency
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :] * sign
    a_at = x + row * row_stride + head[:, None] * (2 * HALF) + at[None, :]
    b_at = a_at + HALF
    mask = (head[:, None] < heads) & (at[None, :] < HALF)
    a = tl.load(a_at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_at, (a * cos - b * sin).to(x.dtype.element_ty), mask=mask)
    tl.store(b_at, (b * cos + a * sin).to(x.dtype.element_ty), mask=mask)


def _unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "the Triton kernels do not compute in float64"
    return "rows must be contiguous to be rotated in place" if x.stride(1) != 1 else None


@torch.library.custom_op("deepseek_coder::rope_", mutates_args={"x"})
def _rope_(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, heads: int, inverse: bool) -> None:
    """Rotates the first `heads` heads of x (total, columns), backwards if `inverse`."""
    if not use_triton(x, _unsupported(x)):
        reference.rope_(x, positions, inverse_frequencies, heads, inverse)
    elif x.shape[0]:
        half = inverse_frequencies.shape[0]
        block = next_power_of_2(half)
        per_program = min(next_power_of_2(heads), max(1, 2048 // block))
        _kernel[(x.shape[0], -(-heads // per_program))](
            x, positions.contiguous(), inverse_frequencies, x.stride(0), heads, -1.0 if inverse else 1.0,
            HALF=half, BLOCK=block, HEADS=per_program, num_warps=4,
        )  # fmt: skip


@_rope_.register_fake
def _(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, heads: int, inverse: bool) -> None:
    return None


@torch.library.custom_op("deepseek_coder::rope", mutates_args=())
def _rope(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, heads: int, inverse: bool) -> Tensor:
    """The same on a copy of x."""
    out = x.clone(memory_format=torch.contiguous_format)
    _rope_(out, positions, inverse_frequencies, heads, inverse)
    return out


@_rope.register_fake
def _(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, heads: int, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, positions, inverse_frequencies, ctx.heads, ctx.inverse = inputs
    ctx.save_for_backward(positions, inverse_frequencies)


def _backward(ctx, gradient):
    return _rope(gradient, *ctx.saved_tensors, ctx.heads, not ctx.inverse), None, None, None, None


_rope.register_autograd(_backward, setup_context=_setup)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, positions, inverse_frequencies, heads):
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(positions, inverse_frequencies)
        ctx.heads = heads
        _rope_(qkv, positions, inverse_frequencies, heads, False)
        return qkv

    @staticmethod
    def backward(ctx, gradient):
        return _rope(gradient, *ctx.saved_tensors, ctx.heads, True), None, None, None


def inverse_frequencies(head_dim: int, theta: float, factor: float, device: torch.device) -> Tensor:
    """theta^(-2 i / head_dim) / factor, fp32 (head_dim / 2,), rounded step by step as transformers does."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / (theta**exponent) / factor


def apply_rope(
    qkv: Tensor, positions: Tensor, num_heads: int, num_kv_heads: int, theta: float, factor: float
) -> Tensor:
    """Rotates the q and k heads of qkv in place and returns qkv.

    qkv (total, (num_heads + 2 num_kv_heads) * head_dim), rows [all q; all k; all v]; positions (total,) integers;
    half-split pairs; linear scaling by `factor` at every length (Chen et al., arXiv 2306.15595, section 3.2). Angles,
    cosines and sines are fp32. Differentiable, also under torch.compile; as with every in-place op, a leaf that
    requires a gradient is refused.

    ValueError when shapes, dtypes or devices do not fit.
    """
    heads = num_heads + 2 * num_kv_heads
    fits = qkv.dim() == 2 and qkv.shape[1] % heads == 0 and (qkv.shape[1] // heads) % 2 == 0
    check(fits, lambda: f"apply_rope: qkv {tuple(qkv.shape)} is not (total, {heads} heads * an even head_dim)")
    check(qkv.is_floating_point(), lambda: f"apply_rope: qkv must be floating point, not {qkv.dtype}")
    fits = positions.shape == qkv.shape[:1] and positions.dtype in (torch.int32, torch.int64)
    check(fits, lambda: f"apply_rope: positions must be int32 or int64 ({qkv.shape[0]},), not {tuple(positions.shape)}")
    check(positions.device == qkv.device, lambda: f"apply_rope: positions on {positions.device}, qkv on {qkv.device}")
    frequencies = inverse_frequencies(qkv.shape[1] // heads, theta, factor, qkv.device)
    if torch.compiler.is_compiling():
        return qkv.copy_(_rope(qkv, positions, frequencies, num_heads + num_kv_heads, False))
    return _Rope.apply(qkv, positions, frequencies, num_heads + num_kv_heads)
