"""Every kernel compiles for sm_90a as the ops launch it, and nothing spills to memory where it would hurt."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ATTENTION = "kernels.attention.portable."
KERNELS = {
    *(ATTENTION + name for name in ("_forward_kernel", "_dq_kernel", "_dkdv_kernel", "_add_parts_kernel")),
    "kernels.norm._forward_kernel", "kernels.norm._backward_kernel", "kernels.norm._finish_kernel",
    "kernels.rope._kernel",
    "kernels.swiglu._forward_kernel", "kernels.swiglu._backward_kernel", "kernels.loss._cross_entropy_kernel",
    "kernels.sampling._sample_kernel",
}  # fmt: skip


ROOT = Path(__file__).parents[2]
OLDER = "3.6.0"  # the oldest triton that must work; the installed one is the newest


@functools.cache
def older_triton():
    """A folder with the older triton alone. Without a registry: a failure in CI, elsewhere a skip."""
    folder = ROOT / ".cache" / f"triton-{OLDER}"
    if not folder.is_dir():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", temporary]
        done = subprocess.run([*map(str, command), f"triton=={OLDER}"], capture_output=True, text=True)
        if done.returncode:
            message = f"triton {OLDER} could not be fetched: {done.stderr.strip()[-300:]}"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        try:
            temporary.rename(folder)
        except OSError:  # another test process was faster
            shutil.rmtree(temporary)
    return folder


@functools.cache
def compiled(dtype, head_dim, what="ops", older=False):
    """What compile_sm90.py reports; in another process, because compilation crashes where the interpreter is on."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*([older_triton()] if older else []), ROOT]))
    command = [sys.executable, str(here.with_name("compile_sm90.py")), dtype, str(head_dim), what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.network
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_without_spills(head_dim, older):
    reports = compiled("bfloat16", head_dim, "ops", older)
    assert {report["kernel"] for report in reports} == KERNELS
    for report in reports:
        assert report["target"] == "sm_90a"
        assert report["shared"] <= 227 * 1024
        operations = report["operations"]
        assert not any(name.startswith(("ATOM", "RED")) for name in operations), (
            report
        )  # they would not be deterministic
        # dK and dV take all registers at head_dim 128: a few numbers made once a program lie in local memory
        assert report["stack"] <= (40 if report["kernel"] == ATTENTION + "_dkdv_kernel" else 0), report
        assert all(loop["LDL"] + loop["STL"] == 0 for loop in report["loops"]), report
        if not report["kernel"].startswith(ATTENTION):
            assert report["wide"] >= 2, report  # rows are read and written 16 bytes at a time
        if report["kernel"] == "kernels.norm._backward_kernel":
            assert operations["LDGSTS"] > 0  # rows come while others are reduced


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_dq_kernel", "_dkdv_kernel"])
def test_attention_uses_the_tensor_cores(head_dim, kernel):
    reports = [report for report in compiled("bfloat16", head_dim) if report["kernel"] == ATTENTION + kernel]
    assert {report["flags"]["CAUSAL"] for report in reports} == {False, True}
    for report in reports:
        assert report["operations"]["HGMMA"] > 0
        assert report["flags"]["BLOCK_M"] > 16
        if report["flags"]["CAUSAL"]:
            assert report["warnings"] == [], "matrix products that wait for each other"


@pytest.mark.network
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("dtype,head_dim", [("bfloat16", 128), ("float16", 64)])
def test_decode_kernels(dtype, head_dim, older):
    """Tensor cores for every number of heads and queries; K and V come 16 bytes at a time, asynchronously; two programs
    fit a multiprocessor while few rows are asked for."""
    reports = compiled(dtype, head_dim, "decode", older)
    assert {report["version"] == OLDER for report in reports} == {older}
    names = {report["kernel"].rsplit(".", 1)[1] for report in reports}
    assert names == {"_split_kernel", "_combine_kernel", "_write_kernel", "_kernel"}
    for report in reports:
        operations = report["operations"]
        assert not any(name.startswith(("ATOM", "RED")) for name in operations), report
        assert report["stack"] == 0, report
        if report["kernel"] == "kernels.attention.decode._combine_kernel":
            assert operations["ACQBULK"] == 1  # launched early, it waits for the ranges
        if report["kernel"] != "kernels.attention.decode._split_kernel":
            continue
        assert operations["PREEXIT"] == 1
        flags = report["flags"]
        assert operations["LDGSTS"] > 0
        if flags["BLOCK_M"] <= 32:
            assert operations["HMMA"] > 0
            assert report["shared"] <= 113 * 1024
            # Each thread's part of the tiles of K and V that are on their way, 16 bytes at a time; of fp8 half.
            # Where an address waits for its page two stages make one tile.
            tiles = (flags["num_stages"] + 1) // 2 if flags["PAGE"] else flags["num_stages"]
            wide = tiles * flags["BLOCK_N"] * flags["D"] * 4 // (16 * 32 * flags["num_warps"])
            assert report["wide"] >= (wide // 4 if flags["DESCALE"] else wide), report
        else:
            assert operations["HGMMA"] > 0
            assert report["shared"] <= 227 * 1024


HOPPER = "kernels.attention.hopper"
FORWARD, BACKWARD = f"{HOPPER}_forward.forward_kernel", f"{HOPPER}_backward.backward_kernel"
ADD_PRODUCT = "kernels.weight_gradient.add_product_kernel"


@pytest.mark.network
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("dtype,head_dim", [("bfloat16", 128), ("float16", 64)])
def test_hopper_kernels(dtype, head_dim, older):
    reports = compiled(dtype, head_dim, "hopper", older)
    assert {report["version"] == OLDER for report in reports} == {older}
    names = {FORWARD, BACKWARD, f"{HOPPER}._prepare_kernel", f"{HOPPER}._finish_kernel",
             ATTENTION + "_add_parts_kernel", "kernels.attention.schedule._schedule_kernel"}  # fmt: skip
    if dtype == "bfloat16":
        names |= {ADD_PRODUCT, "kernels.weight_gradient._round_kernel", "kernels.loss._cross_entropy_kernel"}
    assert {report["kernel"] for report in reports} == names
    for report in reports:
        assert report["target"] == "sm_90a"
        assert report["shared"] <= 227 * 1024
        if report["kernel"] not in (FORWARD, BACKWARD, ADD_PRODUCT):
            continue
        # Matrix products that wait for each other, or registers that stay where they are, cost a third of the speed.
        assert report["warnings"] == []
        operations = report["operations"]
        assert operations["UTMALDG"] > 0
        assert operations["USETMAXREG"] > 0
        assert ("REDG" in operations) == (report["kernel"] != FORWARD)
        if report["kernel"] == ADD_PRODUCT:
            # Each consumer adds its 64 x 256 numbers 16 bytes a thread at a time, in one place; four products a step.
            assert operations["REDG"] == 2 * 64 * 256 // (128 * 4)
            assert report["stack"] == 0
            assert report["loops"] == [{"HGMMA": 4, "LDL": 0, "STL": 0}] * 2
            continue
        # The innermost loops: masked and unmasked tiles, of both consumers; without causality only a forward item's
        # first tile has a mask. The backward is short of registers, and keeps a few numbers of a tile (never a part of
        # a matrix) in local memory, above all if deterministic.
        assert len(report["loops"]) == (2 if report["kernel"] == FORWARD and not report["flags"]["CAUSAL"] else 4)
        spills = [loop["LDL"] + loop["STL"] for loop in report["loops"]]
        if report["kernel"] == FORWARD:
            assert max(spills) == 0
        else:
            assert max(spills) <= (2 if older and not report["flags"]["DETERMINISTIC"] else 28), spills
