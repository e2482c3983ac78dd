"""The Hopper attention: its work lists on the CPU, its kernels on the GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, reference

hopper_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def hopper():
    if not hopper_gpu:
        pytest.skip("needs a CUDA GPU of the Hopper generation")
    torch.manual_seed(1)
    with backend("hopper"):
        yield


def cumulative(lengths, device="cuda"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


# ---- the work lists --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_every_tile_is_listed_once_and_heavy_ones_first(pairs, causal, backward, lightest):
    pytest.importorskip("triton")
    from kernels.attention.schedule import schedule

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own, other = ([pair[i] for pair in pairs] for i in (int(backward), 1 - int(backward)))
    block, across = (128, 64) if backward else (128, 128)
    cu_own, cu_other = cumulative(own, device), cumulative(other, device)
    items, bound = schedule(cu_own, cu_other, sum(own), block, across, causal, backward, lightest)
    rows = items.tolist()
    assert rows[bound][1] == 0  # the counter
    rows = rows[: rows[bound][0]]
    if lightest:  # of two tiles of a document the later one first: the deterministic backward would deadlock otherwise
        rows.reverse()
    expected, weights = set(), []
    for d, (n, m) in enumerate(zip(own, other, strict=True)):
        a, b = int(cu_own[d]), int(cu_other[d])
        for first in range(0, n, block):
            if backward:
                shift = first - (n - m)
                begin = min(max(shift, 0), m) // across if causal else 0
                end = max(math.ceil(m / across), begin + 1)
                expected.add((a + first, n - first, b, (b // across + d) * across, begin, end, shift))
            else:
                expected.add((a + first, n - first, b, first + m - n + 1, m))
    width = 7 if backward else 5
    assert len(rows) == len(expected)
    assert {tuple(row[:width]) for row in rows} == expected
    for row in rows:
        if backward:
            weights.append(row[5] - row[4])
        else:
            visible = max(min(row[4], row[3] + block - 1), 0) if causal else row[4]
            weights.append(max(math.ceil(visible / across), 1))
    assert weights == sorted(weights, reverse=True)
    if backward and lightest:
        check_gate(items.tolist()[: len(rows)], causal)


def check_gate(listed, causal):
    """What the gate of hopper_backward.py waits for before a tile of keys adds to a tile of queries: as many additions
    as there are later tiles of keys that add there, all of them taken up before; or it would wait for ever."""
    for place, (_, keys, _, document, begin, end, shift, *_) in enumerate(listed):
        before = [row for row in listed[:place] if row[3] == document]
        for i in range(begin, end):
            wanted = (keys - 1) // 128
            if causal:
                wanted = min(wanted, int((i * 64 + 63 - shift) / 128))  # rounds to zero, as on the GPU
            assert sum(row[4] <= i < row[5] for row in before) >= wanted


def test_rows_that_the_copy_engine_refuses_are_copied():
    pytest.importorskip("triton")
    from kernels.attention.hopper import _describable

    flat = torch.arange(4 * 2 * 64 + 8, dtype=torch.bfloat16)
    fine = flat[8 : 8 + 512].view(4, 2, 64)
    assert _describable(fine) is fine
    odd = flat[1:513].view(4, 2, 64)  # contiguous, but not at a multiple of 16 bytes
    for x in (
        odd,
        odd[:1, :1],
        fine.transpose(0, 2)[:2],
        fine[:1].expand(4, 2, 64),
        flat[: 129 * 4].view(4, 129)[:, None, 1:],
    ):
        copy = _describable(x)
        assert torch.equal(copy, x)
        assert copy.data_ptr() % 16 == 0
        assert copy.stride() == (copy.shape[1] * copy.shape[2], copy.shape[2], 1)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def inputs(lengths_q, lengths_k, heads, kv_heads, head_dim, dtype):
    q = torch.randn(sum(lengths_q), heads, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, sum(lengths_k), kv_heads, head_dim, device="cuda").to(dtype)
    return q, k, v, cumulative(lengths_q), cumulative(lengths_k)


def run(q, k, v, cu_q, cu_k, dout, dlse, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_varlen_func(*leaves, cu_q, cu_k, return_lse=True, **options)
    loss = (out * dout).sum().float() + (lse.masked_fill(lse == float("-inf"), 0.0) * dlse).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def textbook(q, k, v, cu_q, cu_k, dout, dlse, causal, dtype):
    """Outputs and gradients as plain PyTorch computes them in `dtype`, document by document."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    outs, lses = [], []
    for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True):
        keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in leaves[1:])
        scores = torch.einsum("qhd,khd->hqk", leaves[0][a:b] * q.shape[2] ** -0.5, keys)
        if causal:
            hidden = torch.ones(b - a, d - c, device=q.device).tril(d - c - (b - a)) == 0
            scores = scores.masked_fill(hidden, float("-inf"))
        blind = (scores == float("-inf")).all(-1, keepdim=True)
        p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
        outs.append(torch.einsum("hqk,khd->qhd", p, values))
        lses.append(torch.logsumexp(scores.masked_fill(blind, 0.0), -1).masked_fill(blind[..., 0], 0.0))
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    loss = (out * dout.to(dtype)).sum() + (lse * dlse.to(dtype) * (lse != 0)).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


