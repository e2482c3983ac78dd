"""Attention: the reference against independent formulas, the kernels against the reference's mathematics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import (
    apply_rope,
    backend,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    linear_cross_entropy,
    reference,
    rms_norm,
    swiglu,
)

# Lengths of the documents' queries and keys: one token, empty documents, odd lengths, more queries than keys.
UGLY = ([1, 37, 0, 50, 4, 0], [3, 37, 5, 21, 0, 0])


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def packed(lengths, heads, kv_heads, head_dim, dtype, device):
    shapes = [(sum(lengths[0]), heads), (sum(lengths[1]), kv_heads), (sum(lengths[1]), kv_heads)]
    q, k, v = (torch.randn(*shape, head_dim, device=device).to(dtype) for shape in shapes)
    return q, k, v, cumulative(lengths[0], device), cumulative(lengths[1], device)


def explicit(q, k, v, cu_q, cu_k, causal, scale=None):
    """The textbook: the whole matrix of scores of one document at a time, in the inputs' dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True):
        group = q.shape[1] // k.shape[1]
        qs, ks, vs = q[a:b], k[c:d].repeat_interleave(group, 1), v[c:d].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", qs * scale, ks)
        if causal:
            hidden = torch.ones(b - a, d - c, device=q.device).tril(d - c - (b - a)) == 0
            scores = scores.masked_fill(hidden, float("-inf"))
        blind = (scores == float("-inf")).all(-1, keepdim=True)  # rows that see no key
        p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
        outs.append(torch.einsum("hqk,khd->qhd", p, vs))
        lses.append(torch.logsumexp(scores, -1) if d > c else scores.new_full(scores.shape[:2], float("-inf")))
    return torch.cat(outs), torch.cat(lses, 1)


def with_gradients(function, tensors, dout):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    return [out, lse, *torch.autograd.grad(out, leaves, dout)]


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reference_is_the_textbook(monkeypatch, causal, kv_heads):
    monkeypatch.setattr(reference, "ROWS", 16)  # documents of several chunks, the last one ragged
    torch.manual_seed(0)
    *tensors, cu_q, cu_k = packed(UGLY, 4, kv_heads, 24, torch.float64, "cpu")
    dout = torch.randn_like(tensors[0])
    with backend("reference"):
        got = with_gradients(
            lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=causal, return_lse=True), tensors, dout
        )
    expected = with_gradients(lambda q, k, v: explicit(q, k, v, cu_q, cu_k, causal), tensors, dout)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_reference_is_torch_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 300, 4, 32), torch.randn(2, 300, 2, 32), torch.randn(2, 300, 2, 32)
    with backend("reference"):
        got = flash_attn_func(q, k, v, causal=True, softmax_scale=0.3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_causal_is_aligned_to_the_bottom_right():
    """FlashAttention's documented masks: 2 queries over 5 keys, and 5 queries over 2 keys."""
    for queries, keys, rows in ((2, 5, ["11110", "11111"]), (5, 2, ["00", "00", "00", "10", "11"])):
        q, k = torch.zeros(1, queries, 1, 16), torch.zeros(1, keys, 1, 16)
        v = torch.eye(keys, 16)[None, :, None]
        seen = flash_attn_func(q, k, v, causal=True)[0, :, 0, :keys] > 0
        assert ["".join(str(int(x)) for x in row) for row in seen] == rows


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.booleans())
def test_documents_do_not_see_each_other(pairs, causal):
    torch.manual_seed(0)
    lengths = ([a for a, _ in pairs], [b for _, b in pairs])
    q, k, v, cu_q, cu_k = packed(lengths, 2, 1, 16, torch.float32, "cpu")
    together = flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=causal)
    for i, (a, b) in enumerate(pairs):
        at, of = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = flash_attn_func(q[None, at], k[None, of], v[None, of], causal=causal)[0]
        assert alone.shape[0] == a
        assert k[of].shape[0] == b
        torch.testing.assert_close(together[at], alone, rtol=1e-5, atol=1e-5)


# ---- the kernels -----------------------------------------------------------------------------------------------------

