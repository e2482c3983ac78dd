"""Attention beside its peers: torch's cuDNN and FlashAttention-2, FlexAttention, flash-attn, flash-attn-4, fa3-fwd.

FLOPs are counted as everybody counts them: 4 S^2 D a head forward, half of it when causal, and 2.5 times as much
backward. For packed documents the work is that of whole tiles, 128 x 128 scores each, which no kernel can avoid.
"""

import functools
import itertools
import math
import random
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

import kernels
from kernels import reference

from . import compare, measure

TILE, HEAD_DIM, PACKED_TOTAL = 128, 128, 65536
SECONDS = 2.0  # of measuring, for one direction of one shape
BYTES_PER_TOKEN = 2.83  # of Python source in DeepSeek-Coder's tokenizer


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    seqlen: int  # of each sequence; of all documents together when packed
    heads: int
    kv_heads: int
    causal: bool = True
    documents: tuple[int, ...] = ()

    @property
    def tflop(self) -> float:
        """Of the forward."""
        if self.documents:
            tiles = sum(n * (n + 1) // 2 for n in (math.ceil(d / TILE) for d in self.documents))
            return 4 * tiles * TILE**2 * HEAD_DIM * self.heads / 1e12
        return 4 * self.batch * self.seqlen**2 * HEAD_DIM * self.heads / (2 if self.causal else 1) / 1e12


def code_lengths(total: int, seed: int = 0) -> tuple[int, ...]:
    """Documents that fill `total` tokens: files of the standard library, drawn at random, by the size of each."""
    sizes = [path.stat().st_size for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))]
    lengths = [int(size / BYTES_PER_TOKEN) for size in sizes if size > 50]
    drawn: list[int] = []
    generator = random.Random(seed)
    while sum(drawn) < total:
        drawn.append(min(generator.choice(lengths), total - sum(drawn)))
    return tuple(drawn)


def shapes() -> list[Shape]:
    marks = [
        Shape("B4 S4K 16 heads", 4, 4096, 16, 16),
        Shape("B1 S16K 16 heads (1.3B)", 1, 16384, 16, 16),
        Shape("B1 S4K 32 heads", 1, 4096, 32, 32),
        Shape("B1 S16K 32 heads (6.7B)", 1, 16384, 32, 32),
        Shape("B1 S16K 56/8 heads (33B)", 1, 16384, 56, 8),
        Shape("B1 S16K 32/1 heads (5.7B MQA)", 1, 16384, 32, 1),
    ]
    lengths = [
        Shape(f"B{max(1, 16 // n)} S{n}K 16 heads", max(1, 16 // n), n * 1024, 16, 16) for n in (1, 2, 8, 32, 64)
    ]
    full = [Shape(f"B1 S{n}K 16 heads, not causal", 1, n * 1024, 16, 16, causal=False) for n in (4, 16)]
    packed = Shape("packed code, 64K tokens, 16 heads", 1, PACKED_TOTAL, 16, 16, documents=code_lengths(PACKED_TOTAL))
    return [*marks, *lengths, *full, packed]


# ---- providers: (q, k, v, shape) -> a function that attends, on (batch, seqlen, heads, head_dim) or (total, ...) -----


def ours(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Callable[[], Tensor]:
    if shape.documents:
        cu = cumulative(shape)
        return lambda: cast(Tensor, kernels.flash_attn_varlen_func(q, k, v, cu, cu, causal=shape.causal))
    return lambda: cast(Tensor, kernels.flash_attn_func(q, k, v, causal=shape.causal))


def cumulative(shape: Shape) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(shape.documents)], dtype=torch.int32, device="cuda")


def torch_sdpa(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Callable[[], Tensor]:
    if shape.documents:
        raise NotImplementedError("no packed documents")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def attend() -> Tensor:
        with sdpa_kernel(kind):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=shape.causal, enable_gqa=shape.heads != shape.kv_heads
            )
        return out.transpose(1, 2)

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if shape.documents:
        raise NotImplementedError("no packed documents here")
    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.seqlen, shape.seqlen, device="cuda")
    torch._dynamo.reset()  # past the limit of recompilations it would run uncompiled, and be measured so
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=shape.heads != shape.kv_heads).transpose(1, 2)


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Callable[[], Tensor]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if shape.documents:
        cu, longest = cumulative(shape), max(shape.documents)
        return lambda: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=shape.causal)
    return lambda: flash_attn_func(q, k, v, causal=shape.causal)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Callable[[], Tensor]:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if shape.documents:
        cu, longest = cumulative(shape), max(shape.documents)
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return lambda: flash_attn_varlen_func(q, k, v, **options, causal=shape.causal)[0]
    return lambda: flash_attn_func(q, k, v, causal=shape.causal)[0]


