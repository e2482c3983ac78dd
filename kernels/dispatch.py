"""Which backend runs an op, and how Triton kernels wait until one is needed.

Every op is a `torch.library` custom op with one implementation that chooses inside, when it runs: the graph that
`torch.compile` sees is the same on every machine, and forward and backward may even use different backends, because
both keep the same tensors.

`import kernels` must not import triton: the import is slow, needs a GPU build of torch to make sense, and reads
TRITON_INTERPRET once and for all. But a kernel should stand in the same file as its op. So a kernel is a plain
function wrapped in `Kernel`, which hands it to `triton.jit` at the first launch.
"""

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, overload

import torch

BACKENDS = ("auto", "hopper", "triton", "reference")

_lock = threading.Lock()
_warned: set[str] = set()
_chosen: str | None = None  # set by the context manager; process-wide, since autograd runs backward in other threads


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} does not exist; choose one of: {', '.join(BACKENDS)}")
    return name


def requested() -> str:
    """The name asked for: by the context manager, else by DEEPSEEK_CODER_KERNELS, else "auto"."""
    return _chosen if _chosen is not None else _check_name(os.environ.get("DEEPSEEK_CODER_KERNELS") or "auto")


@functools.cache
def triton_missing() -> str | None:
    """Why triton cannot be imported, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a triton that does not fit the driver or the Python raises many kinds
        return f"triton does not import ({error})"
    return None


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def hopper_missing(device: torch.device) -> str | None:
    """Why the Hopper kernels cannot run on `device`, or None when they can."""
    if device.type != "cuda":
        return f"the Hopper kernels need a Hopper GPU, and the tensors are on {device}"
    if not _is_hopper(device):
        return f"the Hopper kernels need a Hopper GPU, not {torch.cuda.get_device_name(device)}"
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except Exception as error:  # Gluon is young: another version of triton may lack it
        return f"this triton has no Gluon for Hopper ({error})"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter on the CPU. Must be set before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def early_launch(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one that it waits for has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have: 227 KB on Hopper, 163 on A100, 99 on most others."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return 232448


def _warn_once(instead: str, reason: str) -> None:
    with _lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(f"kernels: using {instead}, since {reason}", RuntimeWarning, stacklevel=3)


def use_triton(tensor: torch.Tensor, unsupported: str | None = None) -> bool:
    """Whether the op that was given `tensor` runs its Triton kernel (True) or the reference (False).

    `unsupported` says why the Triton kernel cannot take these inputs: `auto` then warns once and uses the reference.
    ValueError where the backend was asked for by name and cannot serve, and where the tensor is on another GPU than the
    current one, on which Triton would launch.
    """
    name = requested()
    if name == "reference":
        return False
    if name == "auto":
        if tensor.device.type != "cuda":
            return False
        reason = triton_missing() or unsupported
        if reason:
            _warn_once("the plain PyTorch reference", reason)
            return False
        _check_current(tensor.device)
        return True
    if tensor.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"kernel backend {name!r} was asked for, but the tensors are on {tensor.device}: move them to a GPU, "
            "choose 'auto' or 'reference', or set TRITON_INTERPRET=1 before starting Python (slow: for tests)"
        )
    reason = triton_missing() or unsupported
    if reason:
        raise ValueError(f"kernel backend {name!r} was asked for, but {reason}")
    _check_current(tensor.device)
    return True


def _check_current(device: torch.device) -> None:
    if device.type == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise ValueError(
            f"kernels: the tensors are on {device}, but cuda:{current} is the current device, on which kernels are "
            f"launched: choose it with torch.cuda.set_device({device.index})"
        )


def use_hopper(tensor: torch.Tensor, unsupported: str | None = None) -> bool:
    """Of an op whose Triton kernel can run: whether it runs its Hopper kernel instead. As `use_triton` otherwise."""
    name = requested()
    if name not in ("auto", "hopper"):
        return False
    if name == "auto" and not _is_hopper(tensor.device):
        return False  # nothing is missing: there is no faster path
    reason = hopper_missing(tensor.device) or unsupported
    if reason and name == "hopper":
        raise ValueError(f"kernel backend 'hopper' was asked for, but {reason}")
    if reason:
        _warn_once("the portable Triton kernels", reason)
    return reason is None


@contextmanager
def _choose(name: str) -> Iterator[None]:
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


@overload
def backend(name: None = None) -> str: ...
@overload
def backend(name: str) -> AbstractContextManager[None]: ...
def backend(name: str | None = None) -> str | AbstractContextManager[None]:
    """The kernel backend in use, or a context manager that chooses one.

    `backend()` returns "hopper" (Triton kernels, and where there are such those of the Hopper generation), "triton" or
    "reference": what was asked for, or what `auto` takes on this machine.
    `with backend("reference"): ...` chooses for the whole process (not for one thread) until the block ends.
    Without it DEEPSEEK_CODER_KERNELS decides; values: auto, hopper, triton, reference. ValueError for any other name.
    """
    if name is not None:
        return _choose(_check_name(name))
    if requested() != "auto":
        return requested()
    if not torch.cuda.is_available() or triton_missing():
        return "reference"
    device = torch.device("cuda", torch.cuda.current_device())
    return "triton" if hopper_missing(device) else "hopper"


_library = torch.library.Library("deepseek_coder", "DEF")


class CustomOp:
    """A function as the op deepseek_coder::`name`, which changes none of its arguments: a decorator.

    What `torch.library.custom_op` does, without its wrapper around each call: an empty op takes 8 us and not
    23, and 79 and not 110 through autograd (torch 2.13, CPU). Ops that change arguments need that wrapper, which counts
    their versions.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"{_library.ns}::{name}"
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        self.op = getattr(getattr(torch.ops, _library.ns), name).default

    def __call__(self, *args: Any) -> Any:
        return self.op(*args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        torch.library.register_fake(self.name, function, lib=_library)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_library)


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOp]:
    return functools.partial(CustomOp, name)


