"""The benchmark counts work as its docstring says, names what fails, and refuses to run without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from kernels.bench import attention
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


def test_without_a_gpu_it_is_one_line():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "kernels.bench", "attention"]
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
