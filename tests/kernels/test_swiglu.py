import pytest
import torch

from kernels import backend, swiglu

CASES = [
    (torch.float32, (5, 34)),
    (torch.float16, (2, 3, 66)),
    (torch.float16, (1, 2)),
    (torch.float32, (2, 2 * 1500)),
    (torch.float32, (3, 2 * 4100)),  # three programs a row
    *(
        pytest.param(dtype, shape, marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for shape in ((1025, 2 * 5504), (3000, 2 * 77))
    ),
]


def plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype,shape", CASES)
def test_kernels(triton, device, nan_filled, check_error, gradients, dtype, shape):
    x = 3 * torch.randn(shape, device=device).to(dtype)
    got, again, peer = gradients(swiglu, [x]), gradients(swiglu, [x]), gradients(plain, [x])
    for name, a, b, c, d in zip(("y", "dx"), got, again, peer, gradients(plain, [x.double()]), strict=True):
        assert torch.equal(a, b)
        check_error(a, c, d, name)


def test_reference(gradients):
    torch.manual_seed(0)
    x = 5 * torch.randn(4, 18, dtype=torch.float64)
    with backend("reference"):
        got = gradients(swiglu, [x])
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(got[0], gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(got[1], gradients(plain, [x])[1])


def test_strides(triton, device):
    x = torch.randn(6, 40, device=device)
    for view in (x[:, 7:27], x.t()[:20, :6].t()):
        leaf = view.detach().requires_grad_()
        y = swiglu(leaf)
        assert torch.equal(y, swiglu(view.contiguous()))
        assert torch.autograd.grad(y.sum(), leaf)[0].isfinite().all()  # incoming gradient of stride 0
    assert swiglu(x[:0]).shape == (0, 20)


def test_compiled_reference_with_strides(device):
    x = torch.randn(8, 6, device=device).t().double()
    compiled = torch.compile(lambda x: swiglu(x * 1.0).view(-1), backend="aot_eager", fullgraph=True)
    with backend("reference"):
        assert torch.equal(compiled(x), swiglu(x).view(-1))


def test_opcheck(opcheck, device):
    x = torch.randn(3, 8, device=device)
    opcheck("swiglu", x.clone().requires_grad_())
    opcheck("swiglu_backward", torch.randn(3, 4, device=device), x)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled(triton, device, check_compiled, compiler):
    check_compiled(swiglu, torch.randn(3, 5, 8, device=device), compiler=compiler)


def test_errors():
    for columns in (7, 0):
        with pytest.raises(ValueError, match="odd last dimension, or 0"):
            swiglu(torch.zeros(2, columns))
    with pytest.raises(ValueError, match="floating point"):
        swiglu(torch.zeros(2, 8, dtype=torch.int32))
