import importlib
from types import SimpleNamespace

import pytest
import torch

from kernels import (
    apply_rope,
    apply_rope_and_write_kv,
    backend,
    flash_attn_func,
    flash_attn_with_kvcache,
    reference,
    write_kv,
)

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@pytest.fixture(autouse=True, params=["triton", "reference"])
def each_backend(request, device):
    if request.param == "triton":
        pytest.importorskip("triton")
    with backend(request.param):
        yield request.param


def random_caches(device, *shape):
    return [torch.randn(*shape, KV_HEADS, HEAD_DIM, device=device) for _ in range(2)]


def test_write(device):
    k, v = random_caches(device, 5)
    slots = torch.tensor([6, -1, 0, -1, 11], device=device)
    for dtype in (torch.int32, torch.int64):
        k_cache, v_cache = random_caches(device, 4, 3)
        expected = [x.clone() for x in (k_cache, v_cache)]
        for cache, new in zip(expected, (k, v), strict=True):
            for row, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    cache[slot // 3, slot % 3] = new[row]
        write_kv(k, v, k_cache, v_cache, slots.to(dtype))
        assert torch.equal(k_cache, expected[0])
        assert torch.equal(v_cache, expected[1])


def test_write_nothing(device):
    k, v = random_caches(device, 3)
    k_cache, v_cache = random_caches(device, 4, 3)
    before = k_cache.clone()
    write_kv(k, v, k_cache, v_cache, torch.full((3,), -1, device=device))
    write_kv(k[:0], v[:0], k_cache, v_cache, torch.zeros(0, dtype=torch.int32, device=device))
    assert torch.equal(k_cache, before)


def test_write_into_a_strided_cache(device):
    both = torch.zeros(4, 3, 2, KV_HEADS, HEAD_DIM, device=device)
    k, v = random_caches(device, 2)
    write_kv(k, v, both[:, :, 0], both[:, :, 1], torch.tensor([4, 9], device=device))
    assert torch.equal(both[1, 1, 0], k[0])
    assert torch.equal(both[3, 0, 1], v[1])
    assert both.count_nonzero() == 4 * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("table,lengths", [([[2], [-1]], [0, 0]), (None, [0, -1]), (None, [-3, 8])])
def test_append_stays_in_the_sequence(each_backend, device, table, lengths):
    """A page that is not there, a negative length, as a padded batch may have them: nothing is written there."""
    pool = [torch.zeros(5, 8, KV_HEADS, HEAD_DIM, device=device) for _ in range(2)]
    caches = [x[1:4] if table else x[1:3] for x in pool]
    k, v = (torch.ones(2, 1, KV_HEADS, HEAD_DIM, device=device) for _ in range(2))
    tables = None if table is None else torch.tensor(table, dtype=torch.int32, device=device)
    torch.ops.deepseek_coder.append_kv(k, v, *caches, torch.tensor(lengths, device=device), tables, None, None)
    written = 1 if lengths[0] == 0 else 0
    for x, cache in zip(pool, caches, strict=True):
        assert x.count_nonzero() == written * KV_HEADS * HEAD_DIM
        assert cache[2 if table else 0, 0].count_nonzero() == written * KV_HEADS * HEAD_DIM


@pytest.mark.parametrize("rotate", [False, True])
def test_nan_stays_in_fp8(device, rotate):
    """By the kernels on a GPU only: Triton's interpreter makes numbers of NaN in fp8."""
    caches = [torch.zeros(1, 1, KV_HEADS, HEAD_DIM, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
    qkv = torch.full((1, 3 * KV_HEADS, HEAD_DIM), float("nan"), device=device)
    at, descales = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(2, KV_HEADS, device=device)
    with backend("auto" if device == "cuda" else "reference"):
        if rotate:
            apply_rope_and_write_kv(qkv.flatten(1), at, KV_HEADS, KV_HEADS, 1e4, 1.0, *caches, at, *descales)
        else:
            write_kv(qkv[:, :KV_HEADS], qkv[:, -KV_HEADS:], *caches, at, *descales)
    assert all(cache.float().isnan().all() for cache in caches)


def test_gpus_without_fp8(monkeypatch):
    module = importlib.import_module("kernels.kv_cache")
    cache = SimpleNamespace(dtype=torch.float8_e4m3fn, is_cuda=True, device="an A100", stride=lambda _: 1)
    monkeypatch.setattr(module, "_has_fp8", lambda device: device != "an A100")
    assert "8.9" in module._unsupported(cache)
    cache.device = "an H200"
    assert module._unsupported(cache) is None


@pytest.mark.parametrize("rotate", [False, True])
def test_heads_far_apart(each_backend, device, rotate):
    """A cache whose outer dimension is the heads: the third begins 2^31 elements behind the first, which 32 bits would
    take for as many before it. Of the memory, fp8, only a few pages are touched."""
    memory = torch.empty(2**32 + 512, dtype=torch.float8_e4m3fn, device=device)
    strides = 3 * HEAD_DIM, HEAD_DIM, 2**30, 1
    caches = [memory.as_strided((4, 3, 3, HEAD_DIM), strides, 2**31 + offset) for offset in (0, 256)]
    qkv = torch.randint(-15, 16, (2, 9, HEAD_DIM), device=device) / 4
    slots, positions = torch.tensor([4, 9], device=device), torch.zeros(2, dtype=torch.int32, device=device)
    descales = torch.ones(2, 3, device=device)
    if rotate:  # by nothing, at position 0
        apply_rope_and_write_kv(qkv.flatten(1), positions, 3, 3, 1e4, 1.0, *caches, slots, *descales)
    else:
        write_kv(qkv[:, 3:6], qkv[:, 6:], *caches, slots, *descales)
    for cache, new in zip(caches, (qkv[:, 3:6], qkv[:, 6:]), strict=True):
        assert torch.equal(cache.float().flatten(0, 1)[slots], new)


def paged(cache, page, generator):
    """The same cache in pages of shuffled order: pages, block table; unused entries of the table are -1."""
    batch, max_len = cache.shape[:2]
    blocks = max_len // page
    table = torch.randperm(batch * blocks, generator=generator).view(batch, blocks).to(cache.device)
    pages = torch.empty(batch * blocks, page, *cache.shape[2:], device=cache.device)
    pages[table.flatten()] = cache.view(batch * blocks, page, *cache.shape[2:])
    return pages, table.int()


def masked_instead(q, k_cache, v_cache, lengths, *rest):
    return reference.cached_attention_masked(q, k_cache, v_cache, torch.tensor(lengths, device=q.device), *rest)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page", [None, 1, 4])
@pytest.mark.parametrize("queries,new", [(1, 1), (5, 5), (3, 0), (2, 7)])
def test_attention_over_the_cache(device, monkeypatch, each_backend, queries, new, page, causal, masked):
    """Against attention over the plain concatenation; `masked`: the reference as on GPUs, where it knows no length."""
    if masked and each_backend != "reference":
        return
    monkeypatch.setattr(reference, "ROWS", 2)
    starts, max_len = torch.tensor([0, 9, 3], device=device), 16
    q = torch.randn(3, queries, HEADS, HEAD_DIM, device=device)
    old_k, old_v = random_caches(device, 3, max_len)
    k, v = random_caches(device, 3, new)
    unused = torch.arange(max_len, device=device) >= starts[:, None]
    k_cache, v_cache = (x.masked_fill(unused[:, :, None, None], float("nan")) for x in (old_k, old_v))
    table = None
    if page is not None:
        generator = torch.Generator().manual_seed(0)
        k_cache, table = paged(k_cache, page, generator)
        v_cache, _ = paged(v_cache, page, generator.manual_seed(0))
    if masked:
        monkeypatch.setattr(reference, "cached_attention_by_sequence", masked_instead)
    new_kv = {} if new == 0 else {"k": k, "v": v}
    options = {"cache_seqlens": starts.int(), "block_table": table, "causal": causal, "return_softmax_lse": True}
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, **new_kv, **options)
    for i, start in enumerate(starts.tolist()):
        keys, values = (torch.cat([a[i, :start], b[i]]) for a, b in ((old_k, k), (old_v, v)))
        expected, expected_lse = flash_attn_func(q[i, None], keys[None], values[None], causal=causal, return_lse=True)
        torch.testing.assert_close(out[i], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[i], expected_lse[0], rtol=1e-4, atol=1e-5)


def test_decoding_equals_one_pass(device):
    """Prefill, then one token at a time, in half precision: what a generation loop does."""
    q, k, v = (torch.randn(1, 20, heads, HEAD_DIM, device=device).half() for heads in (HEADS, KV_HEADS, KV_HEADS))
    k_cache, v_cache = (torch.empty(1, 32, KV_HEADS, HEAD_DIM, device=device, dtype=torch.half) for _ in range(2))
    parts = [flash_attn_with_kvcache(q[:, :13], k_cache, v_cache, k[:, :13], v[:, :13], causal=True)]
    for i in range(13, 20):
        at = slice(i, i + 1)
        parts.append(
            flash_attn_with_kvcache(q[:, at], k_cache, v_cache, k[:, at], v[:, at], cache_seqlens=i, causal=True)
        )
    expected = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(k_cache[:, :20], k)


def test_compiled(device):
    k_cache, v_cache = random_caches(device, 2, 8)
    k, v = random_caches(device, 2, 1)
    q, lengths = torch.randn(2, 1, HEADS, HEAD_DIM, device=device), torch.tensor([3, 7], device=device)

    def step(q, k_cache, v_cache):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, lengths)

    expected = step(q, k_cache.clone(), v_cache.clone())
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k_cache, v_cache), expected)
    assert torch.equal(k_cache[0, 3], k[0, 0])


