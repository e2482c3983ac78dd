"""Sampling from logits with temperature, top-k and top-p, beside torch, which sorts, torch.compile and FlashInfer.

The ceiling is one read of the logits. Peers draw other numbers, so ids cannot be compared: the error is the square root
of the share of rows whose id the filters forbid. FlashInfer knows no temperature: dividing by it is a kernel more.
"""

from pathlib import Path

import torch
from torch import Tensor

import kernels
from kernels import reference

from . import compare
from .compare import OURS, Case, Function
from .decode import read_of
from .layers import compiled, random

VOCAB, TEMPERATURE, TOP_K, TOP_P = 32256, 0.8, 50, 0.95


def sorting(logits: Tensor) -> Tensor:
    ordered, order = torch.sort(logits.float() / TEMPERATURE, dim=-1, descending=True)
    p = torch.softmax(ordered[:, :TOP_K], -1)
    p = p.masked_fill(p.cumsum(-1) - p >= TOP_P, 0.0)
    return order.gather(1, torch.multinomial(p, 1))[:, 0]


def case(rows: int) -> Case:
    logits = random(rows, VOCAB) * 3
    temperature, k, p, m = (torch.full((rows,), x, device="cuda") for x in (TEMPERATURE, TOP_K, TOP_P, 0.0))
    seeds = torch.arange(rows, device="cuda")
    allowed = reference.filter_logits(logits.float() / TEMPERATURE, k, p, m).isfinite()

    def judged(ids: Tensor) -> Tensor:  # 1 for an id that may be drawn
        return allowed.gather(1, ids.long()[:, None]).float()

    def ours() -> Function:
        return lambda: kernels.sample(logits, temperature, k, p, m, seeds)

    def inductor() -> Function:
        function = compiled(sorting)
        return lambda: function(logits)

    def flashinfer() -> Function:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits

        return lambda: top_k_top_p_sampling_from_logits(logits / temperature[:, None], TOP_K, TOP_P)

    providers = {
        OURS: ours,
        "torch": lambda: lambda: sorting(logits),
        "torch.compile": inductor,
        "FlashInfer": flashinfer,
    }
    return Case(
        f"{rows} rows", providers, read_of(max(2**15, logits.numel() * 2)), logits.numel() * 2,
        lambda: [torch.ones(rows, 1, device="cuda")], judge=judged,
    )  # fmt: skip


def run(out: Path) -> None:
    compare.run("sampling", "a read of the logits", map(case, (1, 8, 64, 256)), out)
