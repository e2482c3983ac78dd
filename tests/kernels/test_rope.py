import pytest
import torch

from kernels import apply_rope, backend, rope

CASES = [
    (torch.float32, 4, 2, 16, 9),
    (torch.float16, 3, 3, 32, 5),
    (torch.float32, 1, 1, 10, 1),
    *(
        pytest.param(dtype, heads, kv_heads, head_dim, 2049, marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for heads, kv_heads, head_dim in ((16, 16, 128), (32, 1, 64), (7, 1, 128))
    ),
]


def complex_rotation(qkv, positions, heads, kv_heads, theta, factor, frequencies=None):
    """The definition: pair (x_i, x_{i + d/2}) is a complex number, multiplied by exp(i angle)."""
    x = qkv.unflatten(1, (heads + 2 * kv_heads, 2, -1))
    head_dim = 2 * x.shape[-1]
    if frequencies is None:
        frequencies = (
            theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=qkv.device) / head_dim) / factor
        )
    angle = (positions.to(frequencies.dtype)[:, None] * frequencies).to(torch.promote_types(qkv.dtype, torch.float32))
    cos, sin = angle.cos()[:, None].to(qkv.dtype), angle.sin()[:, None].to(qkv.dtype)
    a, b = x[:, :, 0], x[:, :, 1]
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], 2)
    return torch.cat([rotated[:, : heads + kv_heads], x[:, heads + kv_heads :]], 1).flatten(1)


def rotated_copy(qkv, *args):
    return apply_rope(qkv.clone(), *args)


def fp32_frequencies(head_dim, theta, factor, device):
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)) / factor


@pytest.mark.parametrize("dtype,heads,kv_heads,head_dim,tokens", CASES)
def test_kernels(triton, device, check_error, gradients, dtype, heads, kv_heads, head_dim, tokens):
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    positions = torch.randperm(tokens, device=device)
    arguments = (positions, heads, kv_heads, 1e5, 4.0)
    got, again = (gradients(lambda x: rotated_copy(x, *arguments), [qkv]) for _ in range(2))
    # The angles are fp32 by definition: only the rotation is judged here, the angles are in the tests below.
    angles = fp32_frequencies(head_dim, 1e5, 4.0, device)
    peer = gradients(lambda x: complex_rotation(x, *arguments, angles), [qkv])
    exact = gradients(lambda x: complex_rotation(x, *arguments, angles), [qkv.double()])
    for a, b, c, d in zip(got, again, peer, exact, strict=True):
        assert torch.equal(a, b)
        # cos and sin of an fp32 angle are not exactly the fp64 ones: half an ulp of the angle
        half_ulp = positions.max().item() / 4.0 * 2.0**-24
        assert (a.double() - d).abs().max() <= 2 * (c.double() - d).abs().max() + 8 * half_ulp + 2 * torch.finfo(
            dtype
        ).eps
        assert a.dtype == dtype


def test_more_rows_than_a_grid_is_long(triton, device, monkeypatch):
    qkv, positions = torch.randn(7, 5 * 8, device=device), torch.arange(7, device=device)
    whole = rotated_copy(qkv, positions, 3, 1, 1e4, 1.0)
    monkeypatch.setattr(rope, "GRID_ROWS", 3)
    assert torch.equal(rotated_copy(qkv, positions, 3, 1, 1e4, 1.0), whole)


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_reference_is_the_complex_rotation(position_dtype, gradients):
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 16383, 7], dtype=position_dtype)
    qkv = torch.randn(4, 8 * 12, dtype=torch.float64)
    with backend("reference"):
        got = gradients(lambda x: rotated_copy(x, positions, 4, 2, 1e5, 4.0), [qkv])
    expected = gradients(lambda x: complex_rotation(x, positions, 4, 2, 1e5, 4.0), [qkv])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)  # fp32 frequencies at position 16383


def test_same_bits_as_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    )  # fmt: skip
    torch.manual_seed(0)
    positions = torch.arange(3, 53)
    q, k, v = (torch.randn(1, 4, 50, 16) for _ in range(3))
    cos, sin = llama.LlamaRotaryEmbedding(config)(v, positions[None])
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    qkv = torch.cat([x[0].transpose(0, 1) for x in (q, k, v)], 1).flatten(1)
    with backend("reference"):
        apply_rope(qkv, positions, 4, 4, 1e5, 4.0)
    got = qkv.unflatten(1, (12, 16)).split(4, 1)
    for one, other in zip(got, (*expected, v), strict=True):
        assert torch.equal(one, other[0].transpose(0, 1))