@pytest.mark.gpu
def test_random_shapes(hopper, nan_filled, check_error):
    """300 packings: lengths around the tiles' borders and others, heads of every grouping, against the 2x rule."""
    generator = torch.Generator().manual_seed(7)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    border = (0, 1, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257)
    for number in range(300):
        documents = draw(1, 5)
        lengths_q = [border[draw(0, 11)] if draw(0, 1) else draw(0, 400) for _ in range(documents)]
        same = draw(0, 2) > 0
        lengths_k = lengths_q if same else [draw(0, 400) for _ in range(documents)]
        if sum(lengths_q) == 0 or sum(lengths_k) == 0:
            continue
        kv_heads = draw(1, 3)
        heads = kv_heads * (1, 1, 2, 7, 16)[draw(0, 4)]
        head_dim, dtype = ((128, torch.bfloat16), (64, torch.float16))[draw(0, 1)]
        causal = bool(draw(0, 1))
        q, k, v, cu_q, cu_k = inputs(lengths_q, lengths_k, heads, kv_heads, head_dim, dtype)
        dout, dlse = torch.randn_like(q), torch.randn(heads, q.shape[0], device="cuda")
        got = run(q, k, v, cu_q, cu_k, dout, dlse, causal=causal)
        peer = textbook(q, k, v, cu_q, cu_k, dout, dlse, causal, dtype)
        exact = textbook(q, k, v, cu_q, cu_k, dout, dlse, causal, torch.float64)
        case = f"{number}: {lengths_q} {lengths_k} {heads}/{kv_heads} {head_dim} {dtype} causal={causal}"
        for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, peer, exact, strict=True):
            if name == "lse":
                seen = a != float("-inf")
                torch.testing.assert_close(a[seen].double(), c[seen], rtol=1e-4, atol=1e-4, msg=case)
            else:
                check_error(a, b, c, f"{name} of {case}")


@pytest.mark.gpu
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (14, 2), (32, 1)])
def test_long_documents(hopper, heads, kv_heads):
    """Against the reference in fp32, at lengths where rings and counters go round many times."""
    tensors = inputs([9000, 1, 3001], [9000, 1, 3001], heads, kv_heads, 128, torch.bfloat16)
    dout, dlse = torch.randn_like(tensors[0]), torch.zeros(heads, 12002, device="cuda")
    got = run(*tensors, dout, dlse, causal=True)
    with backend("reference"):
        q, k, v, cu, _ = tensors
        exact = run(q.float(), k.float(), v.float(), cu, cu, dout.float(), dlse, causal=True)
    for one, other in zip(got, exact, strict=True):
        assert ((one.float() - other).norm() / other.norm()).item() < 4e-3


@pytest.mark.gpu
def test_repeats(hopper):
    """The forward is the same bits each time; so is the backward where that is asked for."""
    tensors = inputs([700, 0, 1300], [700, 0, 1300], 8, 2, 128, torch.bfloat16)
    dout, dlse = torch.randn_like(tensors[0]), torch.randn(8, 2000, device="cuda")
    first = run(*tensors, dout, dlse, causal=True, deterministic=True)
    for _ in range(20):
        again = run(*tensors, dout, dlse, causal=True, deterministic=True)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
