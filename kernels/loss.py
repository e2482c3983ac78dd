"""The head's matrix product and the cross-entropy, without ever holding all logits.

    logits = hidden weight^T                    (tokens, vocab), in hidden's dtype, of a chunk of tokens at a time
    loss = sum over valid tokens of  lse - logits[target] + z_loss * lse^2,    lse = log sum exp(logits), fp32
    dlogits = softmax(logits) * (1 + 2 z_loss lse) - onehot(target)            zero for ignored tokens
    dhidden = dlogits weight,    dweight = dlogits^T hidden

The trick: dlogits depends on the incoming gradient only through one scalar factor, so both gradients can be made in the
forward, while a chunk's logits exist, and the backward multiplies by the scalar. A kernel overwrites each chunk's
logits with dlogits; the products are torch's. Over the chunks the weight's gradient is added up in fp32, inside the
products: in bf16 the later chunks would vanish in the rounding of the sum. Each chunk reads and writes that sum once,
so few large chunks are faster and many small ones need less memory. On Hopper a product of our own adds to the sum
(`weight_gradient.py`), since torch's waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from . import reference
from .dispatch import Kernel, check, floating, next_power_of_2, use_hopper, use_triton

if TYPE_CHECKING:
    import triton.language as tl

CHUNK = 2048, 4096  # tokens, at least and at most


@Kernel
def _cross_entropy_kernel(
    logits, targets, losses, row_stride, vocab, ignore_index, z_loss, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * row_stride
    at = tl.arange(0, BLOCK)
    target = tl.load(targets + row).to(tl.int64)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                tl.store(x + start + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + at < vocab)
    else:
        # Read before anything is overwritten; a target outside the vocabulary gives NaN, not a stray read.
        exists = (target >= 0) & (target < vocab)
        picked = tl.load(x + target, mask=exists, other=float("nan")).to(tl.float32)
        # exp2, since tl.exp takes more instructions, and with them this kernel waits for those and not for the memory.
        # The difference comes first: it is exact, and 0 for the largest.
        m = -float("inf")
        total = 0.0
        for start in range(0, vocab, BLOCK):
            block = tl.load(x + start + at, mask=start + at < vocab, other=-float("inf"), eviction_policy="evict_last")
            block = block.to(tl.float32)
            new = tl.maximum(m, tl.max(block, axis=0))
            total = total * tl.exp2((m - new) * LOG2E) + tl.sum(tl.exp2((block - new) * LOG2E), axis=0)
            m = new
        lse = m + tl.log(total)
        z = tl.cast(z_loss, tl.float32)
        tl.store(losses + row, lse - picked + z * lse * lse)
        if GRADIENT:
            factor = 1.0 + 2.0 * z * lse
            for start in range(0, vocab, BLOCK):
                mask = start + at < vocab
                block = tl.load(x + start + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
                d = tl.exp2((block - lse) * LOG2E) * factor
                tl.store(x + start + at, d.to(logits.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # the target's, once more: behind the others
            d = tl.exp2((picked - lse) * LOG2E) * factor - 1.0
            tl.store(x + target, d.to(logits.dtype.element_ty), mask=exists)


@Kernel
def _scale_kernel(gradient, factor, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gradient + at, mask=at < count).to(tl.float32)
    tl.store(out + at, (x * tl.load(factor)).to(out.dtype.element_ty), mask=at < count)


def _unsupported(x: Tensor) -> str | None:
    return "the Triton kernels do not compute in float64" if x.dtype == torch.float64 else None


def _cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, z_loss: float, gradient: bool
) -> None:
    """reference.cross_entropy_, by whichever backend is chosen."""
    if use_triton(logits, _unsupported(logits)):
        # So few rows at a time that the second walk finds them in the L2 cache: 4 for each multiprocessor.
        block = min(8192, next_power_of_2(logits.shape[1]))
        _cross_entropy_kernel[(logits.shape[0],)](
            logits, targets, losses, logits.stride(0), logits.shape[1], ignore_index, z_loss,
            GRADIENT=gradient, BLOCK=block, num_warps=16,
        )  # fmt: skip
    else:
        reference.cross_entropy_(logits, targets, losses, ignore_index, z_loss, gradient)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """dweight's from the forward to the backward. bf16 is rounded in both, for half of the memory in between; a sum
    over all tokens may leave the range of fp16 before the factor, 1 / tokens as a rule, brings it back: fp32."""
    return dtype if dtype == torch.bfloat16 else reference.wide(dtype)


class _Sum:
    """The sum over chunks of d^T x, (rows, columns), by torch's products: what `weight_gradient.Sum` is otherwise."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.empty((rows, columns), dtype=dtype, device=device)
        self.empty = True

    def add(self, d: Tensor, x: Tensor) -> None:
        """d (tokens, rows), x (tokens, columns)."""
        total = self.total
        if d.dtype == total.dtype or d.device.type != "cuda":
            torch.addmm(total, d.t().to(total.dtype), x.to(total.dtype), beta=0 if self.empty else 1, out=total)
        elif self.empty:
            torch.mm(d.t(), x, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, d.t(), x, out_dtype=total.dtype, out=total)
        self.empty = False

    def write(self, out: Tensor) -> None:
        out.copy_(self.total)


