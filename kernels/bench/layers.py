"""RMSNorm, RoPE and SwiGLU, forward and backward, beside torch, torch.compile, Liger and quack.

A pass is charged for each byte that it must read or write once: of bf16 elements, an RMSNorm forward moves 2 a column
(4 with the residual addition), its backward 3 (4), RoPE 2 for each element of q and k, SwiGLU 3 forward and 5 backward.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import kernels

from . import compare
from .compare import OURS, Case, Function, copy_of

TOKENS, WIDTHS, HEAD_DIM, EPS, THETA, FACTOR = 16384, (2048, 4096, 7168), 128, 1e-6, 1e5, 4.0


Maker = Callable[[], Callable[..., Any]]  # makes a provider's function of the inputs


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()  # past the limit of recompilations it would run uncompiled, and be measured so
    torch._functorch.config.donated_buffer = False  # the backward is timed many times
    return torch.compile(function, dynamic=False)


def pair(
    name: str, makers: dict[str, Maker], plain: Callable[..., Any], inputs: tuple[Tensor, ...],
    forward_bytes: float, backward_bytes: float, halves: str = "",
) -> Iterator[Case]:  # fmt: skip
    """The forward and the backward case of functions of `inputs` that return a tensor or several. The provider called
    `halves` takes the halves of the only input's rows as two tensors instead, and gives two gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def leaves_of(provider: str) -> list[Tensor]:
        if provider != halves:
            return leaves
        return [half.detach().contiguous().requires_grad_() for half in leaves[0].chunk(2, -1)]

    def outputs(function: Callable[..., Any], arguments: list[Tensor]) -> list[Tensor]:
        result = function(*arguments)
        return [result] if isinstance(result, Tensor) else list(result)

    shapes = outputs(plain, leaves)
    upstream = [torch.randn_like(y) for y in shapes]

    def forward(provider: str, make: Maker) -> Callable[[], Function]:
        def build() -> Function:
            function, arguments = make(), leaves_of(provider)

            def call() -> list[Tensor]:
                with torch.no_grad():
                    return outputs(function, arguments)

            return call

        return build

    def backward(provider: str, make: Maker) -> Callable[[], Function]:
        def build() -> Function:
            arguments = leaves_of(provider)
            results = outputs(make(), arguments)
            return lambda: in_halves(torch.autograd.grad(results, arguments, upstream, retain_graph=True))

        return build

    def in_halves(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        return gradients[0].chunk(2, -1) if halves and len(gradients) == 1 else gradients

    def exact_gradients() -> Sequence[Tensor]:
        wide = [x.detach().float().requires_grad_() for x in leaves]
        return in_halves(torch.autograd.grad(outputs(plain, wide), wide, [g.float() for g in upstream]))

    yield Case(
        f"{name}, forward", {key: forward(key, make) for key, make in makers.items()}, copy_of(forward_bytes),
        forward_bytes, lambda: outputs(plain, [x.detach().float() for x in leaves]),
    )  # fmt: skip
    yield Case(
        f"{name}, backward", {key: backward(key, make) for key, make in makers.items()}, copy_of(backward_bytes),
        backward_bytes, exact_gradients,
    )  # fmt: skip


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def plain_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    wide = total.float()
    y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return y if residual is None else (y, total)


def liger_norm() -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)

    return norm


def quack_norm() -> Callable[..., Any]:
    from quack.rmsnorm import rmsnorm

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rmsnorm(x, weight, eps=EPS)
        return rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)[:2]

    return norm


def our_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    return kernels.rms_norm(x, weight, EPS, residual)


