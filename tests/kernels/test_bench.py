"""The benchmark counts work as its docstring says, names what fails, and refuses to run without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import torch

from kernels.bench import attention, compare, measure
from kernels.bench.attention import Shape, code_lengths, measure_shape


def test_work_is_counted_as_everybody_counts_it():
    full = Shape("", 2, 1024, 16, 16, causal=False)
    assert full.tflop == 4 * 2 * 1024**2 * 128 * 16 / 1e12
    assert Shape("", 2, 1024, 16, 4).tflop == full.tflop / 2
    # One document of 129 tokens: 3 tiles of 128 x 128 scores on and under the diagonal.
    assert Shape("", 1, 129, 2, 2, documents=(129,)).tflop == 4 * 3 * 128**2 * 128 * 2 / 1e12


def test_documents_fill_the_packing_and_repeat():
    lengths = code_lengths(20_000)
    assert sum(lengths) == 20_000
    assert min(lengths) > 0
    assert lengths == code_lengths(20_000) != code_lengths(20_000, seed=1)


def test_a_peer_that_fails_is_named(monkeypatch):
    def broken(*_):
        raise ImportError("no such\n  library")

    monkeypatch.setattr(attention, "PROVIDERS", {"broken": broken})
    monkeypatch.setattr(attention.torch, "randn", lambda *_, **__: None)
    (row,) = measure_shape(Shape("small", 1, 128, 2, 2))
    assert row == {"shape": "small", "provider": "broken", "failed": "ImportError: no such library"}


@pytest.fixture
def one_millisecond_each(monkeypatch):
    """No GPU: the ceiling takes 1 ms, every provider 2."""
    monkeypatch.setattr(measure, "peak_bytes", lambda function: 7)
    monkeypatch.setattr(
        measure, "interleaved",
        lambda functions, *_: {n: dict.fromkeys(("ms", "low", "high"), 2.0 if n else 1.0) for n in functions},
    )  # fmt: skip


def test_a_case_is_measured_and_a_missing_peer_named(one_millisecond_each, monkeypatch, tmp_path):
    def missing():
        raise ImportError("no such\n  library")

    providers = {"exact": lambda: lambda: torch.ones(4), "double": lambda: lambda: [2 * torch.ones(4)], "gone": missing}
    case = compare.Case("a case", providers, lambda: lambda: None, 4e9, lambda: [torch.ones(4)], graph=False)
    exact, double, gone = compare.measure_case(case)
    assert gone == {"case": "a case", "provider": "gone", "failed": "ImportError: no such library"}
    assert (exact["error"], double["error"]) == (0.0, 1.0)
    assert exact["rate"] == 2.0  # 4 GB in 2 ms are 2 TB/s
    assert exact["share"] == 0.5
    assert exact["peak_bytes"] == 7
    compare.plot("norm", [exact, double, gone], "a title", tmp_path / "norm.png")
    assert (tmp_path / "norm.png").stat().st_size > 0


@pytest.mark.gpu
def test_times_are_in_order_and_a_copy_is_as_fast_as_a_copy():
    copy = compare.copy_of(2**28)
    case = compare.Case("copy", {"copy": copy}, copy, 2**28, lambda: [torch.zeros(2**26, device="cuda")], rounds=10)
    with torch.cuda.stream(torch.cuda.Stream()):
        (row,) = compare.measure_case(case)
    assert 0 < row["low"] <= row["ms"] <= row["high"]
    assert 0.9 < row["share"] < 1.1


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["norm", "rope", "swiglu", "loss", "decode", "sampling"])
def test_our_op_runs_and_is_right(monkeypatch, op):
    """Small shapes; whatever peers are installed beside it may fail, this project's own may not."""
    from kernels.bench import decode, layers, loss, sampling

    monkeypatch.setattr(layers, "TOKENS", 256)
    monkeypatch.setattr(layers, "WIDTHS", (256,))
    monkeypatch.setattr(loss, "TOKENS", 256)
    monkeypatch.setattr(loss, "PROVIDERS", {compare.OURS: loss.PROVIDERS[compare.OURS]})
    cases = {
        "norm": layers.norm_cases, "rope": layers.rope_cases, "swiglu": layers.swiglu_cases,
        "loss": lambda: [loss.case(256)], "decode": lambda: [decode.case(14, 2, 2, 512)],
        "sampling": lambda: [sampling.case(4)],
    }[op]  # fmt: skip
    with torch.cuda.stream(torch.cuda.Stream()):
        for case in cases():
            case.providers = {name: make for name, make in case.providers.items() if compare.OURS in name}
            for row in compare.measure_case(case):
                assert "failed" not in row, row
                assert row["error"] < 2e-2
                assert row["share"] > 0


@pytest.mark.parametrize("op", ["attention", "decode", "norm", "rope", "swiglu", "loss", "sampling", "all"])
def test_without_a_gpu_it_is_one_line(op):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "kernels.bench", op]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: no CUDA GPU is visible; run the benchmark on a machine that has one\n"


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [(), (300, 212)])
def test_one_measurement(documents, monkeypatch):
    monkeypatch.setattr(attention, "PROVIDERS", {"triton": attention.ours})
    (row,) = measure_shape(Shape("small", 1, 512, 2, 2, documents=documents))
    assert "failed" not in row
    assert row["error"] < 1e-2
    for direction in ("forward", "backward"):
        value = row[direction]
        assert 0 < value["low"] <= value["ms"] <= value["high"]
        assert value["tflops"] > 0
        assert value["peak_bytes"] > 0
