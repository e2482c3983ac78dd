"""Exact attention over packed documents: the public functions, the custom ops, their autograd.

Everything is packed attention. Sequences lie one after another in (total, heads, head_dim), and cu_seqlens, int32
(documents + 1,), says where each begins and ends; a batch of equal lengths is a packing with equal steps. The fused
projection (total, (heads + 2 kv_heads) * head_dim) is three strided views of one tensor. Autograd forbids an op that
returns gradients aliasing each other, and three separate gradients would have to be copied together, so the fused form
has an op of its own, whose backward fills the three views of a single dqkv.

With S = scale Q K^T and lse = log sum exp(S), every backend keeps (out, lse), and can run any other's backward.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import reference
from ..dispatch import check, custom_op, floating, use_hopper, use_triton

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func"]


def _implementation(q: Tensor, k: Tensor, scale: float) -> Any:
    """The module that runs these inputs: reference, portable and hopper have the same two functions."""
    unsupported = None
    if q.shape[2] not in (16, 32, 64, 128):
        unsupported = f"the Triton attention has head_dim 16, 32, 64 and 128, not {q.shape[2]}"
    elif q.dtype == torch.float64:
        unsupported = "the Triton kernels do not compute in float64"
    if not use_triton(q, unsupported):
        return reference
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] not in (64, 128) or scale <= 0:
        unsupported = (
            "the Hopper attention has fp16 and bf16, head_dim 64 and 128, and positive scales, "
            f"not {q.dtype}, {q.shape[2]} and {scale}"
        )
    empty = q.shape[0] == 0 or k.shape[0] == 0  # nothing to describe to the copy engine
    if not empty and use_hopper(q, unsupported):
        from . import hopper

        return hopper
    from . import portable

    return portable


def _rows(x: Tensor) -> Tensor:
    """x, or a copy, with contiguous rows: the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


@custom_op("attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out (total_q, heads, head_dim), lse (heads, total_q) fp32. deterministic: of the backward."""
    return _implementation(q, k, scale).attention(
        _rows(q), _rows(k), _rows(v), cu_seqlens_q, cu_seqlens_k, scale, causal
    )


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=reference.wide(q.dtype))


@custom_op("attention_backward")
def _attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _implementation(q, k, scale).attention_backward(
        dout.contiguous(), None if dlse is None else dlse.contiguous(), _rows(q), _rows(k), _rows(v), out, lse,
        cu_seqlens_q, cu_seqlens_k, scale, causal, deterministic, dq, dk, dv,
    )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.causal, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # lse seldom has a gradient: zeros for it would cost a launch


def _backward(ctx, dout, dlse):
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = _attention_backward(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.causal, ctx.deterministic
    )  # fmt: skip
    return (*gradients, None, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_setup)


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the fused tensor (total, (heads + 2 kv_heads) * head_dim) as q, k, v (total, heads, head_dim)."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


@custom_op("attention_qkvpacked")
def _attention_qkvpacked(
    qkv: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int, scale: float, causal: bool, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """-> out (total, heads * head_dim), lse (heads, total) fp32."""
    q, k, v = _split(_rows(qkv), heads, kv_heads)
    out, lse = _implementation(q, k, scale).attention(q, k, v, cu_seqlens, cu_seqlens, scale, causal)
    return out.flatten(1), lse


@_attention_qkvpacked.register_fake
def _(
    qkv: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int, scale: float, causal: bool, deterministic: bool
) -> tuple[Tensor, Tensor]:
    columns = qkv.shape[1] // (heads + 2 * kv_heads) * heads
    return qkv.new_empty(qkv.shape[0], columns), qkv.new_empty((heads, qkv.shape[0]), dtype=reference.wide(qkv.dtype))


@custom_op("attention_qkvpacked_backward")
def _attention_qkvpacked_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    heads: int, kv_heads: int, scale: float, causal: bool, deterministic: bool,
) -> Tensor:  # fmt: skip
    q, k, v = _split(_rows(qkv), heads, kv_heads)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _implementation(q, k, scale).attention_backward(
        dout.contiguous().view(q.shape), None, q, k, v, out.view(q.shape), lse,
        cu_seqlens, cu_seqlens, scale, causal, deterministic, *_split(dqkv, heads, kv_heads),
    )  # fmt: skip
    return dqkv


@_attention_qkvpacked_backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    heads: int, kv_heads: int, scale: float, causal: bool, deterministic: bool,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _setup_qkvpacked(ctx, inputs, output):
    qkv, cu_seqlens, *ctx.constants = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward_qkvpacked(ctx, dout, _dlse):  # lse is not handed out, so nothing flows back into it
    return _attention_qkvpacked_backward(dout, *ctx.saved_tensors, *ctx.constants), *[None] * 6


_attention_qkvpacked.register_autograd(_backward_qkvpacked, setup_context=_setup_qkvpacked)


