"""SwiGLU: y = silu(gate) * up, where gate and up are the halves of one row and silu(x) = x * sigmoid(x).

Backward, with s = sigmoid(gate):

    dgate = dy * up * s * (1 + gate * (1 - s))
    dup = dy * gate * s

Both passes compute in fp32 and round once. The backward reads gate and up again instead of keeping silu(gate): the op
is bound by memory, and the exponential is free. All accesses are `evict_last`, as in norm.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .dispatch import Kernel, check, floating, use_triton

if TYPE_CHECKING:
    import triton.language as tl


def _blocks(columns: int) -> tuple[int, int]:
    """Columns of a program, and programs of a row: as few idle columns as possible, then as few programs.

    A row's programs run side by side: what lies together in memory is read and written together."""
    block = max((2048, 4096), key=lambda block: (-(-(-columns // block) * block), block))
    return block, -(-columns // block)


@Kernel
def _forward_kernel(gate_up, y, row_stride, columns, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    at = tl.program_id(0) % PARTS * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    source = gate_up + row * row_stride + at
    gate = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    up = tl.load(source + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    result = (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty)
    tl.store(y + row * columns + at, result, mask=mask, eviction_policy="evict_last")


@Kernel
def _backward_kernel(dy, gate_up, dgate_up, row_stride, columns, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    at = tl.program_id(0) % PARTS * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    source = gate_up + row * row_stride + at
    gate = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    up = tl.load(source + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    d = tl.load(dy + row * columns + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    s = tl.sigmoid(gate)
    out = dgate_up + row * 2 * columns + at
    dgate = (d * up * s * (1.0 + gate * (1.0 - s))).to(dgate_up.dtype.element_ty)
    dup = (d * gate * s).to(dgate_up.dtype.element_ty)
    tl.store(out, dgate, mask=mask, eviction_policy="evict_last")
    tl.store(out + columns, dup, mask=mask, eviction_policy="evict_last")


def _unsupported(x: Tensor) -> str | None:
    return "the Triton kernels do not compute in float64" if x.dtype == torch.float64 else None


@torch.library.custom_op("deepseek_coder::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    if not use_triton(gate_up, _unsupported(gate_up)):
        return reference.swiglu(gate_up).contiguous()
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    y = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        block, parts = _blocks(columns)
        _forward_kernel[(parts * rows,)](
            gate_up, y, gate_up.stride(0), columns, PARTS=parts, BLOCK=block, num_warps=block // 256
        )
    return y


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("deepseek_coder::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    if not use_triton(gate_up, _unsupported(gate_up)):
        return reference.swiglu_backward(dy, gate_up)
    rows, columns = dy.shape
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    dgate_up = torch.empty((rows, 2 * columns), dtype=gate_up.dtype, device=gate_up.device)
    if dy.numel():
        block, parts = _blocks(columns)
        _backward_kernel[(parts * rows,)](
            dy.contiguous(), gate_up, dgate_up, gate_up.stride(0), columns,
            PARTS=parts, BLOCK=block, num_warps=block // 256,
        )  # fmt: skip
    return dgate_up


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: gate_up (..., 2 F), columns [gate; up] -> (..., F).

    Computed in fp32, but the reference's silu is rounded, as Llama's is. Differentiable once, in reverse mode.

    ValueError unless the last dimension is even and not 0, and the dtype floating point of 16 bits or more.
    """
    check(floating(gate_up), lambda: f"swiglu: gate_up must be floating point of 16 bits or more, not {gate_up.dtype}")
    fits = gate_up.dim() > 0 and gate_up.shape[-1] > 0 and gate_up.shape[-1] % 2 == 0
    check(fits, lambda: f"swiglu: odd last dimension, or 0, in {tuple(gate_up.shape)}")
    y = _swiglu(gate_up.reshape(-1, gate_up.shape[-1]))
    return y.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
