"""Attention over a cache: the split-KV kernels against the textbook, in every layout that a cache can have."""

import importlib
import random

import pytest
import torch

from kernels import backend, flash_attn_func, flash_attn_with_kvcache


def explicit(q, k, v, causal, scale):
    """The textbook for one sequence: q (queries, heads, head_dim), k and v (keys, kv_heads, head_dim)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q * scale, k)
    if causal:
        hidden = torch.ones(q.shape[0], k.shape[0], device=q.device).tril(k.shape[0] - q.shape[0]) == 0
        scores = scores.masked_fill(hidden, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # rows that see no key
    p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.einsum("hqk,khd->qhd", p, v), torch.logsumexp(scores, -1)


class Problem:
    """Random sequences in a cache whose unused slots hold NaN; pages in shuffled order, unused table entries -1."""

    def __init__(self, lengths, queries, heads, kv_heads, head_dim, dtype, device, page=None, capacity=None, new=0):
        capacity = capacity or max(*lengths, 1) + 3
        self.lengths, self.new = lengths, new
        batch = len(lengths)
        self.q = torch.randn(batch, queries, heads, head_dim, device=device).to(dtype)
        self.k, self.v = (torch.randn(2, batch, capacity, kv_heads, head_dim, device=device)).to(dtype)
        self.seqlens = torch.tensor(lengths, device=device, dtype=torch.int32) - new
        old = torch.arange(capacity, device=device) < self.seqlens[:, None]
        caches = [x.masked_fill(~old[..., None, None], float("nan")) for x in (self.k, self.v)]
        self.table = None
        if page:
            blocks = -(-capacity // page)
            order = torch.randperm(batch * blocks + 2, device=device)[: batch * blocks].view(batch, blocks)
            for i, x in enumerate(caches):
                pages = x.new_full((batch * blocks + 2, page, kv_heads, head_dim), float("nan"))
                padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * page - capacity), value=float("nan"))
                pages[order] = padded.unflatten(1, (blocks, page))
                caches[i] = pages
            used = torch.tensor([-(-n // page) for n in lengths], device=device)
            self.table = order.int().masked_fill(torch.arange(blocks, device=device) >= used[:, None], -1)
        self.k_cache, self.v_cache = caches

    def run(self, **options):
        if self.new:
            at = [slice(n - self.new, n) for n in self.lengths]
            options["k"], options["v"] = (torch.stack([x[i, s] for i, s in enumerate(at)]) for x in (self.k, self.v))
        return flash_attn_with_kvcache(
            self.q, self.k_cache, self.v_cache, cache_seqlens=self.seqlens, block_table=self.table,
            return_softmax_lse=True, **options,
        )  # fmt: skip

    def textbook(self, causal, scale, dtype=None):
        q, k, v = (x.to(dtype or x.dtype) for x in (self.q, self.k, self.v))
        outs = [explicit(q[i], k[i, :n], v[i, :n], causal, scale) for i, n in enumerate(self.lengths)]
        return torch.stack([out for out, _ in outs]), torch.stack([lse for _, lse in outs])


def verify(problem, check_error, causal, scale=None, **options):
    out, lse = problem.run(causal=causal, softmax_scale=scale, **options)
    scale = problem.q.shape[-1] ** -0.5 if scale is None else scale
    peer, _ = problem.textbook(causal, scale)
    exact, exact_lse = problem.textbook(causal, scale, torch.float64)
    check_error(out, peer, exact, "out")
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


MODELS = [(4, 4), (14, 2), (8, 1)]  # MHA, the 33B model's groups of seven, MQA


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page", [None, 1, 5, 16])
@pytest.mark.parametrize(
    "heads,kv_heads,queries,new,dtype",
    [
        (4, 4, 1, 1, torch.float32),
        (14, 2, 3, 0, torch.float16),
        (8, 1, 16, 16, torch.float32),
        (2, 1, 1, 0, torch.half),
    ],
)
def test_kernels(triton, device, nan_filled, check_error, heads, kv_heads, queries, new, dtype, page, causal):
    """Ugly lengths: one token, tiles' ends, an empty sequence, fewer keys than queries."""
    lengths = [max(n, new) for n in (1, 33, 0, 50)]
    problem = Problem(lengths, queries, heads, kv_heads, 16, dtype, device, page, new=new)
    for splits in (0, 1, 3):
        verify(problem, check_error, causal, num_splits=splits)
    verify(problem, check_error, causal, scale=0.1, fixed_split_size=16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("page", [None, 16, 256])
@pytest.mark.parametrize("heads,kv_heads", [(16, 16), (56, 8), (32, 1)])
def test_models(triton, device, nan_filled, check_error, heads, kv_heads, page, dtype):
    """Decoding, verification of 16 guesses, and a chunk of a long prompt."""
    for queries, lengths in ((1, [4096, 1, 700]), (16, [1000, 16]), (300, [300, 1111])):
        problem = Problem(lengths, queries, heads, kv_heads, 128, dtype, device, page, new=queries)
        verify(problem, check_error, True)
        verify(problem, check_error, True, num_splits=7)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kv_heads,group,head_dim,page,causal,dtype",
    [  # few, since each combination is compiled
        (16, 1, 128, 16, True, torch.bfloat16),
        (8, 7, 128, 1, True, torch.float16),
        (1, 32, 128, 64, False, torch.bfloat16),
        (3, 2, 64, None, True, torch.bfloat16),
    ],
)
def test_random_shapes(triton, device, nan_filled, check_error, kv_heads, group, head_dim, page, causal, dtype):
    draw = random.Random(kv_heads)
    for _ in range(125):
        queries = draw.choice([1, 1, 1, 2, 5, 16, 65])
        lengths = [draw.randrange(queries, draw.choice([70, 1000, 3000])) for _ in range(draw.randrange(1, 5))]
        new = draw.choice([0, queries])
        problem = Problem(lengths, queries, kv_heads * group, kv_heads, head_dim, dtype, device, page, new=new)
        options = draw.choice([{}, {"num_splits": draw.randrange(1, 20)}, {"fixed_split_size": draw.randrange(1, 300)}])
        verify(problem, check_error, causal, **options)


