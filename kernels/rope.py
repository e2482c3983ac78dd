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

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import reference
from .dispatch import Kernel, check, floating, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl


GRID_ROWS = 65535  # the second and third dimensions of a grid of programs take no more


class Cache(NamedTuple):
    """Where to write the rotated k and the v as well (`kv_cache.py` says what these are)."""

    k: Tensor
    v: Tensor
    slots: Tensor
    k_descale: Tensor | None
    v_descale: Tensor | None


@Kernel
def _kernel(
    x, positions, inverse_frequencies, rows, row_stride, heads, all_heads, sign,
    k_cache, v_cache, slots, k_descale, v_descale, page, k_block, k_slot, k_head, v_block, v_slot, v_head,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, CACHE: tl.constexpr, DESCALE: tl.constexpr,
):  # fmt: skip
    # The grid may have more rows than x. In 32 bits this is uniform arithmetic, which leaves a thread 32 registers.
    # In 64 bits, or with one program number divided by 2 or 4, it takes 36: 12 programs a multiprocessor, not 16.
    row = tl.program_id(2).to(tl.uint32) * tl.num_programs(1).to(tl.uint32) + tl.program_id(1).to(tl.uint32)
    row = row.to(tl.int64)
    if row >= rows:
        return
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, BLOCK)
    frequency = tl.load(inverse_frequencies + at, mask=at < HALF, other=0.0)
    position = tl.load(positions + row).to(tl.float32)
    a_at = x + row * row_stride + head * (2 * HALF) + at[None, :]
    b_at = a_at + HALF
    mask = (head < all_heads) & (at[None, :] < HALF)
    # On their way during the trigonometry; evict_last as in norm.py.
    a = tl.load(a_at, mask=mask, other=0.0, eviction_policy="evict_last")
    b = tl.load(b_at, mask=mask, other=0.0, eviction_policy="evict_last")
    angle = position * frequency
    # sin and cos of k pi/2 + r, |r| <= pi/4 (Cephes' sinf and cosf): pi/2 in three parts of which the first two times k
    # are exact. The library's way for angles beyond 10^5 would cost registers and a stack that no position needs.
    k = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - k * 1.5703125) - k * 4.837512969970703e-4) - k * 7.549789954891882e-8
    z = r * r
    sin_r = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    cos_r = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quadrant = k.to(tl.int32)
    swapped = (quadrant & 1) != 0
    sin = tl.where(swapped, cos_r, sin_r) * tl.where((quadrant & 2) != 0, -sign, sign)
    cos = tl.where(swapped, sin_r, cos_r) * tl.where(((quadrant + 1) & 2) != 0, -1.0, 1.0)
    cos, sin = cos[None, :], sin[None, :]
    turned_a = (a.to(tl.float32) * cos - b.to(tl.float32) * sin).to(a.dtype)
    turned_b = (b.to(tl.float32) * cos + a.to(tl.float32) * sin).to(b.dtype)
    turned = mask & (head < heads)
    tl.store(a_at, turned_a, mask=turned, eviction_policy="evict_last")
    tl.store(b_at, turned_b, mask=turned, eviction_policy="evict_last")
    if CACHE:  # all_heads is heads and the v heads then, and the k heads are the last of heads
        slot = tl.load(slots + row).to(tl.int64)
        block = slot // page
        slot = slot % page
        kv_heads = all_heads - heads
        is_k = mask & (head < heads) & (head >= heads - kv_heads) & (block >= 0) & (slot >= 0)
        is_v = mask & (head >= heads) & (block >= 0) & (slot >= 0)
        k_index = (head - (heads - kv_heads)).to(tl.int64)  # heads may lie far apart in a cache
        v_index = (head - heads).to(tl.int64)
        k_at = k_cache + block * k_block + slot * k_slot + k_index * k_head + at[None, :]
        v_at = v_cache + block * v_block + slot * v_slot + v_index * v_head + at[None, :]
        if DESCALE:
            k_factor = tl.load(k_descale + k_index, mask=(head < heads) & (k_index >= 0), other=1.0)
            v_factor = tl.load(v_descale + v_index, mask=(head >= heads) & (head < all_heads), other=1.0)
            turned_a = tl.clamp(turned_a.to(tl.float32) / k_factor, -448.0, 448.0, tl.PropagateNan.ALL)
            turned_b = tl.clamp(turned_b.to(tl.float32) / k_factor, -448.0, 448.0, tl.PropagateNan.ALL)
            a = tl.clamp(a.to(tl.float32) / v_factor, -448.0, 448.0, tl.PropagateNan.ALL)
            b = tl.clamp(b.to(tl.float32) / v_factor, -448.0, 448.0, tl.PropagateNan.ALL)
        tl.store(k_at, turned_a.to(k_cache.dtype.element_ty), mask=is_k)
        tl.store(k_at + HALF, turned_b.to(k_cache.dtype.element_ty), mask=is_k)
        tl.store(v_at, a.to(v_cache.dtype.element_ty), mask=is_v)
        tl.store(v_at + HALF, b.to(v_cache.dtype.element_ty), mask=is_v)


