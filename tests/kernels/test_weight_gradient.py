"""The Hopper product that adds to a sum, by itself. Who does what is plain arithmetic, and runs without a GPU."""

import random
from types import SimpleNamespace

import pytest
import torch

from kernels import linear_cross_entropy
from kernels.dispatch import hopper_missing


@pytest.fixture
def module(device):
    if reason := hopper_missing(torch.device(device)):
        pytest.skip(reason)
    from kernels import weight_gradient

    return weight_gradient


def pieces(module, monkeypatch, program, programs, tiles, steps):
    """The index of a program and its pieces in order, as the kernel's own functions say, called from Python."""
    language = {"program_id": lambda _: program, "num_programs": lambda _: programs, "minimum": min}
    monkeypatch.setattr(module, "gl", SimpleNamespace(**language))
    monkeypatch.setattr(module, "LEAST", 4)
    work, found = module._work.fn(tiles, 1, steps), []
    at = work.begin
    while at < work.total and len(found) <= tiles:
        found.append(module._piece.fn(work, at))
        at = module._after.fn(work, at, found[-1].count)
    return work.index, found


@pytest.mark.parametrize("programs", [1, 2, 7, 132])
def test_every_step_once_and_nobody_waits_for_ever(monkeypatch, programs):
    module = pytest.importorskip("kernels.weight_gradient")
    draw = random.Random(programs)
    for _ in range(60):
        tiles, steps = draw.choice([draw.randrange(1, 5), draw.randrange(1, 4 * programs + 3)]), draw.randrange(1, 70)
        launched = min(programs, tiles * steps)
        work = {}
        for program in range(launched):
            index, found = pieces(module, monkeypatch, program, launched, tiles, steps)
            assert index == launched - 1 - program
            work[index] = found
        done = [(x.tile, x.first + i) for found in work.values() for x in found for i in range(x.count)]
        assert sorted(done) == [(t, i) for t in range(tiles) for i in range(steps)]
        told = {(index, x.tile, x.first) for index, found in work.items() for x in found if x.tells}
        for found in work.values():
            assert not any(piece.tells for piece in found[1:])  # only what it does first: who waits for it may go on
        for index, found in work.items():
            for piece in found:
                assert piece.count > 0
                end = piece.first + piece.count
                assert piece.waits == (end < steps)  # else nobody adds to the tile before
                if piece.waits:
                    told.remove((index + 1, piece.tile, end))
        assert not told
        counts = [sum(piece.count for piece in found) for found in work.values()]
        assert max(counts) - min(counts) <= 4


def chunks(tokens, rows, columns, device):
    return [tuple(torch.randn(n, m, device=device).bfloat16() for m in (rows, columns)) for n in tokens]


def added(module, pairs):
    total = module.Sum(pairs[0][0].shape[1], pairs[0][1].shape[1], pairs[0][0].device)
    for d, x in pairs:
        assert module.fits(d, x)
        total.add(d, x)
    out = torch.full(total.shape, float("nan"), device=pairs[0][0].device)
    total.write(out)
    return out


def compare(module, tokens, rows, columns, device):
    """fp32 products of bf16 numbers are exact: what is left is the rounding of the additions."""
    pairs = chunks(tokens, rows, columns, device)
    got = added(module, pairs)
    exact = sum(d.double().t() @ x.double() for d, x in pairs)
    bound = sum(d.double().abs().t() @ x.double().abs() for d, x in pairs)
    assert ((got - exact).abs() <= 2e-6 * bound + 1e-30).all(), (tokens, rows, columns)
    return pairs, got


# Tiles are 128 x 256, and as many programs as multiprocessors (132) share what whole rounds of them leave over.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "tokens,rows,columns",
    [
        ((1,), 8, 8),  # one tile, one step
        ((64, 1, 200), 128, 256),  # one tile: a program each four steps, one after the other
        ((2048, 2048, 1000), 32256, 2048),  # the 1.3B model's head: 36 tiles are left over
        ((300, 70), 132 * 128, 256),  # none is left over
        ((40, 40), 133 * 128, 256),  # one is, of one step
        ((4096, 64), 133 * 128, 256),  # one is, shared by sixteen
        ((512,) * 3, 5128, 1032),  # ragged in rows, columns
    ],
)
def test_sum(module, device, tokens, rows, columns):
    pairs, expected = compare(module, tokens, rows, columns, device)
    for _ in range(20):
        assert torch.equal(added(module, pairs), expected)


@pytest.mark.gpu
def test_random_shapes(module, device):
    draw = random.Random(7)
    for _ in range(500):
        rows, columns = 8 * draw.randrange(1, 400), 8 * draw.randrange(1, 200)
        compare(module, [draw.randrange(1, 700) for _ in range(draw.randrange(1, 4))], rows, columns, device)


@pytest.mark.gpu
def test_fewer_programs_than_multiprocessors_at_a_time(module, device):
    """A program waits only for one that was launched before it: it ends even where the GPU is shared."""
    pairs = chunks((2048, 2048), 4096, 256, device)  # 32 tiles, all of them shared
    expected = added(module, pairs)
    hold = torch.randn(8192, 8192, device=device)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        for _ in range(4):
            hold @ hold
    assert torch.equal(added(module, pairs), expected)
    other.synchronize()


@pytest.mark.gpu
def test_the_loss_uses_it(fastest, module, device, monkeypatch):
    calls, add = [], module.Sum.add
    monkeypatch.setattr(module.Sum, "add", lambda self, d, x: calls.append(len(x)) or add(self, d, x))
    hidden, weight = (torch.randn(n, 512, device=device).bfloat16().requires_grad_() for n in (5000, 1000))
    linear_cross_entropy(hidden, weight, torch.randint(1000, (5000,), device=device))
    assert calls == [2048, 2048, 904]


@pytest.mark.gpu
@pytest.mark.parametrize("width,megabytes", [(2048, 463.6), (4096, 927.1), (7168, 1425.2)])
def test_peak_memory(fastest, module, device, width, megabytes):
    """16,384 tokens, 32,256 rows, both gradients: no more than Liger needs (463.55, 927.02, 1,623.28 MB)."""
    hidden = torch.randn(16384, width, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(32256, width, device=device) / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(32256, (16384,), device=device)

    def step():
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))

    step()  # the first time cuBLAS takes a workspace of its own, and keeps it
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    assert torch.cuda.max_memory_allocated() - before <= megabytes * 1e6


@pytest.mark.gpu
def test_what_does_not_fit(module, device):
    x = torch.zeros(16, 264, device=device, dtype=torch.bfloat16)
    assert module.fits(x, x)
    assert module.fits(x[:, :8], x)
    assert not module.fits(x[:, 1:9], x)
    assert not module.fits(x[:, :9].contiguous(), x)
    assert not module.fits(x, x.t())
    assert not module.fits(x, x.half())
    assert not module.fits(x, x[:1].expand(16, -1))
