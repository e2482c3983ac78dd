"""Compiles what the ops launch, for sm_90a, without a GPU, and prints what came out as JSON, one line per kernel.

Not a test module: test_compile_sm90.py runs it in a process of its own, since compilation crashes where the interpreter
is on. The launches are recorded, not written down: each op runs on CPU tensors while `JITFunction.run` only notes its
arguments, so block sizes, constants and pointer types are those of the product.
"""

import collections
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

import kernels
from kernels import dispatch

NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def record(launches):
    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    JITFunction.run = run


def source(kernel, args, kwargs):
    """The specialisation that a launch with these arguments makes."""
    options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, name, at = bound[parameter.name], parameter.name, (parameter.num,)
        aligned = False
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}[{block}],{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[at] = [["tt.divisibility", 16]]
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    return kind(kernel, signature, constants, attributes), options


def inspect_binary(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([f"{TOOLS}/{tool}", flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    operations = collections.Counter(
        re.findall(
            r"\b(HGMMA|HMMA|LDL|STL|ATOM|ATOMG|RED|REDG|LDGSTS|ACQBULK|PREEXIT|UTMALDG|UTMAREDG|USETMAXREG)\b", sass
        )
    )
    wide = len(re.findall(r"\b(?:LDG|STG|LDGSTS)\.E\.(?:\S+\.)?128\b", sass))  # 16 bytes a thread
    stack = re.search(r"STACK:(\d+)", usage)
    registers = re.search(r"REG:(\d+)", usage)
    assert stack, usage
    assert registers, usage
    loops = innermost_loops(sass)
    return {
        "stack": int(stack[1]),
        "registers": int(registers[1]),
        "operations": operations,
        "wide": wide,
        "loops": loops,
    }


def assembler_warnings(ptx):
    """What the assembler says of lost performance: serialised matrix products, registers that it would not move."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [f"{TOOLS}/ptxas", "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in done.stderr.splitlines() if "Potential Performance Loss" in line]


def run_ops(dtype, head_dim):
    """Every op that has Triton kernels, forward and backward, in shapes of the 1.3B model (narrow where it is free)."""
    tokens, heads, kv_heads, width = 64, 4, 2, 2048
    cu = torch.tensor([0, 40, tokens], dtype=torch.int32)
    for causal in (True, False):
        qkv = torch.zeros(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, requires_grad=True)
        out = kernels.flash_attn_varlen_qkvpacked_func(
            qkv, cu, num_heads=heads, num_kv_heads=kv_heads, causal=causal
        )  # fmt: skip
        out.sum().backward()
    kernels.apply_rope(torch.zeros(tokens, 48 * head_dim, dtype=dtype), torch.arange(tokens), 16, 16, 1e5, 4.0)
    x, weight = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((tokens, width), (width,)))
    kernels.rms_norm(x, weight, 1e-6).sum().backward()
    sum(y.sum() for y in kernels.rms_norm(x, weight, 1e-6, x)).backward()
    kernels.swiglu(x).sum().backward()
    vocabulary = torch.zeros(32256, width, dtype=dtype, requires_grad=True)
    kernels.linear_cross_entropy(x.detach()[:2], vocabulary.detach(), torch.arange(2))
    kernels.linear_cross_entropy(x[:2], vocabulary.detach(), torch.arange(2))
    kernels.sample(torch.zeros(2, 32256, dtype=dtype), 0.8, 50, 0.95, 0.01, 1)


def run_decode(dtype, head_dim):
    """One query over pages and without, groups of heads, guesses to verify, a chunk of a prompt, an fp8 cache."""
    decode = importlib.import_module("kernels.attention.decode")
    plan = decode._plan
    decode._plan = lambda *shape: plan(*shape[:-1], 132)
    seqlens, table = torch.tensor([40]), torch.zeros(1, 1024, dtype=torch.int32)
    for heads, kv_heads, queries, page in ((4, 4, 1, 16), (4, 4, 1, 0), (14, 2, 1, 16), (32, 1, 1, 16), (14, 2, 16, 16),
                                           (4, 4, 300, 16)):  # fmt: skip
        q = torch.zeros(1, queries, heads, head_dim, dtype=dtype)
        cache = torch.zeros(*((4, page) if page else (1, 16384)), kv_heads, head_dim, dtype=dtype)
        pages = table if page else None
        kernels.flash_attn_with_kvcache(q, cache, cache, None, None, seqlens, pages, causal=queries > 1)
        k = torch.zeros(queries, kv_heads, head_dim, dtype=dtype)
        kernels.write_kv(k, k, cache, cache, torch.arange(queries))
    kernels.flash_attn_with_kvcache(q, cache, cache, k[None], k[None], seqlens, table)
    quantised, descale = cache.to(torch.float8_e4m3fn), torch.ones(kv_heads)
    kernels.flash_attn_with_kvcache(
        q[:, :1], quantised, quantised, k[None, :1], k[None, :1], seqlens, table, k_descale=descale, v_descale=descale
    )
    qkv = torch.zeros(300, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    at = torch.arange(300)
    kernels.apply_rope_and_write_kv(qkv, at, heads, kv_heads, 1e5, 4.0, cache, cache, at)
    kernels.apply_rope_and_write_kv(qkv, at, heads, kv_heads, 1e5, 4.0, quantised, quantised, at, descale, descale)


def run_attention(dtype, head_dim):
    """The Hopper kernels: heads that share key heads or not, causal or not, forward and backward."""
    cu = torch.tensor([0, 40, 300], dtype=torch.int32)
    for heads, kv_heads, causal in ((4, 4, True), (4, 2, False)):
        qkv = torch.zeros(300, (heads + 2 * kv_heads) * head_dim, dtype=dtype, requires_grad=True)
        for deterministic in (False, True):
            out = kernels.flash_attn_varlen_qkvpacked_func(
                qkv, cu, num_heads=heads, num_kv_heads=kv_heads, causal=causal, deterministic=deterministic
            )
            out.sum().backward()
    if dtype == torch.bfloat16:
        hidden, weight = (torch.zeros(n, 512, dtype=dtype, requires_grad=True) for n in (3000, 1000))
        kernels.linear_cross_entropy(hidden, weight, torch.zeros(3000, dtype=torch.int64))


def innermost_loops(sass):
    """Of each innermost loop that multiplies matrices: how many matrix products and accesses to local memory it holds.

    A loop is what lies between a label and a branch back to it. What waits for a barrier stands behind the end of the
    program and branches back as well: such stretches hold an EXIT, and are none.
    """
    lines, labels, loops = sass.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        branch = re.search(r"\bBRA(?:\.\S+)?\s+(?:\S+,\s*)*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            body = "\n".join(lines[labels[branch[1]] : i])
            if re.search(r"\bHGMMA\b", body) and not re.search(r"\bEXIT\b", body):
                loops.append((labels[branch[1]], i, body))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a[:2] != b[:2] for b in loops)]
    return [{name: len(re.findall(rf"\b{name}\b", body)) for name in ("HGMMA", "LDL", "STL")} for _, _, body in inner]


def main(dtype, head_dim, what):
    launches = []
    record(launches)
    for module in ("attention", "norm", "rope", "swiglu", "loss", "kv_cache", "sampling"):
        importlib.import_module(f"kernels.{module}").use_triton = lambda *_: True
    for module in ("attention.decode", "norm"):
        importlib.import_module(f"kernels.{module}").early_launch = lambda _: True
    assert not dispatch.interpreting()
    for module in ("attention", "loss"):
        importlib.import_module(f"kernels.{module}").use_hopper = lambda *_: what == "hopper"
    if what == "hopper":
        for module in ("attention.hopper", "weight_gradient"):
            importlib.import_module(f"kernels.{module}").multiprocessors = lambda _: 132
        run_attention(getattr(torch, dtype), int(head_dim))
    else:
        {"ops": run_ops, "decode": run_decode}[what](getattr(torch, dtype), int(head_dim))
    done = set()
    for kernel, args, kwargs in launches:
        src, options = source(kernel, args, dict(kwargs))
        key = (kernel.fn.__name__, str(src.signature), str(src.constants))
        if key in done:
            continue
        done.add(key)
        compiled = triton.compile(src, target=GPUTarget("cuda", 90, 32), options=options)
        flags = {k: v for k, v in kwargs.items() if isinstance(v, (bool, int))}
        report = {"kernel": f"{kernel.__module__}.{kernel.fn.__name__}", "flags": flags}
        report |= {"shared": compiled.metadata.shared, "target": re.search(r"\.target (\S+)", compiled.asm["ptx"])[1]}
        report |= {"version": triton.__version__, "warnings": assembler_warnings(compiled.asm["ptx"])}
        print(json.dumps(report | inspect_binary(compiled.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