def norm_cases() -> Iterator[Case]:
    makers: dict[str, Maker] = {
        OURS: lambda: our_norm,
        "torch": lambda: plain_norm,
        "torch.compile": lambda: compiled(plain_norm),
        "Liger": liger_norm,
        "quack": quack_norm,
    }
    for width in WIDTHS:
        x, weight, residual = random(TOKENS, width), random(width), random(TOKENS, width)
        element = 2 * TOKENS * width
        yield from pair(f"{width}", makers, plain_norm, (x, weight), 2 * element, 3 * element)
        yield from pair(f"{width}, residual", makers, plain_norm, (x, weight, residual), 4 * element, 4 * element)


# ---- RoPE ------------------------------------------------------------------------------------------------------------


def rope_cases() -> Iterator[Case]:
    """In place, on q and k of the fused projection; Liger on q and k of its own layout, each contiguous."""
    frequencies = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, device="cuda").float() / HEAD_DIM) / FACTOR
    positions = torch.arange(TOKENS, device="cuda")
    angle = torch.cat([positions[:, None] * frequencies] * 2, -1)[:, None]  # (tokens, 1, head_dim)

    def plain(x: Tensor, inverse: bool) -> Tensor:  # (tokens, heads, head_dim)
        a, b = x.chunk(2, -1)
        sin = -angle.sin() if inverse else angle.sin()
        return x * angle.cos().to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)

    def case(heads: int, inverse: bool) -> Case:
        original = random(TOKENS, 3 * heads * HEAD_DIM)

        def parts(qkv: Tensor) -> tuple[Tensor, ...]:  # q and k
            return qkv.unflatten(1, (3 * heads, HEAD_DIM)).split(heads, 1)[:2]

        def ours() -> Function:
            qkv = original.clone()

            def rotate() -> tuple[Tensor, ...]:
                torch.ops.deepseek_coder.rope_(qkv, positions, 2 * heads, HEAD_DIM, THETA, FACTOR, inverse)
                return parts(qkv)

            return rotate

        def eager() -> Function:
            q, k = parts(original.clone())
            return lambda: (q.copy_(plain(q, inverse)), k.copy_(plain(k, inverse)))

        def inductor() -> Function:
            qkv = original.clone()
            function = compiled(lambda qkv: [x.copy_(plain(x, inverse)) for x in parts(qkv)])
            return lambda: (function(qkv), parts(qkv))[1]

        def liger() -> Function:
            from liger_kernel.ops.rope import rope_backward, rope_forward

            q, k = (x.contiguous()[None].transpose(1, 2) for x in parts(original))
            cos, sin = angle.cos().to(q.dtype)[None, :, 0], angle.sin().to(q.dtype)[None, :, 0]
            rotate = rope_backward if inverse else rope_forward
            return lambda: [x.transpose(1, 2)[0] for x in rotate(q, k, cos, sin)[:2]]

        work = 2 * 2 * TOKENS * 2 * heads * HEAD_DIM
        providers = {OURS: ours, "torch": eager, "torch.compile": inductor, "Liger": liger}
        name = f"{heads * HEAD_DIM}, {'backward' if inverse else 'forward'}"
        return Case(name, providers, copy_of(work), work, lambda: [plain(x.float(), inverse) for x in parts(original)])

    for width in WIDTHS:
        for inverse in (False, True):
            yield case(width // HEAD_DIM, inverse)


# ---- SwiGLU ----------------------------------------------------------------------------------------------------------


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def swiglu_cases() -> Iterator[Case]:
    makers: dict[str, Maker] = {
        OURS: lambda: kernels.swiglu,
        "torch": lambda: plain_swiglu,
        "torch.compile": lambda: compiled(plain_swiglu),
        "Liger": liger_swiglu,
    }
    for width in WIDTHS:
        element = 2 * TOKENS * width
        inputs = (random(TOKENS, 2 * width),)
        yield from pair(f"{width}", makers, plain_swiglu, inputs, 3 * element, 5 * element, halves="Liger")


def run(op: str, out: Path) -> None:
    cases = {"norm": norm_cases, "rope": rope_cases, "swiglu": swiglu_cases}[op]
    compare.run(op, "a copy of equal bytes", cases(), out)