@pytest.mark.parametrize("heads,kv_heads", MODELS)
def test_fixed_splits_do_not_know_the_batch(triton, device, heads, kv_heads):
    """The same bits alone, in a batch, and with another capacity."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths, head_dim = [70, 3, 49, 120], 128 if device == "cuda" else 16  # of tiles of 64 keys, or 16: several ranges
    for fixed in (16, 32, 1000):
        torch.manual_seed(7)
        problem = Problem(lengths, 2, heads, kv_heads, head_dim, dtype, device, 4, capacity=160)
        together = problem.run(causal=True, fixed_split_size=fixed)[0]
        for i in range(len(lengths)):
            alone = flash_attn_with_kvcache(
                problem.q[i, None], problem.k_cache, problem.v_cache, cache_seqlens=problem.seqlens[i, None],
                block_table=problem.table[i, None, : -(-lengths[i] // 4)].contiguous(), causal=True,
                fixed_split_size=fixed,
            )  # fmt: skip
            assert torch.equal(alone[0], together[i])


def test_query_heads_far_apart(triton, device):
    """The third head is 2^31 elements behind the first; of the memory only a few pages are touched."""
    memory = torch.empty(2**32 + 16, dtype=torch.float16, device=device)
    q = memory.as_strided((1, 1, 3, 16), (16, 16, 2**30, 1), 2**31).copy_(torch.randn(1, 1, 3, 16))
    k, v = torch.randn(2, 1, 40, 1, 16, dtype=torch.float16, device=device)
    assert torch.equal(flash_attn_with_kvcache(q, k, v), flash_attn_with_kvcache(q.contiguous(), k, v))


def test_cache_without_room(triton, device):
    q, cache = torch.randn(1, 1, 2, 16, device=device), torch.zeros(1, 0, 2, 16, device=device)
    pages, table = torch.zeros(3, 4, 2, 16, device=device), torch.zeros(1, 0, device=device, dtype=torch.int32)
    for k, block_table in ((cache, None), (pages, table)):
        for splits in (0, 2):
            seqlens = torch.zeros(1, device=device, dtype=torch.int32)
            out, lse = flash_attn_with_kvcache(
                q, k, k, cache_seqlens=seqlens, block_table=block_table, num_splits=splits, return_softmax_lse=True
            )
            assert torch.equal(out, torch.zeros_like(q))
            assert lse.isneginf().all()


def test_twenty_runs_give_the_same_bits(triton, device):
    problem = Problem([130, 77], 2, 4, 2, 16, torch.float16, device, 16)
    expected = problem.run(num_splits=5)
    for _ in range(20 if device == "cuda" else 2):
        assert all(map(torch.equal, problem.run(num_splits=5), expected))


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_fp8_cache(triton, device, name, queries):
    """Values that fp8 holds exactly (the interpreter rounds others wrongly), but for one that is clamped."""
    k_descale, v_descale = (torch.tensor(x, device=device) for x in ([0.25, 2.0], [1.0, 0.5]))
    k, v = (torch.randint(-15, 16, (1, 40, 2, 16), device=device) / 4 * d[:, None] for d in (k_descale, v_descale))
    k[0, 3, 0, 0] = 1000.0
    q = torch.randn(1, queries, 6, 16, device=device, dtype=torch.half)
    caches = [torch.zeros(1, 48, 2, 16, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
    with backend(name):
        out = flash_attn_with_kvcache(
            q, *caches, k.half(), v.half(), causal=True, num_splits=2, k_descale=k_descale, v_descale=v_descale
        )
    k[0, 3, 0, 0] = 448 * k_descale[0]
    for cache, x, d in zip(caches, (k, v), (k_descale, v_descale), strict=True):
        assert torch.equal(cache[:, :40].float() * d[:, None], x)
    expected, _ = explicit(q[0].float(), k[0], v[0], True, 0.25)
    torch.testing.assert_close(out[0].float(), expected, rtol=4e-3, atol=4e-3)


def test_interpreted_bf16_is_computed_in_fp32(triton, device):
    problem = Problem([40], 1, 2, 2, 16, torch.bfloat16, device, 4)
    out, _ = problem.run()
    expected, _ = problem.textbook(False, 0.25, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=2**-7)  # the interpreter truncates when storing


def test_opcheck(opcheck, device):
    problem = Problem([9, 20], 2, 4, 2, 16, torch.float32, device, 4)
    caches = problem.k_cache, problem.v_cache
    opcheck(
        "attention_with_kvcache", problem.q, *caches, problem.seqlens, 0, problem.table, None, None, 0.25, True, 3, 0
    )
    new = torch.randn(2, 3, 2, 16, device=device)
    opcheck("append_kv", new, new, *caches, problem.seqlens, problem.table.clamp(min=0), None, None)


def test_split_count():
    from kernels.attention.decode import split_count

    assert split_count(16, 256, 128, 264) == 16  # 256 programs of 264 at a time
    assert split_count(256, 256, 128, 264) == 1  # as good as full
    assert split_count(1, 256, 128, 264) == 128  # 122 would be ranges of three tiles, and 36 of them empty
    assert split_count(1, 1, 0, 264) == 1
    assert split_count(144, 256, 128, 264) > 1  # one split would leave half of them idle
    for programs in range(1, 600):
        assert 1 <= split_count(programs, 256, 128, 264) <= 128


@pytest.mark.parametrize(
    "batch,kv_heads,rows,capacity,block,splits",
    [
        (1, 16, 1, 16384, 32, 24),  # one sequence: three programs a multiprocessor, in narrow tiles
        (1, 8, 7, 16384, 32, 47),
        (1, 32, 1, 16384, 64, 8),  # ranges are long enough for wide ones
        (1, 1, 32, 16384, 32, 128),  # two tiles a range
        (8, 8, 7, 16384, 64, 4),
        (64, 8, 7, 2048, 32, 1),  # two rounds of programs
        (3, 2, 4, 0, 32, 1),  # no room at all
    ],
)
def test_plan(monkeypatch, batch, kv_heads, rows, capacity, block, splits):
    """What was fastest on an H200, 132 multiprocessors."""
    decode = importlib.import_module("kernels.attention.decode")
    monkeypatch.setattr(decode, "interpreting", lambda: False)
    plan = decode._plan.__wrapped__  # another interpreter's answers are cached
    sizes, count = plan(batch * kv_heads, capacity, rows, 128, torch.bfloat16, True, 132)
    assert (sizes["BLOCK_N"], count) == (block, splits)
    assert plan(batch * kv_heads, capacity, rows, 128, torch.bfloat16, False, 132)[0]["BLOCK_N"] == 64


def test_head_dim_without_a_kernel(triton, device):
    x = torch.randn(1, 5, 2, 24, device=device)
    with pytest.raises(ValueError, match="head_dim 16, 32, 64 and 128, not 24"):
        flash_attn_with_kvcache(x, x, x)


@pytest.mark.gpu
def test_one_graph_serves_all_lengths(triton, device):
    """Captured once, replayed for other tokens, lengths and pages; nothing waits for the GPU."""
    problem = Problem([70, 300], 1, 14, 2, 128, torch.bfloat16, device, 16, capacity=2048)
    problem.k_cache.nan_to_num_(), problem.v_cache.nan_to_num_()
    problem.table.clamp_(min=0)
    k, v = torch.randn(2, 2, 1, 2, 128, device=device, dtype=torch.bfloat16)

    def step():
        return flash_attn_with_kvcache(
            problem.q, problem.k_cache, problem.v_cache, k, v, problem.seqlens, problem.table, causal=True
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([5, 1999], [0, 64], [1024, 1]):
        problem.seqlens.copy_(torch.tensor(lengths))
        problem.q.normal_()
        problem.table.copy_(torch.randperm(problem.table.numel(), device=device).view_as(problem.table))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, step())
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_decoding_equals_one_pass(triton, device):
    """A prompt in chunks, then one token at a time, over pages."""
    q, k, v = (torch.randn(1, 40, heads, 16, device=device) for heads in (4, 2, 2))
    caches = [torch.full((12, 5, 2, 16), float("nan"), device=device) for _ in range(2)]
    table = torch.randperm(12, device=device)[:10].int()[None]
    parts, start = [], 0
    for size in (17, 16, 1, 1, 1, 4):
        at = slice(start, start + size)
        arguments = q[:, at], *caches, k[:, at], v[:, at], start, table
        parts.append(flash_attn_with_kvcache(*arguments, causal=True, num_splits=2))
        start += size
    expected = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