class Kernel:
    """A Triton kernel that imports triton when it is first launched: `kernel[grid](...)`, as with `triton.jit`.

    The function's module names the language `tl`; it is put there then. Until then annotations cannot be evaluated:
    the module begins with `from __future__ import annotations`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @functools.cached_property
    def jit(self) -> Any:
        import triton
        import triton.language as tl

        self.function.__globals__["tl"] = tl
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jit[grid]


class Launcher:
    """A jitted kernel, launched without the JIT's look at every argument: 6 us of the launch of a small kernel,
    44 of one with four tensor descriptors (triton 3.6, on the host alone).

    The caller answers for `key`: with the constants it must decide all that Triton specialises a kernel on, which is
    each argument's type, whether pointers and integers are divisible by 16, and which integers are 1. None: the JIT
    decides. The constants are the kernel's last parameters, in its order; the options (num_warps, ...) always the same.
    """

    def __init__(self, kernel: Any, **options: int) -> None:
        self.kernel, self.options = kernel, options
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], key: tuple[Any, ...] | None, *arguments: Any, **constants: Any
    ) -> None:
        full_key = (key, *constants.values())
        compiled = self.compiled.get(full_key)
        if compiled is not None:
            compiled[grid](*arguments, *constants.values())
            return
        compiled = self.kernel[grid](*arguments, **constants, **self.options)
        if compiled is not None and key is not None:  # the interpreter compiles nothing
            self.compiled[full_key] = compiled


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def floating(x: torch.Tensor) -> bool:
    """Whether x has a dtype in which the ops compute; those of 8 bits are for caches only."""
    return x.is_floating_point() and x.element_size() > 1


def check(condition: bool, message: Callable[[], str]) -> None:
    """ValueError with `message()` unless `condition`: for what a caller got wrong.

    A message that is made in vain costs time, and under torch.compile it would fix every length that it prints.
    """
    if not condition:
        raise ValueError(message())
