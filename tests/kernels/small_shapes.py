"""The ops on small, odd shapes, forward and backward, for compute-sanitizer: 16 bits, paged caches. Not a test module:
test_sanitizer.py runs it in a process of its own."""

import importlib

import torch

import kernels
from kernels import backend


def attention(name: str, dtype: torch.dtype) -> None:
    for head_dim in (64, 128):
        for heads, kv_heads in ((2, 2), (6, 2), (3, 1)):
            lengths = torch.tensor([0, 129, 0, 1, 200])
            cu = lengths.cumsum(0).int().cuda()
            q, k, v = (
                torch.randn(int(cu[-1]), h, head_dim, device="cuda", dtype=dtype).requires_grad_()
                for h in (heads, kv_heads, kv_heads)
            )
            for causal in (True, False):
                for deterministic in (True, False):
                    with backend(name):
                        out = kernels.flash_attn_varlen_func(
                            q, k, v, cu, cu, causal=causal, deterministic=deterministic
                        )
                        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))


def layers(dtype: torch.dtype) -> None:
    for rows, columns in ((1, 8), (7, 77), (130, 2056)):
        x, residual = (torch.randn(rows, columns, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
        weight = torch.randn(columns, device="cuda", dtype=dtype).requires_grad_()
        y, total = kernels.rms_norm(x, weight, 1e-5, residual)
        torch.autograd.grad((y, total), (x, weight, residual), (y.detach(), total.detach()))
        gate_up = torch.randn(rows, 2 * columns, device="cuda", dtype=dtype).requires_grad_()
        y = kernels.swiglu(gate_up)
        torch.autograd.grad(y, gate_up, y.detach())
        for vocab in (1001, 1000):  # the second in bf16 by the product for Hopper
            head = torch.randn(vocab, columns, device="cuda", dtype=dtype).requires_grad_()
            targets = torch.randint(vocab, (rows,), device="cuda")
            targets[0] = -100
            loss, _ = kernels.linear_cross_entropy(x, head, targets, z_loss=0.1)
            torch.autograd.grad(loss / 3, (x, head))
    for heads, kv_heads, head_dim in ((3, 1, 64), (7, 7, 128)):
        qkv = torch.randn(131, (heads + 2 * kv_heads) * head_dim, device="cuda", dtype=dtype).requires_grad_()
        y = kernels.apply_rope(qkv.clone(), torch.arange(131, device="cuda"), heads, kv_heads, 1e5, 4.0)
        torch.autograd.grad(y, qkv, y.detach())


def decoding(dtype: torch.dtype) -> None:
    for heads, kv_heads, head_dim, page in ((4, 4, 64, 16), (7, 1, 128, 7), (32, 1, 128, 16)):
        batch, blocks = 3, 60
        k_cache, v_cache = torch.randn(2, blocks, page, kv_heads, head_dim, device="cuda", dtype=dtype)
        table = torch.randperm(blocks, device="cuda").int().view(batch, -1)
        lengths = torch.tensor([0, 5, blocks // batch * page - 5], device="cuda", dtype=torch.int32)
        for queries in (1, 5):
            q, k, v = (
                torch.randn(batch, queries, h, head_dim, device="cuda", dtype=dtype)
                for h in (heads, kv_heads, kv_heads)
            )
            for splits in ({}, {"num_splits": 3}, {"fixed_split_size": 64}):
                kernels.flash_attn_with_kvcache(
                    q, k_cache, v_cache, k, v, lengths, block_table=table, causal=True, **splits
                )
        qkv = torch.randn(5, (heads + 2 * kv_heads) * head_dim, device="cuda", dtype=dtype)
        slots = torch.tensor([0, blocks * page - 1, -1, 3, 17], device="cuda")
        kernels.apply_rope_and_write_kv(qkv, slots.clamp(min=0), heads, kv_heads, 1e5, 1.0, k_cache, v_cache, slots)
    for rows, vocab in ((1, 1), (3, 33), (2, 32256)):
        logits = torch.randn(rows, vocab, device="cuda", dtype=dtype)
        kernels.sample(logits, 0.7, min(5, vocab), 0.9, 0.01, torch.arange(rows, device="cuda"))


if __name__ == "__main__":
    torch.manual_seed(0)
    importlib.import_module("kernels.loss")._chunk = lambda width: 64  # several
    for dtype in (torch.float16, torch.bfloat16):
        for name in ["triton"] + ["hopper"] * (torch.cuda.get_device_capability() == (9, 0)):
            attention(name, dtype)
        layers(dtype)
        decoding(dtype)
    torch.cuda.synchronize()
    print("done")
