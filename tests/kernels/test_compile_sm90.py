"""Every kernel compiles for sm_90a as the ops launch it, and nothing spills to memory where it would hurt."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ATTENTION = "kernels.attention.portable."
KERNELS = {
    *(ATTENTION + name for name in ("_forward_kernel", "_delta_kernel", "_dq_kernel", "_dkdv_kernel")),
    "kernels.norm._forward_kernel", "kernels.norm._backward_kernel", "kernels.rope._kernel",
    "kernels.swiglu._forward_kernel", "kernels.swiglu._backward_kernel", "kernels.loss._cross_entropy_kernel",
}  # fmt: skip


@functools.cache
def compiled(dtype, head_dim):
    """What compile_sm90.py reports; in another process, because compilation crashes where the interpreter is on."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__)
    environment["PYTHONPATH"] = str(here.parents[2])
    command = [sys.executable, str(here.with_name("compile_sm90.py")), dtype, str(head_dim)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_without_spills(head_dim):
    reports = compiled("bfloat16", head_dim)
    assert {report["kernel"] for report in reports} == KERNELS
    for report in reports:
        assert report["target"] == "sm_90a"
        assert report["shared"] <= 227 * 1024
        operations = report["operations"]
        assert not any(name.startswith(("ATOM", "RED")) for name in operations), (
            report
        )  # they would not be deterministic
        # cos and sin keep a table on the stack for the reduction of angles beyond 10^5; no position comes near that
        if report["kernel"] != "kernels.rope._kernel":
            assert report["stack"] == 0, report
            assert "LDL" not in operations, report
            assert "STL" not in operations, report


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_dq_kernel", "_dkdv_kernel"])
def test_attention_uses_the_tensor_cores(head_dim, kernel):
    reports = [report for report in compiled("bfloat16", head_dim) if report["kernel"] == ATTENTION + kernel]
    assert {report["flags"]["CAUSAL"] for report in reports} == {False, True}
    for report in reports:
        assert report["operations"]["HGMMA"] > 0
        assert report["flags"]["BLOCK_M"] > 16