def _check_tensors(name: str, dim: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    def shapes() -> str:
        return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"

    fits = q.dim() == dim and k.dim() == dim and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    check(fits, lambda: f"{name}: {shapes()} do not fit each other")
    fits = k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0
    check(fits, lambda: f"{name}: kv heads do not divide heads in {shapes()}")
    same = q.dtype == k.dtype == v.dtype and floating(q)
    check(
        same,
        lambda: (
            f"{name}: q, k, v need one floating point dtype of 16 bits or more, not {q.dtype}, {k.dtype}, {v.dtype}"
        ),
    )
    same = q.device == k.device == v.device
    check(same, lambda: f"{name}: q, k, v are on {q.device}, {k.device}, {v.device}")


def _check_lengths(name: str, x: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    fits = cu_q.dim() == 1 and cu_q.shape[0] > 1 and cu_q.shape == cu_k.shape
    check(fits, lambda: f"{name}: cu_seqlens {tuple(cu_q.shape)} and {tuple(cu_k.shape)} must be (documents + 1,) both")
    same = cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.device == cu_k.device == x.device
    check(
        same,
        lambda: f"{name}: cu_seqlens must be int32 on {x.device}, not {cu_q.dtype}, {cu_k.dtype} on {cu_q.device}",
    )


def _make_steps(batch: int, length: int, device: torch.device) -> Tensor:
    if length == 0:
        return torch.zeros(batch + 1, dtype=torch.int32, device=device)
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def _kept_steps(batch: int, length: int, device: torch.device, _stream: int) -> Tensor:
    """For one stream: the memory of one that is given up goes to what follows on the stream that read it."""
    with torch.inference_mode(False):  # for every use
        return _make_steps(batch, length, device)


def _steps(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens of `batch` documents of one length; kept, since making them takes a launch."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or device.type != "cuda":
        return _make_steps(batch, length, device)
    if torch.cuda.is_current_stream_capturing():  # a graph holds addresses for longer than these are kept
        return _make_steps(batch, length, device)
    return _kept_steps(batch, length, device, torch.cuda.current_stream(device).cuda_stream)


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if softmax_scale is None else softmax_scale


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale Q K^T) V within each document of a packed batch; FlashAttention's varlen conventions.

    q (total_q, heads, head_dim), k and v (total_k, kv_heads, head_dim): fp16, bf16 or fp32 of any strides; heads a
    multiple of kv_heads (query head h reads key head h * kv_heads // heads). cu_seqlens_*: int32 (documents + 1,), from
    0 up to the total; repeated values are empty documents. Causal is aligned to the bottom right: query i of n sees key
    j of m when j <= i + m - n. Rows that see no key give zeros (lse -inf). Scale: head_dim^-0.5 unless given.
    `max_seqlen_*` are accepted for compatibility: no launch depends on them, None costs nothing. deterministic: the
    backward gives the same bits each time; on Hopper it is somewhat slower then, elsewhere it is so unasked.

    Returns out like q; with return_lse also lse (heads, total_q) fp32, natural logarithm, differentiable as well.
    ValueError when shapes, dtypes or devices do not fit.
    """
    _check_tensors("flash_attn_varlen_func", 3, q, k, v)
    _check_lengths("flash_attn_varlen_func", q, cu_seqlens_q, cu_seqlens_k)
    out, lse = _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, _scale(softmax_scale, q.shape[-1]), causal, deterministic
    )
    return (out, lse) if return_lse else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_varlen_func for a batch of equal lengths.

    q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, kv_heads, head_dim). Returns out like q; with
    return_lse also lse (batch, heads, seqlen_q) fp32. ValueError when shapes, dtypes or devices do not fit.
    """
    _check_tensors("flash_attn_func", 4, q, k, v)
    check(
        q.shape[0] == k.shape[0],
        lambda: f"flash_attn_func: batches of {q.shape[0]} and {k.shape[0]} do not fit each other",
    )
    batch, queries, heads, head_dim = q.shape
    cu_seqlens_q = _steps(batch, queries, q.device)
    cu_seqlens_k = cu_seqlens_q if k.shape[1] == queries else _steps(batch, k.shape[1], q.device)
    out, lse = _attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q, cu_seqlens_k,
        _scale(softmax_scale, head_dim), causal, deterministic,
    )  # fmt: skip
    out = out.view(q.shape)
    return (out, lse.view(heads, batch, queries).transpose(0, 1)) if return_lse else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """flash_attn_varlen_func on the fused projection, which is read in place and gets one gradient.

    qkv (total, (num_heads + 2 num_kv_heads) * head_dim), each row [all q; all k; all v]. Returns (total, num_heads *
    head_dim). Other arguments and errors as in flash_attn_varlen_func.
    """
    heads = num_heads + 2 * num_kv_heads
    fits = qkv.dim() == 2 and num_kv_heads > 0 and num_heads % num_kv_heads == 0 and qkv.shape[1] % heads == 0
    name = "flash_attn_varlen_qkvpacked_func"
    check(fits, lambda: f"{name}: qkv {tuple(qkv.shape)} does not hold {num_heads} q and {num_kv_heads} k and v heads")
    check(floating(qkv), lambda: f"{name}: qkv must be floating point of 16 bits or more, not {qkv.dtype}")
    _check_lengths(name, qkv, cu_seqlens, cu_seqlens)
    scale = _scale(softmax_scale, qkv.shape[1] // heads)
    return _attention_qkvpacked(qkv, cu_seqlens, num_heads, num_kv_heads, scale, causal, deterministic)[0]