def launch(
    x: Tensor, positions: Tensor, inverse_frequencies: Tensor, heads: int, inverse: bool, cache: Cache | None = None
) -> None:
    """Rotates the first `heads` heads of x (total, columns) in place; with a cache, writes k and v there."""
    half = inverse_frequencies.shape[0]
    block = next_power_of_2(half)
    all_heads = heads + (cache.k.shape[2] if cache else 0)
    per_program = min(next_power_of_2(all_heads), max(1, 1024 // block))  # the angles are computed once for these heads
    k, v, slots, k_descale, v_descale = cache or (x, x, x, None, None)  # pointers that are not followed
    if x.shape[0]:
        down = min(x.shape[0], GRID_ROWS)
        # A row's programs run side by side: what lies together in memory is read and written together.
        _kernel[-(-all_heads // per_program), down, -(-x.shape[0] // down)](
            x, positions.contiguous(), inverse_frequencies, x.shape[0], x.stride(0), heads, all_heads,
            -1.0 if inverse else 1.0,
            k, v, slots, x if k_descale is None else k_descale, x if v_descale is None else v_descale,
            k.shape[1], *(k.stride()[:3] if cache else (0, 0, 0)), *(v.stride()[:3] if cache else (0, 0, 0)),
            HALF=half, BLOCK=block, HEADS=per_program, CACHE=cache is not None, DESCALE=k_descale is not None,
            num_warps=min(16, max(1, per_program * block // 256)),
        )  # fmt: skip


def _unsupported(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "the Triton kernels do not compute in float64"
    return "rows must be contiguous to be rotated in place" if x.stride(1) != 1 else None


_frequencies: dict[tuple[int, float, float, torch.device], Tensor] = {}  # never dropped: graphs hold their addresses


def _make_frequencies(head_dim: int, theta: float, factor: float, device: torch.device) -> Tensor:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / (theta**exponent) / factor


def inverse_frequencies(head_dim: int, theta: float, factor: float, device: torch.device) -> Tensor:
    """theta^(-2 i / head_dim) / factor, fp32 (head_dim / 2,), rounded step by step as transformers does."""
    key = head_dim, theta, factor, device
    if key in _frequencies:
        return _frequencies[key]
    made = _make_frequencies(*key)
    # What is made in a CUDA graph holds nothing before the graph runs, and must not be kept for others.
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _frequencies[key] = made
    return made


@torch.library.custom_op("deepseek_coder::rope_", mutates_args={"x"})
def _rope_(x: Tensor, positions: Tensor, heads: int, head_dim: int, theta: float, factor: float, inverse: bool) -> None:
    """Rotates the first `heads` heads of x (total, columns), backwards if `inverse`."""
    frequencies = inverse_frequencies(head_dim, theta, factor, x.device)
    if use_triton(x, _unsupported(x)):
        launch(x, positions, frequencies, heads, inverse)
    else:
        reference.rope_(x, positions, frequencies, heads, inverse)


@_rope_.register_fake
def _(x: Tensor, positions: Tensor, heads: int, head_dim: int, theta: float, factor: float, inverse: bool) -> None:
    return None


@torch.library.custom_op("deepseek_coder::rope", mutates_args=())
def _rope(
    x: Tensor, positions: Tensor, heads: int, head_dim: int, theta: float, factor: float, inverse: bool
) -> Tensor:
    """The same on a copy of x."""
    out = x.clone(memory_format=torch.contiguous_format)
    _rope_(out, positions, heads, head_dim, theta, factor, inverse)
    return out


@_rope.register_fake
def _(x: Tensor, positions: Tensor, heads: int, head_dim: int, theta: float, factor: float, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, positions, *ctx.constants, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _backward(ctx, gradient):
    return _rope(gradient, *ctx.saved_tensors, *ctx.constants, not ctx.inverse), *[None] * 6


_rope.register_autograd(_backward, setup_context=_setup)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, positions, *constants):
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(positions)
        ctx.constants = constants
        _rope_(qkv, positions, *constants, False)
        return qkv

    @staticmethod
    def backward(ctx, gradient):
        return _rope(gradient, *ctx.saved_tensors, *ctx.constants, True), *[None] * 5


def positions_in_documents(cu_seqlens: Tensor, total: int) -> Tensor:
    """Where each of `total` packed tokens stands in its document, int64 (total,); cu_seqlens (documents + 1,) ends at
    `total`. The device is not waited for."""
    token = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return token - cu_seqlens[document]


def check_arguments(name: str, qkv: Tensor, positions: Tensor, num_heads: int, num_kv_heads: int) -> None:
    heads = num_heads + 2 * num_kv_heads
    fits = qkv.dim() == 2 and qkv.shape[1] % heads == 0 and (qkv.shape[1] // heads) % 2 == 0
    check(fits, lambda: f"{name}: qkv {tuple(qkv.shape)} is not (total, {heads} heads * an even head_dim)")
    check(floating(qkv), lambda: f"{name}: qkv must be floating point of 16 bits or more, not {qkv.dtype}")
    fits = positions.shape == qkv.shape[:1] and positions.dtype in (torch.int32, torch.int64)
    check(fits, lambda: f"{name}: positions must be int32 or int64 ({qkv.shape[0]},), not {tuple(positions.shape)}")
    check(positions.device == qkv.device, lambda: f"{name}: positions on {positions.device}, qkv on {qkv.device}")


def apply_rope(
    qkv: Tensor,
    positions: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    theta: float,
    factor: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rotates the q and k heads of qkv in place and returns qkv.

    qkv (total, (num_heads + 2 num_kv_heads) * head_dim), rows [all q; all k; all v]; positions (total,) integers, or
    None and instead the documents' cu_seqlens, int32 (documents + 1,) up to the total; half-split pairs; linear scaling
    by `factor` at every length (Chen et al., arXiv 2306.15595, section 3.2). Angles, cosines and sines are fp32.
    Differentiable, also under torch.compile; as with every in-place op, a leaf that requires a gradient is refused.

    ValueError when shapes, dtypes or devices do not fit.
    """
    check((positions is None) != (cu_seqlens is None), lambda: "apply_rope: give positions or cu_seqlens, one of them")
    if cu_seqlens is not None:
        fits = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 1 and cu_seqlens.dtype == torch.int32
        check(fits, lambda: f"apply_rope: cu_seqlens {tuple(cu_seqlens.shape)} is not int32 (documents + 1,)")
        positions = positions_in_documents(cu_seqlens, qkv.shape[0])
    assert positions is not None
    check_arguments("apply_rope", qkv, positions, num_heads, num_kv_heads)
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    constants = num_heads + num_kv_heads, head_dim, float(theta), float(factor)
    if torch.compiler.is_compiling():
        return qkv.copy_(_rope(qkv, positions, *constants, False))
    return _Rope.apply(qkv, positions, *constants)
