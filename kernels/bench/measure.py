"""Timing, and what a number must carry to mean anything: the GPU, the versions, a ceiling from the same run."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "fa3-fwd")


def milliseconds(function: Callable[[], Any]) -> dict[str, float]:
    """Median of many runs, with the L2 cache cleared before each, and the quantiles 0.2 and 0.8 as its spread."""
    median, low, high = do_bench(function, warmup=40, rep=120, quantiles=(0.5, 0.2, 0.8))
    return {"ms": median, "low": low, "high": high}


def peak_bytes(function: Callable[[], Any]) -> int:
    """What a call allocates at its peak, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def matmul_tflops(size: int = 8192) -> float:
    """The ceiling for matrix work: a large bf16 product of random numbers."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / milliseconds(lambda: a @ b)["ms"] / 1e9


def environment() -> dict[str, Any]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {"gpu": torch.cuda.get_device_name(), "python": platform.python_version(), "packages": found}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