@pytest.mark.gpu
def test_no_waiting_for_the_gpu(device):
    k_cache, v_cache = random_caches(device, 2, 8)
    k, v = random_caches(device, 2, 1)
    q, lengths = torch.randn(2, 1, HEADS, HEAD_DIM, device=device), torch.tensor([3, 7], device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("page", [1, 3])
def test_rotate_and_write(device, page):
    """The same as rotating, splitting and writing; v is not rotated, and a skipped row rotates nevertheless."""
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=device)
    positions, slots = torch.tensor([7, 0, 3, 1, 2], device=device), torch.tensor([6, -1, 0, -5, 11], device=device)
    caches = random_caches(device, 12 // page, page)
    expected_caches = [x.clone() for x in caches]
    expected = apply_rope(qkv.clone(), positions, HEADS, KV_HEADS, 1e4, 2.0)
    _, k, v = expected.unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
    write_kv(k, v, *expected_caches, slots)
    result = apply_rope_and_write_kv(qkv, positions, HEADS, KV_HEADS, 1e4, 2.0, *caches, slots)
    assert result.data_ptr() == qkv.data_ptr()
    for one, other in zip((qkv, *caches), (expected, *expected_caches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_write_fp8(device):
    """Multiples of a quarter below 4 are exact in e4m3; what is beyond its range is clamped."""
    k, v = (torch.randint(-15, 16, (4, KV_HEADS, HEAD_DIM), device=device) / 4 for _ in range(2))
    k[0, 0, 0] = -1e4
    qkv = torch.cat([torch.zeros(4, HEADS, HEAD_DIM, device=device), k, v], 1).flatten(1)
    slots, positions = torch.tensor([3, 5, -1, 0], device=device), torch.zeros(4, dtype=torch.int32, device=device)
    descales = torch.tensor([2.0, 0.5], device=device), torch.tensor([0.25, 1.0], device=device)
    for rotate in (False, True):
        caches = [torch.zeros(2, 3, KV_HEADS, HEAD_DIM, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
        if rotate:  # by nothing, at position 0
            apply_rope_and_write_kv(qkv.clone(), positions, HEADS, KV_HEADS, 1e4, 1.0, *caches, slots, *descales)
        else:
            write_kv(k, v, *caches, slots, *descales)
        for x, cache, descale in zip((k, v), caches, descales, strict=True):
            expected = torch.zeros(6, KV_HEADS, HEAD_DIM, device=device)
            expected[[3, 5, 0]] = x[[0, 1, 3]].clamp(min=-448 * descale[0])
            assert torch.equal(cache.float().flatten(0, 1) * descale[:, None], expected)


def test_opcheck(each_backend, device):
    caches = random_caches(device, 4, 3)
    k, v = random_caches(device, 5)
    slots, op = torch.tensor([6, -1, 0, 2, 11], device=device), torch.ops.deepseek_coder
    torch.library.opcheck(op.write_kv.default, (k, v, *caches, slots, None, None))
    seqlens, table = torch.tensor([1], device=device, dtype=torch.int32), torch.tensor([[2, 1]], device=device).int()
    torch.library.opcheck(op.append_kv.default, (k[None], v[None], *caches, seqlens, table, None, None))
    qkv, positions = torch.randn(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=device), torch.arange(5, device=device)
    torch.library.opcheck(op.rope_write_kv.default, (qkv, positions, *caches, slots, HEADS, 1e4, 1.0, None, None))


def test_errors():
    k_cache, v_cache = random_caches("cpu", 2, 8)
    k, v = random_caches("cpu", 2, 3)
    q = torch.zeros(2, 3, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="9 entries do not fit a cache of 8"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=6)
    with pytest.raises(ValueError, match="both k and v"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k)
    with pytest.raises(ValueError, match="do not fit each other"):
        flash_attn_with_kvcache(q[:1], k_cache, v_cache)
    with pytest.raises(ValueError, match="block_table"):
        flash_attn_with_kvcache(q, k_cache, v_cache, block_table=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="slot_mapping"):
        write_kv(k[0], v[0], k_cache, v_cache, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="cache_seqlens -1 is outside"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=-1)
    with pytest.raises(ValueError, match="num_splits 65536 is outside"):
        flash_attn_with_kvcache(q, k_cache, v_cache, num_splits=65536)
    with pytest.raises(ValueError, match="do not fit each other"):
        flash_attn_with_kvcache(q, k_cache[:, :, :0], v_cache[:, :, :0])
    fp8, slots = [x.to(torch.float8_e4m3fn) for x in (k_cache, v_cache)], torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="needs k_descale"):
        write_kv(k[0], v[0], *fp8, slots)
    with pytest.raises(ValueError, match="contiguous fp32"):
        write_kv(k[0], v[0], *fp8, slots, *[torch.ones(1).expand(KV_HEADS)] * 2)
    qkv, positions = torch.zeros(3, 6 * HEAD_DIM), torch.arange(3)
    with pytest.raises(ValueError, match="heads of 16 do not fit the cache"):
        apply_rope_and_write_kv(qkv, positions, 4, 1, 1e4, 1.0, k_cache, v_cache, positions)
    with pytest.raises(ValueError, match="the caches"):
        write_kv(k[0].half(), v[0].half(), k_cache, v_cache, torch.zeros(3, dtype=torch.int64))