def test_fused_projection_is_read_in_place(hopper):
    heads, kv_heads, cu = 8, 2, cumulative([300, 0, 513])
    qkv = torch.randn(813, 12 * 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.max_memory_allocated()
    out = flash_attn_varlen_qkvpacked_func(qkv, cu, num_heads=heads, num_kv_heads=kv_heads, causal=True)
    results = out.numel() * 2 + heads * 813 * 4
    assert torch.cuda.max_memory_allocated() - before < results + 2**15, "a copy of the projection would show here"
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)  # a gradient of stride 0
    parts = qkv.detach().unflatten(1, (12, 128)).split([heads, kv_heads, kv_heads], 1)
    parts = [part.contiguous().requires_grad_() for part in parts]
    expected = flash_attn_varlen_func(*parts, cu, cu, causal=True)
    assert torch.equal(out, expected.flatten(1))
    gradients = torch.cat(torch.autograd.grad(expected, parts, torch.ones_like(expected)), 1).flatten(1)
    torch.testing.assert_close(dqkv, gradients, rtol=2e-2, atol=2e-2)  # dQ is added up in any order


@pytest.mark.gpu
def test_any_strides(hopper):
    q, k, v = (torch.randn(2, heads, 300, 128, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads outside of the sequence
    k = k[:, :, :1].expand(-1, -1, 2, -1)  # heads of stride 0
    expected = flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(flash_attn_func(q, k, v, causal=True), expected)
    odd = torch.randn(1, 300, 4, 129, device="cuda", dtype=torch.bfloat16)[..., 1:]  # rows that the copy engine refuses
    assert torch.equal(flash_attn_func(odd, odd, odd), flash_attn_func(*[odd.contiguous()] * 3))


@pytest.mark.gpu
def test_offsets_beyond_32_bits(hopper):
    """A packing whose tensors hold more than 2^31 numbers: the last document must be what it is alone."""
    length, heads = 2048, 16
    documents = 2**31 // (length * heads * 128) + 2
    q = torch.randn(documents * length, heads, 128, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    cu = cumulative([length] * documents)
    out = flash_attn_varlen_func(q, q[:, :1], q[:, 1:2], cu, cu, causal=True)
    last = q[-length:]
    alone = flash_attn_func(last[None], last[None, :, :1], last[None, :, 1:2], causal=True)[0]
    assert torch.equal(out[-length:], alone)


@pytest.mark.gpu
def test_graph_capture_and_replay(hopper):
    tensors = inputs([300, 212], [300, 212], 4, 2, 128, torch.bfloat16)
    dout, dlse = torch.randn_like(tensors[0]), torch.zeros(4, 512, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*tensors, dout, dlse, causal=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*tensors, dout, dlse, causal=True)
    tensors[0].copy_(torch.randn_like(tensors[0]))
    tensors[3].copy_(cumulative([100, 412]))  # other lengths, same total
    tensors[4].copy_(tensors[3])
    graph.replay()
    torch.cuda.synchronize()
    expected = run(*tensors, dout, dlse, causal=True)
    for one, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_opcheck_and_compile(hopper, check_compiled):
    q, k, v, cu_q, cu_k = inputs([70, 0, 12], [99, 2, 12], 4, 2, 64, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    test = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.deepseek_coder.attention.default, (*leaves, cu_q, cu_k, 0.25, True, False), test_utils=test
    )

    def attend(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True, return_lse=True)

    expected = attend(*leaves)
    compiled = torch.compile(attend, fullgraph=True)(*leaves)
    for one, other in zip(compiled, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_no_waiting_for_the_gpu(hopper):
    tensors = inputs([300, 212], [300, 212], 4, 4, 128, torch.bfloat16)
    leaves = [x.requires_grad_() for x in tensors[:3]]

    def step():
        out = flash_attn_varlen_func(*leaves, *tensors[3:], causal=True)
        return torch.autograd.grad(out, leaves, out.detach())

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_what_hopper_does_not_take(hopper):
    x = torch.randn(1, 5, 2, 32, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'hopper' was asked for, but the Hopper attention has fp16 and bf16"):
        flash_attn_func(x, x, x)
    with backend("auto"), pytest.warns(RuntimeWarning, match="portable Triton kernels"):
        out = flash_attn_func(x, x, x)
    expected, _ = reference.attention(x[0], x[0], x[0], cumulative([5]), cumulative([5]), 32**-0.5, False)
    torch.testing.assert_close(out[0], expected, rtol=2e-2, atol=2e-2)
