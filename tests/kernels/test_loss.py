import importlib

import pytest
import torch

from kernels import backend, linear_cross_entropy

loss_module = importlib.import_module("kernels.loss")

CASES = [
    (torch.float32, 7, 16, 33, 0.0),
    (torch.float16, 9, 8, 130, 1e-2),
    (torch.float32, 1, 4, 5000, 1e-2),  # more than one block of the vocabulary
    *(
        pytest.param(dtype, 1025, 256, 32256, z_loss, marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for z_loss in (0.0, 1e-3)
    ),
]


def plain(hidden, weight, targets, z_loss=0.0):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.t()).to(wide)
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    valid = targets != -100
    return loss + z_loss * (logits.logsumexp(-1).square() * valid).sum()


def inputs(dtype, tokens, width, vocab, device):
    hidden, weight = torch.randn(tokens, width, device=device), torch.randn(vocab, width, device=device) / width**0.5
    targets = torch.randint(vocab, (tokens,), device=device)
    targets[1:3] = -100
    return hidden.to(dtype), weight.to(dtype), targets


@pytest.mark.parametrize("dtype,tokens,width,vocab,z_loss", CASES)
def test_kernels(triton, device, nan_filled, monkeypatch, check_error, dtype, tokens, width, vocab, z_loss):
    monkeypatch.setattr(loss_module, "_chunk", lambda width: max(2, tokens // 3))  # several chunks, the last ragged
    hidden, weight, targets = inputs(dtype, tokens, width, vocab, device)

    def run(function, hidden, weight):
        leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
        loss = function(*leaves)
        return [loss, *torch.autograd.grad(loss / 3, leaves)]

    def ours(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)[0]

    got, again = run(ours, hidden, weight), run(ours, hidden, weight)
    peer = run(lambda h, w: plain(h, w, targets, z_loss), hidden, weight)
    exact = run(lambda h, w: plain(h, w, targets, z_loss), hidden.double(), weight.double())
    for name, a, b, c, d in zip(("loss", "dhidden", "dweight"), got, again, peer, exact, strict=True):
        assert torch.equal(a, b), name
        check_error(a, c, d, name)


def test_bf16_without_a_gpu():
    hidden, weight, targets = inputs(torch.bfloat16, 9, 8, 130, "cpu")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    got = torch.autograd.grad(linear_cross_entropy(*leaves, targets)[0], leaves)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    for one, other in zip(got, torch.autograd.grad(plain(*wide, targets), wide), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_reference_is_torch_cross_entropy(monkeypatch, gradients, z_loss):
    torch.manual_seed(0)
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 3)
    hidden, weight, targets = inputs(torch.float64, 8, 5, 11, "cpu")
    with backend("reference"):
        loss, count, *got = gradients(
            lambda h, w, t: linear_cross_entropy(h, w, t, z_loss=z_loss), [hidden, weight, targets]
        )
    assert count.dtype == torch.int64
    assert not count.requires_grad
    assert count == (targets != -100).sum()
    expected = gradients(lambda h, w, t: plain(h, w, t, z_loss), [hidden, weight, targets])
    for one, other in zip([loss, *got], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_nothing_to_learn(triton, device, monkeypatch, name):
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 2)
    for tokens in (0, 5):
        hidden = torch.randn(tokens, 4, device=device, requires_grad=True)
        weight = torch.randn(9, 4, device=device, requires_grad=True)
        with backend(name):
            loss, count = linear_cross_entropy(
                hidden, weight, torch.full((tokens,), -1, device=device), ignore_index=-1
            )
        assert loss == 0
        assert loss.dtype == torch.float32
        assert count == 0
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_one_chunk_of_ignored_tokens(triton, device, monkeypatch):
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 2)
    hidden, weight = torch.randn(6, 4, device=device, requires_grad=True), torch.randn(9, 4, device=device)
    targets = torch.tensor([1, 2, -100, -100, 3, -100], device=device)
    loss, count = linear_cross_entropy(hidden, weight, targets)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    assert count == 3
    (got,), (wanted,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_only_the_gradients_that_are_needed(triton, device):
    hidden, weight, targets = inputs(torch.float32, 5, 4, 9, device)
    op = torch.ops.deepseek_coder.linear_cross_entropy
    for need_hidden, need_weight in ((True, False), (False, True), (False, False)):
        _, _, dhidden, dweight, logits = op(hidden, weight, targets, -100, 0.0, need_hidden, need_weight, False)
        assert logits.numel() == 0
        assert (dhidden.numel() > 0, dweight.numel() > 0) == (need_hidden, need_weight)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden.requires_grad_(), weight, targets)[0].requires_grad


def test_target_outside_the_vocabulary_shows(triton, device):
    hidden, weight = torch.randn(2, 4, device=device), torch.randn(9, 4, device=device)
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 9], device=device))[0].isnan()


