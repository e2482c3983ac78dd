"""Runs the same tests on a GPU, or, without one, through Triton's interpreter on the CPU (see tests/conftest.py)."""

import pytest
import torch
from torch import Tensor

from kernels import backend

GPU = torch.cuda.is_available()


@pytest.fixture
def device() -> str:
    torch.manual_seed(1234)
    return "cuda" if GPU else "cpu"


@pytest.fixture
def triton(device):
    """The Triton backend, on the GPU or interpreted."""
    pytest.importorskip("triton")
    with backend("triton"):
        yield


@pytest.fixture
def fastest(device):
    """What `auto` chooses on a GPU, by name: nothing falls back unseen."""
    assert backend() != "reference"
    with backend(backend()):
        yield


@pytest.fixture
def nan_filled(monkeypatch):
    """Whatever the ops allocate without filling holds NaN: an element that is not written shows."""
    empty = torch.empty

    def filled(*args, **kwargs) -> Tensor:
        result = empty(*args, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def check_error():
    """FlashAttention's rule: at most twice the error of the same computation in PyTorch, plus one ulp."""

    def check(got: Tensor, peer: Tensor, exact: Tensor, name: str = "") -> None:
        assert got.shape == exact.shape
        assert got.dtype == peer.dtype
        if got.numel() == 0:
            return
        error = (got.double() - exact).abs().max().item()
        floor = torch.finfo(got.dtype).eps * exact.abs().max().item()
        allowed = 2 * (peer.double() - exact).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"  # false for NaN

    return check


@pytest.fixture
def opcheck(triton):
    """torch.library.opcheck on a custom op, with the Triton kernel inside."""

    def check(name: str, *args) -> None:
        op = getattr(torch.ops.deepseek_coder, name).default
        torch.library.opcheck(op, args)

    return check


def _gradients(function, inputs):
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(outputs[0].device).manual_seed(5)
    loss = 0.0
    for y in outputs:
        if y.requires_grad:
            weight = torch.randn(y.shape, generator=generator, dtype=torch.float64, device=y.device).to(y)
            loss = loss + (y * weight).sum()
    return [*outputs, *torch.autograd.grad(loss, [x for x in leaves if x.is_floating_point()])]


@pytest.fixture
def gradients():
    """function, inputs -> outputs, then the gradients of the floating point inputs under fixed random weights."""
    return _gradients


@pytest.fixture
def check_compiled():
    """Outputs and gradients under torch.compile(fullgraph=True) are those of eager execution."""

    def check(function, *inputs, compiler: str = "aot_eager") -> None:
        expected = _gradients(function, inputs)
        torch._dynamo.reset()
        got = _gradients(torch.compile(function, fullgraph=True, backend=compiler), inputs)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    return check