LARGE = ([1, 1000, 0, 777, 129, 64], [1, 1000, 9, 1500, 128, 0])
CASES = [
    (torch.float32, 16, 2, 2, UGLY),
    (torch.float32, 32, 4, 2, UGLY),
    (torch.float16, 64, 3, 1, UGLY),
    (torch.float16, 16, 2, 1, ([129], [129])),
    *(
        pytest.param(dtype, head_dim, heads, kv_heads, lengths, marks=pytest.mark.gpu)
        for dtype, head_dim, heads, kv_heads, lengths in [
            (torch.bfloat16, 128, 16, 16, LARGE),
            (torch.bfloat16, 128, 14, 2, LARGE),
            (torch.bfloat16, 64, 8, 1, ([2049], [2049])),
            (torch.bfloat16, 32, 2, 2, UGLY),
            (torch.float16, 128, 4, 4, LARGE),
            (torch.float32, 128, 2, 1, LARGE),
            (torch.float32, 64, 2, 2, ([300, 5], [300, 5])),
        ]
    ),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype,head_dim,heads,kv_heads,lengths", CASES)
def test_kernels(triton, device, nan_filled, check_error, dtype, head_dim, heads, kv_heads, lengths, causal):
    *tensors, cu_q, cu_k = packed(lengths, heads, kv_heads, head_dim, dtype, device)
    dout = torch.randn(tensors[0].shape, device=device).to(dtype)

    def run(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=causal, return_lse=True)

    got, again = with_gradients(run, tensors, dout), with_gradients(run, tensors, dout)
    peer = with_gradients(lambda q, k, v: explicit(q, k, v, cu_q, cu_k, causal), tensors, dout)
    exact = with_gradients(
        lambda q, k, v: explicit(q, k, v, cu_q, cu_k, causal), [x.double() for x in tensors], dout.double()
    )
    for name, a, b, c, d in zip(("out", "lse", "dq", "dk", "dv"), got, again, peer, exact, strict=True):
        assert torch.equal(a, b), name
        if name == "lse":
            torch.testing.assert_close(a.double(), d, rtol=1e-5, atol=1e-5)
        else:
            check_error(a, c, d, name)


def test_packed_projection_is_read_in_place(triton, device, nan_filled):
    heads, kv_heads, head_dim = 4, 2, 16
    cu = cumulative([20, 0, 33, 1], device)
    qkv = torch.randn(54, 3 + 8 * head_dim, device=device)[:, 3:].requires_grad_()  # rows neither adjacent nor aligned
    out = flash_attn_varlen_qkvpacked_func(qkv, cu, num_heads=heads, num_kv_heads=kv_heads, causal=True)
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)  # a gradient of stride 0
    parts = qkv.detach().unflatten(1, (8, head_dim)).split([heads, kv_heads, kv_heads], 1)
    parts = [part.requires_grad_() for part in parts]
    expected = flash_attn_varlen_func(*parts, cu, cu, causal=True)
    assert torch.equal(out, expected.flatten(1))
    gradient = torch.cat(torch.autograd.grad(expected.sum(), parts), 1).flatten(1)
    assert torch.equal(dqkv, gradient)


def test_any_strides(triton, device):
    q, k, v = (torch.randn(2, 16, heads, 19, device=device) for heads in (4, 2, 2))  # (batch, head_dim, heads, seqlen)
    tensors = [x.permute(0, 3, 2, 1).requires_grad_() for x in (q, k, v)]
    expected = flash_attn_func(*(x.contiguous() for x in tensors), causal=True)
    assert torch.equal(flash_attn_func(*tensors, causal=True), expected)


def test_lse_is_differentiable(triton, device, gradients):
    q, k, v, cu_q, cu_k = packed(([20, 9], [25, 9]), 2, 1, 16, torch.float32, device)
    got = gradients(lambda *x: flash_attn_varlen_func(*x, cu_q, cu_k, return_lse=True), (q, k, v))
    expected = gradients(lambda *x: explicit(*x, cu_q, cu_k, False), (q, k, v))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_batch_of_equal_lengths(triton, device):
    q, k, v = (torch.randn(3, n, heads, 16, device=device) for n, heads in ((7, 4), (18, 2), (18, 2)))
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    with backend("reference"):
        expected = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert lse.shape == (3, 4, 7)
    torch.testing.assert_close((out, lse), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries,keys", [(0, 0), (0, 7), (7, 0)])
def test_nothing_to_attend(triton, device, nan_filled, queries, keys):
    q, k = torch.randn(queries, 2, 16, device=device), torch.randn(keys, 2, 16, device=device)
    leaves = [x.requires_grad_() for x in (q, k, k.clone())]
    cu_q, cu_k = cumulative([queries], device), cumulative([keys], device)
    out = flash_attn_varlen_func(*leaves, cu_q, cu_k, causal=True)
    assert torch.equal(out, torch.zeros_like(out))
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_opcheck(opcheck, device):
    q, k, v, cu_q, cu_k = packed(([5, 0, 12], [9, 2, 12]), 4, 2, 16, torch.float32, device)
    opcheck("attention", q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), cu_q, cu_k, 0.25, True, False)
    out, lse = torch.ops.deepseek_coder.attention(q, k, v, cu_q, cu_k, 0.25, True, False)
    tensors = [x.detach() for x in (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)]
    opcheck("attention_backward", *tensors, cu_q, cu_k, 0.25, True, False)
    qkv = torch.randn(17, 8 * 16, device=device)
    opcheck("attention_qkvpacked", qkv.clone().requires_grad_(), cu_q, 4, 2, 0.25, True, False)
    out, lse = torch.ops.deepseek_coder.attention_qkvpacked(qkv, cu_q, 4, 2, 0.25, True, False)
    opcheck("attention_qkvpacked_backward", torch.randn_like(out), qkv, out, lse, cu_q, 4, 2, 0.25, True, False)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled(triton, device, check_compiled, compiler):
    cu = cumulative([20, 13], device)
    positions = torch.arange(33, device=device)

    def block(x, weight):
        qkv = torch.nn.functional.linear(x, weight)
        qkv = apply_rope(qkv, positions, 4, 2, 1e4, 1.0)
        return flash_attn_varlen_qkvpacked_func(qkv, cu, num_heads=4, num_kv_heads=2, causal=True)

    check_compiled(block, torch.randn(33, 24, device=device), torch.randn(8 * 16, 24, device=device), compiler=compiler)
    q, k, v, cu_q, cu_k = packed(([5, 12], [9, 12]), 4, 2, 16, torch.float32, device)

    def separate(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True, return_lse=True)

    check_compiled(separate, q, k, v, compiler=compiler)
    x = torch.randn(2, 9, 2, 16, device=device)
    check_compiled(lambda q: flash_attn_func(q, q, q, causal=True), x, compiler=compiler)