def test_logits_on_request(triton, device, monkeypatch):
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 2)
    hidden, weight, targets = inputs(torch.float32, 5, 4, 9, device)
    hidden.requires_grad_()
    loss, count, logits = linear_cross_entropy(hidden, weight, targets, return_logits=True)
    torch.testing.assert_close(logits, hidden @ weight.t())
    assert not logits.requires_grad
    assert torch.equal(torch.stack(linear_cross_entropy(hidden, weight, targets)), torch.stack([loss, count.float()]))
    torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_factor_is_not_rounded(triton, device, dtype):
    """1 / 3 in 16 bits would be off by more than the gradient's own rounding, everywhere in the same direction."""
    hidden, weight, targets = inputs(torch.float32, 64, 4, 9, device)
    hidden = hidden.to(dtype).requires_grad_()
    with backend("reference"):
        loss, _ = linear_cross_entropy(hidden, weight.to(dtype), targets)
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 3, hidden)
    expected = one.float() * torch.tensor(1 / 3, device=device)
    if device == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates when storing
        expected = (expected.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert torch.equal(third, expected.to(dtype))


@pytest.mark.parametrize("vocab,parts", [(256, [128, 128]), (300, [256, 44]), (1001, [512, 489])])
def test_the_sum_in_parts_is_the_sum(device, monkeypatch, vocab, parts):
    """bf16: rows of the weight's gradient that lie in several tensors until they are rounded."""
    monkeypatch.setattr(loss_module, "_chunk", lambda width: 5)
    hidden, weight, targets = inputs(torch.bfloat16, 13, 8, vocab, device)
    weight.requires_grad_()
    assert loss_module._parts(vocab, 8, torch.bfloat16) == parts
    found = []
    with backend("reference"):
        for make_parts in (loss_module._parts, lambda vocab, width, dtype: [vocab]):
            monkeypatch.setattr(loss_module, "_parts", make_parts)
            found += torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0] / 3, weight)
    torch.testing.assert_close(*found, rtol=2**-7, atol=1e-6)  # products of other shapes round elsewhere
    assert found[0].any(1).all()  # every row was written


@pytest.mark.parametrize("width,tokens", [(8, 2048), (3072, 3072), (7168, 4096)])
def test_no_chunk_is_larger(device, monkeypatch, width, tokens):
    """Logits exist for a chunk at a time, in one place."""
    chunks, made = [], loss_module._cross_entropy_

    def spy(logits, *args):
        chunks.append((len(logits), logits.data_ptr()))
        made(logits, *args)

    monkeypatch.setattr(loss_module, "_cross_entropy_", spy)
    hidden, weight, targets = inputs(torch.float32, 2 * tokens + 5, width, 16, device)
    with backend("reference"):
        linear_cross_entropy(hidden, weight, targets)
    assert [tokens for tokens, _ in chunks] == [tokens, tokens, 5]
    assert len({place for _, place in chunks}) == 1


def test_opcheck(opcheck, device):
    hidden, weight, targets = inputs(torch.float32, 5, 4, 9, device)
    opcheck("linear_cross_entropy", hidden, weight, targets, -100, 0.1, False, False, True)
    opcheck(
        "linear_cross_entropy", hidden.requires_grad_(), weight.requires_grad_(), targets, -100, 0.1, True, True, False
    )
    gradient = torch.randn(3, 4, device=device).half()
    opcheck("linear_cross_entropy_backward", torch.tensor(0.3, device=device), gradient, torch.half)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled(triton, device, check_compiled, compiler):
    hidden, weight, targets = inputs(torch.float32, 5, 4, 9, device)
    check_compiled(lambda h, w: linear_cross_entropy(h.sin(), w, targets)[0] / 5, hidden, weight, compiler=compiler)

    def normalised(h, w):  # elsewhere a compiled loss was silently wrong where targets were ignored
        loss, count = linear_cross_entropy(h.sin(), w, targets)
        return loss / count

    check_compiled(normalised, hidden, weight, compiler=compiler)
    leaf = hidden.clone().requires_grad_()
    expected = plain(leaf.sin(), weight, targets) / (targets != -100).sum()
    got = torch.compile(normalised, fullgraph=True, backend=compiler)(leaf, weight)
    torch.testing.assert_close(got, expected)
    for one, other in zip(torch.autograd.grad(got, leaf), torch.autograd.grad(expected, leaf), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_errors():
    hidden, weight, targets = inputs(torch.float32, 5, 4, 9, "cpu")
    with pytest.raises(ValueError, match="does not fit weight"):
        linear_cross_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match="does not fit weight"):
        linear_cross_entropy(hidden, weight[:0], targets)
    with pytest.raises(ValueError, match=r"floating point is needed, not torch\.int8"):
        linear_cross_entropy(hidden.to(torch.int8), weight.to(torch.int8), targets)
    with pytest.raises(ValueError, match=r"targets must be int64 \(5,\), not torch\.int32 \(5,\)"):
        linear_cross_entropy(hidden, weight, targets.int())
    with pytest.raises(ValueError, match=r"weight torch\.float16"):
        linear_cross_entropy(hidden, weight.half(), targets)
