"""Sampling: the distribution, each filter, and that no row knows its neighbours."""

import importlib
import math

import pytest
import torch

from kernels import backend, reference, sample

sampling = importlib.import_module("kernels.sampling")

ROW = torch.tensor([1.0, 3.0, 0.5, 2.0, 2.9, -4.0])


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.gpu)])  # too many draws to interpret
def each_backend(request):
    with backend(request.param):
        yield request.param


@pytest.fixture
def kernel_and_reference(device):
    """Arguments of sample -> the ids of the Triton kernel and of the reference, which sorts."""
    pytest.importorskip("triton")

    def both(*arguments):
        with backend("triton"):
            ours = sample(*arguments)
        with backend("reference"):
            return ours, sample(*arguments)

    return both


def draws(row, count=20000, **parameters):
    """How often each id was drawn, over `count` seeds."""
    arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | parameters
    ids = sample(row.expand(count, -1), **arguments, seeds=torch.arange(count, device=row.device))
    return torch.bincount(ids, minlength=row.shape[0]).double().cpu()


def chi_square(counts, probabilities):
    expected = probabilities.double().cpu() * counts.sum()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    return ((counts - expected)[seen].square() / expected[seen]).sum().item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution(each_backend, device, temperature):
    counts = draws(ROW.to(device), temperature=temperature)
    # 5 degrees of freedom: 20.5 is exceeded once in a thousand
    assert chi_square(counts, torch.softmax(ROW / temperature, -1)) < 20.5


@pytest.mark.parametrize(
    "parameters,kept",
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.45}, [1, 4]),
        ({"top_p": 0.9}, [1, 3, 4]),
        ({"top_p": 0.0}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.5}, [1, 4]),
        ({"top_p": 0.45, "temperature": 0.1}, [1]),  # the filters see the tempered distribution
    ],
)
def test_filters(each_backend, device, parameters, kept):
    counts = draws(ROW.to(device), **parameters)
    masked = torch.full_like(ROW, float("-inf"))
    masked[kept] = ROW[kept] / parameters.get("temperature", 1.0)
    assert chi_square(counts, torch.softmax(masked, -1)) < 25
    assert (counts[kept] > 0).all() or "temperature" in parameters


def test_ties_are_cut_by_id():
    kept = reference.filter_logits(torch.zeros(1, 4), torch.tensor([2]), torch.ones(1), torch.zeros(1))
    assert kept.isfinite().tolist() == [[True, True, False, False]]


def test_rows_do_not_know_each_other(each_backend, device):
    """Every row alone gives what it gives in the batch; parameters as tensors give what they give as numbers."""
    rows = 16
    logits = torch.randn(rows, 1000, device=device) * 3
    temperature = torch.linspace(0, 2, rows, device=device)
    top_k = torch.arange(rows, device=device) * 10
    top_p = torch.linspace(0.3, 1, rows, device=device)
    min_p = torch.linspace(0, 0.2, rows, device=device)
    seeds = torch.arange(rows, device=device) * 77 - 300
    together = sample(logits, temperature, top_k, top_p, min_p, seeds)
    for i in range(rows):
        one = slice(i, i + 1)
        assert sample(logits[one], temperature[one], top_k[one], top_p[one], min_p[one], seeds[one]) == together[i]
        values = [x[i].item() for x in (temperature, top_k, top_p, min_p, seeds)]
        assert sample(logits[one], *values) == together[i]
    back = sample(*(x.flip(0) for x in (logits, temperature, top_k, top_p, min_p, seeds)))
    assert torch.equal(back.flip(0), together)


def test_temperature_zero_is_argmax(each_backend, device):
    logits = torch.randn(5, 33, device=device)
    assert torch.equal(sample(logits, 0.0, 0, 1.0, 0.0, 1), logits.argmax(-1))
    mixed = sample(logits, torch.tensor([0.0, 1, 0, 1, 0], device=device), 0, 1.0, 0.0, 1)
    assert torch.equal(mixed[::2], logits.argmax(-1)[::2])