def test_in_place_and_only_q_and_k(triton, device):
    storage = torch.randn(5, 8 * 16 + 3, device=device)
    qkv, before = storage[:, 1:-2], storage.clone()
    result = apply_rope(qkv, torch.arange(5, device=device), 4, 2, 1e4, 1.0)
    assert result.data_ptr() == qkv.data_ptr()
    expected = complex_rotation(before[:, 1:-2].double(), torch.arange(5, device=device), 4, 2, 1e4, 1.0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(qkv[0], before[0, 1:-2])  # position 0 is the identity
    assert torch.equal(qkv[:, 6 * 16 :], before[:, 1:-2][:, 6 * 16 :])
    assert torch.equal(storage[:, [0, -2, -1]], before[:, [0, -2, -1]])
    apply_rope(qkv[:0], torch.arange(0, device=device), 4, 2, 1e4, 1.0)


def test_leaf_is_refused(triton, device):
    with pytest.raises(RuntimeError, match="leaf"):
        apply_rope(
            torch.zeros(2, 48, device=device, requires_grad=True), torch.arange(2, device=device), 1, 1, 1e4, 1.0
        )


def test_opcheck(opcheck, device):
    for inverse in (False, True):
        arguments = torch.arange(5, device=device), 6, 16, 1e4, 2.0, inverse
        opcheck("rope_", torch.randn(5, 8 * 16, device=device), *arguments)
        opcheck("rope", torch.randn(5, 8 * 16, device=device, requires_grad=True), *arguments)


@pytest.mark.parametrize("use_result", [True, False])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled(triton, device, check_compiled, gradients, compiler, use_result):
    """A compiled in-place op may lose its gradient silently: the caller may go on with either name of the tensor."""
    positions = torch.arange(9, device=device)

    def function(x, weight, rope=apply_rope):
        qkv = torch.nn.functional.linear(x, weight)
        result = rope(qkv, positions, 4, 2, 1e4, 1.0)
        return (result if use_result else qkv).tanh()

    inputs = torch.randn(9, 6, device=device), torch.randn(8 * 16, 6, device=device)
    check_compiled(function, *inputs, compiler=compiler)
    with torch.no_grad():
        torch._dynamo.reset()
        inference = torch.compile(function, fullgraph=True, backend=compiler)(*inputs)
        torch.testing.assert_close(inference, function(*inputs), rtol=1e-4, atol=1e-4)
    got = gradients(torch.compile(function, fullgraph=True, backend=compiler), inputs)
    if use_result:
        for one, other in zip(got, gradients(lambda *x: function(*x, rope=complex_rotation), inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_positions_from_documents(device):
    """Each document is rotated as if it stood alone; empty documents and a repeated end do not matter."""
    lengths = [3, 0, 1, 5, 0, 0]
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    qkv = torch.randn(9, 8 * 16, device=device)
    expected = [rotated_copy(x, torch.arange(len(x), device=device), 4, 2, 1e4, 1.0) for x in qkv.split(lengths)]
    assert torch.equal(apply_rope(qkv.clone(), None, 4, 2, 1e4, 1.0, cu_seqlens=cu), torch.cat(expected))
    with pytest.raises(ValueError, match="one of them"):
        apply_rope(qkv, torch.arange(9, device=device), 4, 2, 1e4, 1.0, cu_seqlens=cu)
    with pytest.raises(ValueError, match="is not int32"):
        apply_rope(qkv, None, 4, 2, 1e4, 1.0, cu_seqlens=cu.long())


@pytest.mark.gpu
def test_frequencies_made_in_a_graph_are_not_kept(device):
    qkv, positions = torch.randn(3, 3 * 16, device=device), torch.arange(3, device=device)
    graph = torch.cuda.CUDAGraph()
    apply_rope(qkv.clone(), positions, 1, 1, 1e4, 1.0)  # compiled; other frequencies than the graph's
    with torch.cuda.graph(graph):
        captured = apply_rope(qkv.clone(), positions, 1, 1, 12345.0, 1.0)
    expected = apply_rope(qkv.clone(), positions, 1, 1, 12345.0, 1.0)
    graph.replay()
    assert torch.equal(captured, expected)
    assert torch.equal(expected, apply_rope(qkv.clone(), positions, 1, 1, 12345.0, 1.0))


def test_errors():
    x, positions = torch.zeros(3, 8 * 16), torch.arange(3)
    with pytest.raises(ValueError, match="is not"):
        apply_rope(x[:, 1:], positions, 4, 2, 1e4, 1.0)
    with pytest.raises(ValueError, match="even head_dim"):
        apply_rope(torch.zeros(3, 8 * 15), positions, 4, 2, 1e4, 1.0)
    with pytest.raises(ValueError, match="positions must be"):
        apply_rope(x, positions[:2], 4, 2, 1e4, 1.0)
    with pytest.raises(ValueError, match="positions must be"):
        apply_rope(x, positions.float(), 4, 2, 1e4, 1.0)
