"""Decoding over a paged cache, one token for each sequence, beside FlashInfer and torch.

The ceiling is a kernel that only reads as many bytes as K and V hold. Pages of 16 tokens in random order, as a server
has them after a while; torch's attention, which has no pages, reads a contiguous cache.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels

from . import compare
from .compare import OURS, Case, Function
from .layers import random

PAGE, HEAD_DIM = 16, 128
HEADS = ((16, 16), (32, 32), (56, 8), (32, 1))
SIZES = ((1, 16384), (8, 16384), (32, 4096), (64, 2048))


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.max(tl.load(x + at), axis=0))


def read_of(total_bytes: int) -> Callable[[], Function]:
    """A pass that reads that many bytes."""

    def make() -> Function:
        block = 8192
        programs = total_bytes // (4 * block)
        x = torch.zeros(programs * block, dtype=torch.int32, device="cuda")
        out = torch.empty(programs, dtype=torch.int32, device="cuda")
        return lambda: _read_kernel[(programs,)](x, out, BLOCK=block, num_warps=4)

    return make


def flashinfer(
    q: Tensor, cache: Tensor, table: Tensor, length: int, tensor_cores: bool
) -> Function:  # cache (blocks, 2, page, kv_heads, head_dim)
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, heads, kv_heads = q.shape[0], q.shape[2], cache.shape[3]
    workspace = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    pages = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * table.shape[1]
    last = torch.full((batch,), (length - 1) % PAGE + 1, device="cuda", dtype=torch.int32)
    wrapper.plan(
        pages, table.flatten(), last, heads, kv_heads, HEAD_DIM, PAGE, q_data_type=q.dtype, kv_data_type=q.dtype
    )
    return lambda: wrapper.run(q[:, 0], cache)[:, None]


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Function:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def case(heads: int, kv_heads: int, batch: int, length: int) -> Case:
    q = random(batch, 1, heads, HEAD_DIM)
    blocks = batch * length // PAGE
    cache = random(blocks, 2, PAGE, kv_heads, HEAD_DIM)
    table = torch.randperm(blocks, device="cuda").int().view(batch, -1)
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)

    def contiguous() -> list[Tensor]:
        return [cache[table.flatten(), i].view(batch, length, kv_heads, HEAD_DIM) for i in range(2)]

    def ours(split_size: int | None = None) -> Function:
        return lambda: kernels.flash_attn_with_kvcache(
            q, cache[:, 0], cache[:, 1], None, None, lengths, table, causal=True, fixed_split_size=split_size
        )

    def exact() -> list[Tensor]:
        outs = []
        for i in range(batch):
            k, v = (cache[table[i], j].flatten(0, 1).float().transpose(0, 1)[None] for j in range(2))
            one = q[i].float().transpose(0, 1)[None]
            attend = torch.nn.functional.scaled_dot_product_attention
            outs.append(attend(one, k, v, enable_gqa=heads != kv_heads)[0].transpose(0, 1))
        return [torch.stack(outs)]

    providers: dict[str, Callable[[], Function]] = {
        OURS: ours,
        f"{OURS}, fixed splits of 1024": functools.partial(ours, 1024),
        "FlashInfer": lambda: flashinfer(q, cache, table, length, False),
        "FlashInfer, tensor cores": lambda: flashinfer(q, cache, table, length, True),
        "torch, contiguous cache": lambda: torch_attention(q, *contiguous()),
    }
    work = cache.numel() * cache.element_size()
    return Case(f"{heads}/{kv_heads} B{batch} S{length // 1024}K", providers, read_of(work), work, exact)


def run(out: Path) -> None:
    cases = (case(*heads, *size) for heads in HEADS for size in SIZES)
    compare.run("decode", "a read of equal bytes", cases, out)
