"""What the small layers and the loss promise on a GPU: graphs, the same bits each time, and many random shapes."""

import importlib
import random

import pytest
import torch

from kernels import apply_rope, linear_cross_entropy, reference, rms_norm, swiglu

pytestmark = pytest.mark.gpu

loss_module = importlib.import_module("kernels.loss")


def norm_problem(draw, dtype, device):
    shape = draw.randrange(1, 3000), draw.choice([8, 77, 1000, 2048, 4096, 5120, 7168])
    x, residual, weight = (torch.randn(s, device=device).to(dtype) for s in (shape, shape, shape[1:]))
    if draw.random() < 0.5:
        return (lambda x, w: rms_norm(x, w, 1e-5)), plain_norm, (x, weight)
    return (lambda x, w, r: rms_norm(x, w, 1e-5, r)), plain_norm, (x, weight, residual)


def plain_norm(x, weight, residual=None):
    total = x if residual is None else x + residual
    wide = total.to(reference.wide(x.dtype))
    y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    return y if residual is None else (y, total)


def swiglu_problem(draw, dtype, device):
    x = torch.randn(draw.randrange(1, 3000), 2 * draw.choice([1, 77, 1000, 2048, 5504]), device=device).to(dtype)

    def plain(x):
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    return swiglu, plain, (x,)


def loss_problem(draw, dtype, device):
    tokens, width, vocab = draw.randrange(1, 700), draw.choice([8, 64, 520]), draw.choice([9, 1000, 32256])
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
    targets = torch.randint(vocab, (tokens,), device=device)
    targets[torch.rand(tokens, device=device) < 0.2] = -100

    def plain(h, w):
        logits = (h @ w.t()).to(reference.wide(h.dtype))
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    return (lambda h, w: linear_cross_entropy(h, w, targets)[0]), plain, (hidden, weight)


def rope_problem(draw, dtype, device):
    heads, kv_heads, head_dim = draw.choice([(16, 16, 128), (56, 8, 128), (7, 1, 64), (3, 2, 32)])
    tokens = draw.randrange(1, 3000)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    positions = torch.randint(16384, (tokens,), device=device)
    frequencies = 1.0 / (1e5 ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)) / 4.0
    angle = positions.float()[:, None] * frequencies

    def plain(qkv):
        x = qkv.unflatten(1, (-1, 2, head_dim // 2))
        wide = angle.to(reference.wide(qkv.dtype))[:, None]
        a, b, cos, sin = x[:, :, 0], x[:, :, 1], wide.cos().to(x.dtype), wide.sin().to(x.dtype)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], 2)
        return torch.cat([rotated[:, : heads + kv_heads], x[:, heads + kv_heads :]], 1).flatten(1)

    return (lambda x: apply_rope(x.clone(), positions, heads, kv_heads, 1e5, 4.0)), plain, (qkv,)


PROBLEMS = {"norm": norm_problem, "swiglu": swiglu_problem, "loss": loss_problem, "rope": rope_problem}


@pytest.mark.parametrize("name", PROBLEMS)
def test_random_shapes(fastest, device, nan_filled, monkeypatch, check_error, gradients, name):
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 48)  # several chunks, and parts of the sum
    draw = random.Random(1)
    for i in range(500):
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        ours, plain, inputs = PROBLEMS[name](draw, dtype, device)
        got, peer = gradients(ours, inputs), gradients(plain, inputs)
        exact = gradients(plain, [x.double() for x in inputs])
        for a, b, c in zip(got, peer, exact, strict=True):
            check_error(a, b, c, f"{name}, shape {i}")


@pytest.mark.parametrize("name", PROBLEMS)
def test_twenty_runs_give_the_same_bits(fastest, device, monkeypatch, gradients, name):
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 48)
    ours, _, inputs = PROBLEMS[name](random.Random(3), torch.bfloat16, device)
    expected = gradients(ours, inputs)
    for _ in range(20):
        assert all(map(torch.equal, gradients(ours, inputs), expected))


@pytest.mark.parametrize("name", PROBLEMS)
def test_captured_forward_and_backward(fastest, device, monkeypatch, name):
    """A graph replayed for other values gives what eager calls give."""
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 48)
    ours, _, inputs = PROBLEMS[name](random.Random(5), torch.bfloat16, device)
    leaves = [x.requires_grad_() for x in inputs]
    weights = []

    def step():
        outputs = ours(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights[:] = weights or [torch.randn_like(y) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    for _ in range(3):
        with torch.no_grad():
            for x in leaves:
                x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip([x.clone() for x in results], step(), strict=True):
            assert torch.equal(one, other)