def _chunk(width: int) -> int:
    """Tokens of a chunk: as many as the weight is wide, so that its logits take as much memory as dweight will. More
    than CHUNK[1] are hardly faster, fewer than CHUNK[0] would make products too small for the GPU."""
    return min(max(width, CHUNK[0]), CHUNK[1])


def _parts(vocab: int, width: int, dtype: torch.dtype) -> list[int]:
    """Rows of the sums in which dweight is added up. Where they are rounded at the end, the results need a place: as
    much for each part as the logits of a whole chunk (`_joined`), so that with so many tokens the end takes no more
    memory than what was before it."""
    count = max(1, -(-width // _chunk(width))) if _kept(dtype) != reference.wide(dtype) else 1
    rows = -(-vocab // (count * 128)) * 128
    return [min(rows, vocab - first) for first in range(0, vocab, rows)]


def _make_sums(rows: list[int], logits: Tensor, hidden: Tensor) -> list[Any]:
    if hidden.dtype == torch.bfloat16 and use_triton(hidden) and use_hopper(hidden):
        from . import weight_gradient

        if weight_gradient.fits(logits, hidden):
            return [weight_gradient.Sum(count, hidden.shape[1], hidden.device) for count in rows]
    wide = reference.wide(hidden.dtype)
    return [_Sum(count, hidden.shape[1], wide, hidden.device) for count in rows]


def _add(sums: list[Any], rows: list[int], dlogits: Tensor, hidden: Tensor) -> None:
    if sums:
        for total, part in zip(sums, dlogits.split(rows, dim=1), strict=True):
            total.add(part, hidden)


def _joined(sums: list[Any], rows: list[int], like: Tensor) -> Tensor:
    """The sums, one below the other, as `_kept` says. Each leaves its place to what follows."""
    dtype, width = _kept(like.dtype), like.shape[1]
    if dtype == reference.wide(dtype):
        return sums.pop().total
    rounded = []
    for count in rows[:-1]:
        rounded.append(torch.empty((count, width), dtype=dtype, device=like.device))
        sums.pop(0).write(rounded[-1])
    out = torch.empty((sum(rows), width), dtype=dtype, device=like.device)
    places = out.split(rows)
    sums.pop().write(places[-1])
    while rounded:
        places[len(rounded) - 1].copy_(rounded.pop())
    return out


@torch.library.custom_op("deepseek_coder::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss sum, count, gradients for an incoming gradient of 1 (dweight as `_kept` says), logits; empty where not
    needed."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses = torch.empty(tokens, dtype=reference.wide(hidden.dtype), device=hidden.device)
    dhidden = torch.empty(hidden.shape if need_dhidden else (0,), dtype=hidden.dtype, device=hidden.device)
    kept = torch.empty((tokens, vocab) if need_logits else (0,), dtype=hidden.dtype, device=hidden.device)
    targets = targets.contiguous()
    step = _chunk(hidden.shape[1])
    logits = buffer = torch.empty((min(tokens, step), vocab), dtype=hidden.dtype, device=hidden.device)
    rows = _parts(vocab, hidden.shape[1], hidden.dtype) if need_dweight and tokens else []
    sums = _make_sums(rows, buffer, hidden)
    for first in range(0, tokens, step):
        chunk = slice(first, min(first + step, tokens))
        logits = buffer[: chunk.stop - first]
        torch.mm(hidden[chunk], weight.t(), out=logits)
        if need_logits:
            kept[chunk] = logits
        _cross_entropy_(logits, targets[chunk], losses[chunk], ignore_index, z_loss, need_dhidden or need_dweight)
        if need_dhidden:
            torch.mm(logits, weight, out=dhidden[chunk])
        _add(sums, rows, logits, hidden[chunk])
    del buffer, logits
    if rows:
        dweight = _joined(sums, rows, weight)
    else:
        shape = weight.shape if need_dweight else (0, weight.shape[1])
        dweight = torch.zeros(shape, dtype=_kept(hidden.dtype), device=hidden.device)
    return losses.sum(), (targets != ignore_index).sum(), dhidden, dweight, kept


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, kept = reference.wide(hidden.dtype), _kept(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        hidden.new_empty(weight.shape if need_dweight else (0, weight.shape[1]), dtype=kept),
        hidden.new_empty((hidden.shape[0], weight.shape[0]) if need_logits else (0,)),
    )


def _setup(ctx, inputs, output):
    ctx.need_dhidden, ctx.need_dweight = inputs[5:7]
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[2:4])
    ctx.set_materialize_grads(False)  # of the five results only the loss has a gradient: no zeros for the others


@torch.library.custom_op("deepseek_coder::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(dloss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * dloss, rounded once to dtype."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if not use_triton(gradient, _unsupported(gradient)):
        # A factor of shape (1,) takes part in the choice of the dtype to compute in, one of shape () does not: it,
        # 1 / tokens as a rule, would be rounded to 16 bits first.
        return torch.mul(gradient, dloss.view(1), out=out)
    if out.numel():  # torch's product of two dtypes takes 2.5 times as long
        _scale_kernel[(-(-out.numel() // 4096),)](gradient, dloss, out, out.numel(), BLOCK=4096, num_warps=8)
    return out


@_linear_cross_entropy_backward.register_fake
def _(dloss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _backward(ctx, dloss, *_):
    gradients = [
        _linear_cross_entropy_backward(dloss, gradient, ctx.dtype) if needed and dloss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, (ctx.need_dhidden, ctx.need_dweight), strict=True)
    ]
    return *gradients, *[None] * 6


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = ..., z_loss: float = ...
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = ...,
    z_loss: float = ...,
    *,
    return_logits: bool,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]: ...
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies of softmax(hidden weight^T), and how many tokens it is over.

    hidden (tokens, d) and weight (vocab, d) of one dtype, targets (tokens,) int64, `ignore_index` or in [0, vocab).
    z_loss adds z_loss * lse^2 per token (PaLM, arXiv 2204.02311, section 5).

    Returns loss_sum, an fp32 scalar differentiable once with respect to hidden and weight, and count, an int64 scalar
    that is not; both stay on the device; with return_logits also the logits (tokens, vocab) in hidden's dtype, without
    gradients. A count of 0 gives loss 0 and zero gradients. A target outside the vocabulary is an error on the CPU and
    gives NaN in the kernel. ValueError when shapes, dtypes or devices do not fit.
    """
    check(floating(hidden), lambda: f"linear_cross_entropy: floating point is needed, not {hidden.dtype}")
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and weight.shape[0] > 0
    check(fits, lambda: f"linear_cross_entropy: hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}")
    fits = targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    check(
        fits,
        lambda: (
            f"linear_cross_entropy: targets must be int64 ({hidden.shape[0]},), "
            f"not {targets.dtype} {tuple(targets.shape)}"
        ),
    )
    same = weight.dtype == hidden.dtype and weight.device == hidden.device == targets.device
    check(
        same,
        lambda: (
            f"linear_cross_entropy: hidden is {hidden.dtype} on {hidden.device}, "
            f"weight {weight.dtype} on {weight.device}, targets on {targets.device}"
        ),
    )
    grad = torch.is_grad_enabled()
    need_dhidden, need_dweight = grad and hidden.requires_grad, grad and weight.requires_grad
    loss, count, _, _, logits = _linear_cross_entropy(
        hidden, weight, targets, ignore_index, z_loss, need_dhidden, need_dweight, return_logits
    )
    return (loss, count, logits.detach()) if return_logits else (loss, count)
