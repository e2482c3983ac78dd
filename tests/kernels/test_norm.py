import pytest
import torch

from kernels import backend, norm, rms_norm

CASES = [
    (torch.float32, (5, 33)),
    (torch.float16, (3, 7, 64)),
    (torch.float16, (1, 1)),
    *(
        pytest.param(dtype, shape, marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for shape in ((2049, 2048), (700, 4096), (3, 16387))
    ),
]


def llama(x, weight, eps, residual=None):
    """The lines of transformers' LlamaRMSNorm, after the residual addition."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    total = x if residual is None else x + residual
    wide = total.to(dtype)
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if residual is None else (y, total)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype,shape", CASES)
def test_kernels(triton, device, nan_filled, check_error, gradients, dtype, shape, with_residual):
    inputs = [torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype)]
    if with_residual:
        inputs.append(torch.randn(shape, device=device).to(dtype))
    eps = 1e-3

    def run(function, inputs):
        return gradients(lambda x, w, r=None: function(x, w, eps, r), inputs)

    got, again, peer = run(rms_norm, inputs), run(rms_norm, inputs), run(llama, inputs)
    exact = run(llama, [x.double() for x in inputs])
    for i, (a, b, c, d) in enumerate(zip(got, again, peer, exact, strict=True)):
        assert torch.equal(a, b)
        check_error(a, c, d, f"result {i}")


def test_reference_is_llamas(gradients):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [torch.randn(4, 9, dtype=dtype), torch.randn(9, dtype=dtype), torch.randn(4, 9, dtype=dtype)]
        with backend("reference"):
            got = gradients(lambda x, w, r: rms_norm(x, w, 1e-5, r), inputs)
        for one, other in zip(got, gradients(lambda x, w, r: llama(x, w, 1e-5, r), inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_rounding_is_llamas_to_the_bit():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64).bfloat16(), torch.randn(64).bfloat16()
    with backend("reference"):
        assert torch.equal(rms_norm(x, weight, 1e-6), llama(x, weight, 1e-6))


def test_strides(triton, device):
    x = torch.randn(6, 40, device=device)
    weight = torch.randn(20, device=device)
    rows, columns = x[:, 7:27], x.t()[:20, :6].t()
    for view in (rows, columns):
        assert torch.equal(rms_norm(view, weight, 1e-6), rms_norm(view.contiguous(), weight, 1e-6))
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(rms_norm(rows, weight, 1e-6).sum(), weight)  # incoming gradient of stride 0
    assert gradient.isfinite().all()


def test_no_rows(triton, device):
    x, weight = torch.zeros(0, 8, device=device), torch.ones(8, device=device, requires_grad=True)
    y, total = rms_norm(x, weight, 1e-6, x)
    assert y.shape == total.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros(8, device=device))


def test_opcheck(opcheck, device):
    x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    opcheck("rms_norm", x.clone().requires_grad_(), weight.clone().requires_grad_(), 1e-6, None)
    opcheck("rms_norm", x.clone().requires_grad_(), weight, 1e-6, x.clone().requires_grad_())
    rstd = torch.ops.deepseek_coder.rms_norm(x, weight, 1e-6, None)[1]
    opcheck("rms_norm_backward", torch.randn_like(x), None, x, weight, rstd)
    opcheck("rms_norm_backward", torch.randn_like(x), torch.randn_like(x), x, weight, rstd)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled(triton, device, check_compiled, compiler):
    x, weight, r = (
        torch.randn(2, 3, 8, device=device),
        torch.randn(8, device=device),
        torch.randn(2, 3, 8, device=device),
    )
    check_compiled(lambda x, w: rms_norm(x, w, 1e-6), x, weight, compiler=compiler)
    check_compiled(lambda x, w, r: rms_norm(x, w, 1e-6, r), x, weight, r, compiler=compiler)


def test_compiled_reference_with_strides(device):
    """What the reference returns is laid out as the compiler was told."""
    x, weight = torch.randn(8, 6, device=device).t().double(), torch.ones(8, device=device).double()

    def normed(x):
        return rms_norm(x * 1.0, weight, 1e-6, x * 2.0)[0].reshape(-1)

    with backend("reference"):
        assert torch.equal(torch.compile(normed, backend="aot_eager", fullgraph=True)(x), normed(x))


def test_backward_fits_smaller_gpus(monkeypatch):
    """Rows on their way take no more shared memory than there is: 99 KB, as on most GPUs before and beside Hopper."""
    launches = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(constants)

    for kernel in ("_backward_kernel", "_finish_kernel"):
        monkeypatch.setattr(norm, kernel, Recorded())
    monkeypatch.setattr(norm, "use_triton", lambda *_: True)
    for shared in (232448, 101376):
        monkeypatch.setattr(norm, "shared_memory", lambda _, shared=shared: shared)
        x, weight, rstd = torch.zeros(2, 7168).bfloat16(), torch.zeros(7168).bfloat16(), torch.zeros(2)
        torch.ops.deepseek_coder.rms_norm_backward(x, x, x, weight, rstd)
        taken = (launches[-2]["STAGES"] - 1) * 3 * launches[-2]["BLOCK"] * 2
        assert 0 < taken <= shared - 4096


def test_errors():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight \(0,\) does not fit"):
        rms_norm(x[:, :0], torch.ones(0), 1e-6)
    with pytest.raises(ValueError, match="16 bits or more"):
        rms_norm(x.to(torch.float8_e4m3fn), torch.ones(8).to(torch.float8_e4m3fn), 1e-6)
    with pytest.raises(ValueError, match=r"weight \(7,\) does not fit"):
        rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match=r"weight torch\.float16"):
        rms_norm(x, torch.ones(8).half(), 1e-6)
    with pytest.raises(ValueError, match="must be like x"):
        rms_norm(x, torch.ones(8), 1e-6, torch.zeros(3, 8))