def test_masked_tokens_are_never_drawn(each_backend, device):
    row = torch.tensor([0.0, float("-inf"), 0.0], device=device)
    assert draws(row, count=2000, temperature=3.0)[1] == 0
    assert draws(row, count=2000, top_p=0.99)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "rows,vocab,block",
    [(12, 33, 4096), (16, 150, 16), (4, 5000, 4096), pytest.param(2000, 32256, 4096, marks=pytest.mark.gpu)],
)
def test_kernel_is_the_reference(kernel_and_reference, device, monkeypatch, rows, vocab, block, dtype):
    """The same ids, whatever is filtered; few distinct values, so that cuts go through equals."""
    monkeypatch.setattr(sampling, "BLOCK", block)
    for values in (3.0, 0.5):
        logits = (torch.randn(rows, vocab, device=device) * 4 / values).round().mul(values).to(dtype)
        if values == 3.0:
            logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
        arguments = (
            torch.linspace(0, 2, rows, device=device),
            torch.randint(0, vocab + 5, (rows,), device=device) * torch.randint(0, 2, (rows,), device=device),
            torch.rand(rows, device=device).masked_fill(torch.rand(rows, device=device) < 0.2, 1.0),
            torch.rand(rows, device=device).pow(4).masked_fill(torch.rand(rows, device=device) < 0.3, 0.0),
            torch.randint(-(2**62), 2**62, (rows,), device=device),
        )
        ours, expected = kernel_and_reference(logits, *arguments)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("k,p", [(3, 1.0), (0, 0.5), (5, 0.5), (1, 0.0)])
def test_equals_are_cut_by_id(each_backend, device, k, p):
    """All alike: the first k, and of these the first p."""
    kept = max(1, math.ceil((k or 8) * p))
    counts = draws(torch.zeros(8, device=device), count=300, top_k=k, top_p=p)
    assert (counts[:kept] > 0).all()
    assert counts[kept:].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ends_of_the_range(kernel_and_reference, device, dtype):
    """Infinite and huge logits, zeros of both signs, a single entry, rows of nothing but -inf, negative equals, and a
    top_k beyond what is finite."""
    infinity, huge = float("inf"), torch.finfo(dtype).max
    rows = 64 if device == "cuda" else 3
    filters = (0, 1.0, 0.0), (2, 1.0, 0.0), (0, 0.6, 0.0), (2, 0.6, 0.1), (5, 1.0, 0.05), (5, 0.95, 0.0), (0, 0.0, 0.0)
    for row in (
        [-infinity, -infinity, 0.0], [-0.0, 0.0, -0.0, -1.0], [huge, -huge, huge / 3], [2.0], [-infinity] * 3,
        [-1.0] * 8, [-infinity] * 6 + [0.5, 1.0, -2.0],
    ):  # fmt: skip
        logits = torch.tensor([row] * rows, device=device, dtype=dtype)
        for k, p, m in filters:
            ours, expected = kernel_and_reference(logits, 1.0, k, p, m, torch.arange(rows, device=device))
            if row[0] == -infinity and row[-1] == -infinity:
                assert ((ours >= 0) & (ours < len(row))).all()  # nothing is likely: any id, but an id
            else:
                assert torch.equal(ours, expected), (row, k, p, m)


@pytest.mark.parametrize(
    "temperature,top_p,allowed",
    [(float("inf"), 1.0, {0, 2, 3}), (float("inf"), 0.5, {0, 2}), (1e-38, 1.0, {2}), (1e-44, 0.5, {2})],
)
def test_extreme_temperatures(kernel_and_reference, device, temperature, top_p, allowed):
    """Infinite: all that is not masked or filtered out is as likely. Nearly 0: the likeliest, as at 0."""
    logits = torch.tensor([5.0, -float("inf"), 6.0, 1.0], device=device).expand(32, 4)
    for ids in kernel_and_reference(logits, temperature, 0, top_p, 0.0, torch.arange(32, device=device)):
        assert set(ids.tolist()) == allowed