def test_compiled_once_for_all_lengths(triton, device):
    """Documents of other lengths, and other totals, run the same graph."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def block(qkv, positions, cu):
        qkv = apply_rope(qkv * 2, positions, 2, 1, 1e4, 1.0)
        return flash_attn_varlen_qkvpacked_func(qkv, cu, num_heads=2, num_kv_heads=1, causal=True)

    for lengths in ([9, 5], [3, 17], [1, 6]):
        total = sum(lengths)
        qkv, positions = torch.randn(total, 4 * 16, device=device), torch.arange(total, device=device)
        block(qkv, positions, cumulative(lengths, device))
    assert len(graphs) == 1


@pytest.mark.gpu
def test_no_waiting_for_the_gpu(triton, device):
    cu = cumulative([20, 13], device)
    qkv = torch.randn(33, 8 * 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step():
        rotated = apply_rope(qkv * 1, torch.arange(33, device=device), 4, 2, 1e4, 1.0)
        out = flash_attn_varlen_qkvpacked_func(rotated, cu, num_heads=4, num_kv_heads=2, causal=True)
        x = swiglu(rms_norm(out, out[0].detach(), 1e-6, out)[0])
        loss, count = linear_cross_entropy(x, x.detach(), torch.arange(33, device=device))
        return torch.autograd.grad(loss / count, qkv)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_interpreted_bf16_is_computed_in_fp32(triton, device):
    q, k, v, cu_q, cu_k = packed(([40], [40]), 2, 2, 16, torch.bfloat16, device)
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True)
    expected, _ = explicit(q.double(), k.double(), v.double(), cu_q, cu_k, True)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)  # the interpreter truncates when storing


def test_head_dim_without_a_kernel(triton, device):
    x = torch.randn(1, 5, 2, 24, device=device)
    with pytest.raises(ValueError, match="head_dim 16, 32, 64 and 128, not 24"):
        flash_attn_func(x, x, x)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": torch.zeros(4, 3, 16)}, "kv heads do not divide"),
        ({"k": torch.zeros(4, 2, 8)}, "do not fit"),
        ({"v": torch.zeros(5, 2, 16)}, "do not fit"),
        ({"k": torch.zeros(4, 2, 16).half(), "v": torch.zeros(4, 2, 16).half()}, "one floating point dtype"),
        ({x: torch.zeros(4, 2, 16).to(torch.float8_e4m3fn) for x in "qkv"}, "16 bits or more"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, "int32"),
        ({"cu_seqlens_k": torch.tensor([0, 1, 4], dtype=torch.int32)}, "cu_seqlens"),
        ({"q": torch.zeros(4, 4, 16, device="meta")}, "are on meta"),
    ],
)
def test_errors(change, message):
    cu = torch.tensor([0, 4], dtype=torch.int32)
    arguments = {"q": torch.zeros(4, 4, 16), "k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16)}
    arguments |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu} | change
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(**arguments)


def test_packed_errors():
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="does not hold 4 q and 2 k and v heads"):
        flash_attn_varlen_qkvpacked_func(torch.zeros(4, 100), cu, num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="batches of 1 and 2"):
        flash_attn_func(torch.zeros(1, 4, 2, 16), torch.zeros(2, 4, 2, 16), torch.zeros(2, 4, 2, 16))
