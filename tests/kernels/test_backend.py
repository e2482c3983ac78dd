"""The choice of backend, and that importing the package stays light."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backend, dispatch, swiglu


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_CODER_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())


def test_context_manager_nests_and_restores():
    before = backend()
    with backend("reference"):
        assert backend() == "reference"
        with backend("triton"):
            assert backend() == "triton"
        assert backend() == "reference"
    assert backend() == before
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert backend() == before


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_current_device(monkeypatch, name):
    """A launch on another GPU than the tensors' would read what is not there."""
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    with backend(name):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        assert dispatch.use_triton(OnGpu())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        with pytest.raises(ValueError, match=r"on cuda:1, but cuda:0 is the current .* torch.cuda.set_device\(1\)"):
            dispatch.use_triton(OnGpu())


def test_environment(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CODER_KERNELS", "reference")
    assert backend() == "reference"
    with backend("triton"):
        assert backend() == "triton"
    monkeypatch.setenv("DEEPSEEK_CODER_KERNELS", "fastest")
    with pytest.raises(ValueError, match="'fastest' does not exist; choose one of: auto, hopper, triton, reference"):
        swiglu(torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["Hopper", "", "Triton"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="auto, hopper, triton, reference"):
        backend(name)


def test_auto(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend() == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    monkeypatch.setattr(dispatch, "hopper_missing", lambda _: "the Hopper kernels need a Hopper GPU")
    assert backend() == "triton"
    monkeypatch.setattr(dispatch, "hopper_missing", lambda _: None)
    assert backend() == "hopper"
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "triton is not installed")
    assert backend() == "reference"
    assert not dispatch.use_triton(torch.zeros(1)), "the reference runs CPU tensors, interpreter or not"


class OnGpu:
    device = torch.device("cuda", 1)


def test_hopper_is_chosen_refused_and_missed(monkeypatch):
    monkeypatch.setattr(dispatch, "hopper_missing", lambda _: None)
    monkeypatch.setattr(dispatch, "_is_hopper", lambda _: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.use_hopper(OnGpu()), "on another GPU nothing is missing"
        monkeypatch.setattr(dispatch, "_is_hopper", lambda _: True)
        assert dispatch.use_hopper(OnGpu())
        with backend("triton"):
            assert not dispatch.use_hopper(OnGpu())
    with pytest.warns(RuntimeWarning, match="portable Triton kernels, since they have no head_dim 32"):
        assert not dispatch.use_hopper(OnGpu(), "they have no head_dim 32")
    with backend("hopper"), pytest.raises(ValueError, match="'hopper' was asked for, but they have no head_dim 32"):
        dispatch.use_hopper(OnGpu(), "they have no head_dim 32")


def test_auto_warns_once_why(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "triton is not installed")
    with pytest.warns(RuntimeWarning, match="reference, since triton is not installed"):
        assert not dispatch.use_triton(OnGpu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.use_triton(OnGpu())
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: OnGpu.device.index)
    assert dispatch.use_triton(OnGpu())
    with pytest.warns(RuntimeWarning, match="since head_dim 24 is odd"):
        assert not dispatch.use_triton(OnGpu(), "head_dim 24 is odd")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        swiglu(torch.zeros(1, 2))
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "triton is not installed")
    with backend("triton"), pytest.raises(ValueError, match="but triton is not installed"):
        dispatch.use_triton(OnGpu())


def test_float64_has_no_kernel(triton, device):
    with pytest.raises(ValueError, match="float64"):
        swiglu(torch.zeros(1, 2, dtype=torch.float64, device=device))


def test_import_is_light():
    """No triton, no warning; and everything trains where triton is not installed."""
    code = (
        "import sys, torch, kernels;"
        "assert 'triton' not in sys.modules;"
        "sys.modules['triton'] = None;"
        "x = torch.randn(5, 8, requires_grad=True);"
        "(kernels.swiglu(x).sum() + kernels.rms_norm(x, x[0].detach(), 1e-6).sum()).backward();"
        "q = torch.randn(1, 5, 2, 16, requires_grad=True);"
        "kernels.flash_attn_func(q, q, q, causal=True).sum().backward();"
        "assert kernels.backend() == 'reference'"
    )
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_project_names_itself():
    assert kernels.PROJECT == "deepseek-coder-torch"
    for name in kernels.__all__:
        assert getattr(kernels, name).__doc__


def test_with_a_gpu_every_test_of_a_kernel_is_chosen(tmp_path):
    """`make test-gpu`: those that also run in the interpreter too, and none that has nothing to do on a GPU."""
    (tmp_path / "with_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    command = [sys.executable, "-m", "pytest", "-p", "with_gpu", "-p", "no:cacheprovider", "--collect-only", "-q"]
    result = subprocess.run(
        [*command, "-m", "gpu", str(Path(__file__).with_name("test_rope.py"))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    chosen = {line.partition("::")[2].partition("[")[0] for line in result.stdout.splitlines() if "::" in line}
    assert chosen >= {"test_kernels", "test_in_place_and_only_q_and_k", "test_opcheck", "test_positions_from_documents"}
    assert not chosen & {"test_same_bits_as_transformers", "test_errors"}