def test_top_k_of_64_bits(kernel_and_reference, device):
    logits = torch.randn(20, 9, device=device)
    everything = torch.full((20,), 2**32 + 1, device=device)
    ours, expected = kernel_and_reference(logits, 1.0, everything, 1.0, 0.0, torch.arange(20, device=device))
    assert torch.equal(ours, expected)


def test_opcheck(each_backend, device):
    rows = torch.ones(3, device=device)
    arguments = rows, rows.long() * 4, rows * 0.9, rows * 0.01, rows.long()
    torch.library.opcheck(torch.ops.deepseek_coder.sample.default, (torch.randn(3, 40, device=device), *arguments))


def test_compiled(each_backend, device):
    logits = torch.randn(3, 40, device=device)

    def choose(x):
        return sample(x * 2, 0.7, 5, 0.9, 0.0, torch.arange(3, device=device))

    assert torch.equal(torch.compile(choose, fullgraph=True, backend="aot_eager")(logits), choose(logits))


@pytest.mark.gpu
def test_graph(device):
    """Captured once, replayed for other logits, parameters and seeds; nothing waits for the GPU."""
    logits = torch.randn(4, 32256, device=device, dtype=torch.bfloat16)
    parameters = [torch.full((4,), x, device=device) for x in (0.8, 0.9, 0.0)]
    seeds = torch.arange(4, device=device)

    def step():
        return sample(logits, parameters[0], 50, parameters[1], parameters[2], seeds)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = step()
    for seed in range(5):
        logits.normal_()
        parameters[0].uniform_(0, 2)
        seeds.fill_(seed)
        graph.replay()
        assert torch.equal(ids.clone(), step())


def test_noise_is_uniform_and_fixed():
    noise = reference.gumbel_noise(torch.arange(300), 500)
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise))
    counts = torch.histc(uniform.float(), 100, 0, 1).double()
    assert chi_square(counts, torch.full((100,), 0.01)) < 150  # 99 degrees of freedom
    for rows in (uniform, uniform.t()):  # neighbours in either direction are uncorrelated
        pair = torch.stack([rows[:-1].flatten(), rows[1:].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.015
    again = reference.gumbel_noise(torch.tensor([7, 299, -1]), 100)
    assert torch.equal(again[:2], noise[[7, 299], :100])


def test_hash_is_murmurs():
    """The finaliser in arbitrary-precision integers."""
    mask = 2**64 - 1

    def mix(x):
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> 33)) * factor & mask
        return x ^ (x >> 33)

    values = [0, 1, 2**31, 2**63 - 1, -1, -(2**63), 123456789]
    got = reference._mix(torch.tensor(values))
    assert [x & mask for x in got.tolist()] == [mix(x & mask) for x in values]


@pytest.mark.gpu
def test_gpu_draws_what_the_cpu_draws(device):
    logits = torch.randn(200, 32256) * 2
    arguments = (0.8, 50, 0.95, 0.01)
    seeds = torch.arange(200)
    on_gpu = sample(logits.to(device), *arguments, seeds.to(device)).cpu()
    assert (on_gpu == sample(logits, *arguments, seeds)).float().mean() > 0.98  # the last bits of softmax differ


def test_errors():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="temperature -1"):
        sample(logits, -1.0, 0, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"top_p 1.5 is outside"):
        sample(logits, 1.0, 0, 1.5, 0.0, 1)
    with pytest.raises(ValueError, match="top_k inf is outside"):
        sample(logits, 1.0, float("inf"), 1.0, 0.0, 1)
    with pytest.raises(ValueError, match="seeds 9223372036854775808 is outside"):
        sample(logits, 1.0, 0, 1.0, 0.0, 2**63)
    with pytest.raises(ValueError, match="not one for each of 2 rows"):
        sample(logits, torch.ones(3), 0, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match="logits"):
        sample(logits[0], 1.0, 0, 1.0, 0.0, 1)