def fa3(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Callable[[], Tensor]:
    from fa3_fwd_interface import flash_attn_func

    if shape.documents:
        raise NotImplementedError("no packed documents here")

    def attend() -> Tensor:
        with torch.no_grad():
            out = flash_attn_func(q, k, v, causal=shape.causal)
        return out[0] if isinstance(out, tuple) else out

    return attend


Provider = Callable[[Tensor, Tensor, Tensor, Shape], Callable[[], Tensor]]
PROVIDERS: dict[str, Provider] = {
    "hopper": ours,
    "triton": ours,
    "cuDNN": functools.partial(torch_sdpa, SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-2 (torch)": functools.partial(torch_sdpa, SDPBackend.FLASH_ATTENTION),
    "FlexAttention": flex,
    "flash-attn": flash_attn_2,
    "flash-attn-4": flash_attn_4,
    "fa3-fwd": fa3,
}


def relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> float:
    """Of the first head, against fp32."""
    lengths = shape.documents or (shape.seqlen,) * shape.batch
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    q, k, v, out = (x.reshape(-1, *x.shape[-2:])[:, :1].float() for x in (q, k, v, out))
    exact, _ = reference.attention(q, k, v, cu, cu, HEAD_DIM**-0.5, shape.causal)
    return ((out - exact).norm() / exact.norm()).item()


def with_backend(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with kernels.backend(name):
            return function()

    return call


def measure_together(functions: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Times of all functions in interleaved rounds, about SECONDS of them, and the host's; each has run before."""
    if not functions:
        return {}
    once = sum(cast(float, do_bench(function, warmup=1, rep=1)) for function in functions.values())
    times = measure.interleaved(functions, rounds=max(5, min(60, int(SECONDS * 1e3 / max(once, 1e-3)))))
    return {name: times[name] | {"host_us": measure.host_microseconds(f)} for name, f in functions.items()}


def measure_shape(shape: Shape) -> list[dict[str, Any]]:
    """Forward and backward of every provider; {"failed": reason} for what one cannot do."""
    torch.manual_seed(0)
    size = (shape.seqlen,) if shape.documents else (shape.batch, shape.seqlen)
    q, k, v = (
        torch.randn(*size, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    rows: dict[str, dict[str, Any]] = {}
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    for provider, make in PROVIDERS.items():
        row = rows[provider] = {"shape": shape.name, "provider": provider}
        name = provider if provider in ("hopper", "triton") else "auto"
        try:
            attend = with_backend(name, make(q, k, v, shape))
            with torch.no_grad():
                row["error"] = relative_error(attend(), q, k, v, shape)
                row["forward"] = {"peak_bytes": measure.peak_bytes(attend)}
            forward[provider] = attend
            out = attend()
            if out.requires_grad:
                dout = torch.randn_like(out)
                gradients = with_backend(
                    name, functools.partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
                )
                row["backward"] = {"peak_bytes": measure.peak_bytes(gradients)}
                backward[provider] = gradients
        except Exception as error:  # a peer that is missing or fails is named, not hidden
            row["failed"] = compare.reason(error)
    with torch.no_grad():
        for provider, times in measure_together(forward).items():
            rows[provider]["forward"] |= times | {"tflops": shape.tflop / times["ms"] * 1e3}
    for provider, times in measure_together(backward).items():
        rows[provider]["backward"] |= times | {"tflops": 2.5 * shape.tflop / times["ms"] * 1e3}
    return list(rows.values())


def run(out: Path) -> None:
    console = Console(width=150)
    ceiling = measure.matmul_tflops()
    facts = measure.environment() | {"matmul_tflops": ceiling, "command": "python -m kernels.bench attention"}
    console.print(f"{facts['gpu']}, bf16 matrix product {ceiling:.0f} TFLOP/s, {facts['packages']}")
    rows = []
    for shape in shapes():
        columns = [
            f"{direction} {unit}"
            for direction in ("forward", "backward")
            for unit in ("TFLOP/s", "of matmul", "host us")
        ]
        table = Table("", *columns, "error", title=shape.name)
        for row in measure_shape(shape):
            rows.append(row)
            cells = []
            for direction in ("forward", "backward"):
                found = row.get(direction, {})
                if "tflops" in found:
                    cells += [f"{found['tflops']:.0f}", f"{found['tflops'] / ceiling:.0%}", f"{found['host_us']:.0f}"]
                else:
                    cells += [""] * 3
            note = row.get("failed", "")[:60] or f"{row['error']:.1e}"
            table.add_row(row["provider"], *cells, note)
        console.print(table)
        # Written after every shape: a run that is stopped keeps what it has measured.
        measure.write_json(out / "attention.json", facts | {"shapes": [asdict(s) for s in shapes()], "rows": rows})
        plot(rows, ceiling, facts["gpu"], out / "attention.png")


def plot(rows: list[dict[str, Any]], ceiling: float, gpu: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["shape"] for row in rows))
    measured = [p for p in PROVIDERS if any(row["provider"] == p and "forward" in row for row in rows)]
    figure, panels = pyplot.subplots(2, 1, figsize=(15, 9), sharex=True, layout="constrained")
    for panel, direction in zip(panels, ("forward", "backward"), strict=True):
        for i, provider in enumerate(measured):
            heights = {
                row["shape"]: row[direction]["tflops"]
                for row in rows
                if row["provider"] == provider and "tflops" in row.get(direction, {})
            }
            at = [n + (i - len(measured) / 2) * 0.8 / len(measured) for n in range(len(names))]
            panel.bar(at, [heights.get(name, 0) for name in names], 0.8 / len(measured), label=provider)
        panel.axhline(ceiling, color="black", linewidth=0.8, linestyle="--")
        panel.set_ylabel(f"{direction}, TFLOP/s")
        panel.set_ylim(0, 1.15 * ceiling)
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(ncols=len(measured), fontsize=8)
    panels[0].set_title(f"{gpu}, bf16, head_dim {HEAD_DIM}; dashed: matrix product in the same run")
    panels[1].set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    temporary.replace(out)
