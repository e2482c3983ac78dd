"""Timing, and what a number must carry to mean anything: the GPU, the versions, a ceiling from the same run."""

import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

PACKAGES = (
    "torch", "triton", "flash-attn", "flash-attn-4", "fa3-fwd", "flashinfer-python", "liger-kernel",
    "cut-cross-entropy", "quack-kernels",
)  # fmt: skip

PLACES = 5  # in memory, for the results of a function that is timed


def milliseconds(function: Callable[[], Any]) -> dict[str, float]:
    """Median of many runs, with the L2 cache cleared before each, and the quantiles 0.2 and 0.8 as its spread."""
    median, low, high = do_bench(function, warmup=40, rep=120, quantiles=(0.5, 0.2, 0.8))
    return {"ms": median, "low": low, "high": high}


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function's launches as CUDA graphs, so that the host's speed is not measured. On the current stream.

    Where results lie in memory decides up to 3 % of the time of a kernel that does nothing but copy. So several graphs
    are captured, each with results of its own, and replayed in turn.
    """
    graphs = [torch.cuda.CUDAGraph() for _ in range(PLACES)]
    for graph in graphs:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            function()
    turns = itertools.cycle(graphs)

    def replay(_kept: Callable[[], Any] = function) -> None:  # the graphs read and write what the function holds
        next(turns).replay()

    return replay


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, hot: bool = False) -> dict[str, dict[str, float]]:
    """Milliseconds of each function on the GPU, as `milliseconds`, but in rounds that time each of them once: a clock
    that changes changes for all. Each round takes them in random order: who comes behind one that read the same memory
    can be faster by 7 %, we suppose because some of its addresses are already translated.

    Before each call 1 GiB is read. That is more than the L2 cache holds, leaves nothing to write back, and takes longer
    than the host needs for a call: nothing waits for the host, whose time `host_microseconds` tells.

    hot: before, matrix products run for some 60 ms, so that everyone begins at the power limit, as in training. Else
    who comes behind a slow one finds a cool GPU, and is faster by up to a tenth.
    """
    cold = torch.zeros(2**28, device="cuda")
    load = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) if hot else cold
    events = {
        name: [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)] for name in functions
    }
    order, draw = list(functions), random.Random(0)
    for i in range(rounds):
        draw.shuffle(order)
        for name in order:
            for _ in range(40 if hot else 0):
                load @ load
            cold.sum()
            events[name][i][0].record()
            functions[name]()
            events[name][i][1].record()
    torch.cuda.synchronize()
    result = {}
    for name, pairs in events.items():
        times = sorted(start.elapsed_time(end) for start, end in pairs)
        low, median, high = (times[int(len(times) * q)] for q in (0.2, 0.5, 0.8))
        result[name] = {"ms": median, "low": low, "high": high}
    return result


def host_microseconds(function: Callable[[], Any], calls: int = 20) -> float:
    """Median time until a call returns, with room in the queue: what it costs the host."""
    times = []
    torch.cuda.synchronize()
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


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
