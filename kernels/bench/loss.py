"""The head's product with the cross-entropy, forward and both gradients, beside torch, Liger, cut-cross-entropy, quack.

The ceiling is the time of the three matrix products that no implementation can do without (one that recomputes the
logits does four).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels

from . import compare
from .compare import OURS, Case, Function
from .layers import Maker, compiled, random

TOKENS, VOCAB, WIDTHS = 16384, 32256, (2048, 4096, 7168)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def liger(accumulator: torch.dtype | None = None) -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t, reduction="sum", accum_dtype=accumulator)


def cut_cross_entropy() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, t: linear_cross_entropy(h, w, t, reduction="sum")


def quack() -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, t: chunked_linear_cross_entropy(h, w, t, reduction="sum")


PROVIDERS: dict[str, Maker] = {
    OURS: lambda: lambda h, w, t: kernels.linear_cross_entropy(h, w, t)[0],
    "torch": lambda: plain,
    "torch.compile": lambda: compiled(plain),
    "Liger, fp32 sums": lambda: liger(torch.float32),
    "Liger, bf16 sums": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
}


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and gradients in fp32, a part of the tokens at a time."""
    h, w = hidden.detach().float(), weight.detach().float().requires_grad_()
    total, dhidden = torch.zeros((), device="cuda"), []
    for part, target in zip(h.split(2048), targets.split(2048), strict=True):
        part = part.requires_grad_()
        loss = plain(part, w, target)
        loss.backward()
        total += loss.detach()
        assert part.grad is not None
        dhidden.append(part.grad)
    assert w.grad is not None
    return [total, torch.cat(dhidden), w.grad]


def case(width: int) -> Case:
    hidden, weight = random(TOKENS, width).requires_grad_(), (random(VOCAB, width) * width**-0.5).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), device="cuda")

    def provider(make: Maker) -> Callable[[], Function]:
        def build() -> Function:
            function = make()

            def step() -> list[Tensor]:
                loss = function(hidden, weight, targets)
                return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

            return step

        return build

    def products() -> Function:
        h, w, dlogits = hidden.detach(), weight.detach(), random(TOKENS, VOCAB)
        return lambda: (h @ w.t(), dlogits @ w, dlogits.t() @ h)

    providers = {name: provider(make) for name, make in PROVIDERS.items()}
    work = 3 * 2 * TOKENS * VOCAB * width
    return Case(
        f"{width}", providers, products, work, lambda: exact(hidden, weight, targets), "TFLOP/s",
        rounds=12, graph=False, hot=True,
    )  # fmt: skip


def run(out: Path) -> None:
    compare.run("loss", "its three matrix products", map(case, WIDTHS), out)
