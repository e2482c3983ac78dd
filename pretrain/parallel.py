"""Processes and sharding: FSDP2 over one mesh dimension, applied at world size 1 too.

Applying it everywhere means that one device and many run the same code with the same dtypes: fp32 weights and
optimizer state, computation in `dtype`, gradients reduced in fp32. Gradients are *summed* over ranks; dividing by the
number of valid tokens of the whole step happens once, in the loss, so that any split of a batch over ranks and
micro-batches gives the same gradient.
"""

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from deepseek_coder.model import Decoder, initial_weight


@contextmanager
def process_group(device_type: str) -> Iterator[DeviceMesh]:
    """The mesh of all ranks. Under torchrun it joins them; alone, it makes a group of one."""
    options: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"}
    if "RANK" not in os.environ:
        with tempfile.NamedTemporaryFile(delete=False) as rendezvous:
            options |= {"init_method": f"file://{rendezvous.name}", "rank": 0, "world_size": 1}
        os.unlink(rendezvous.name)
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(**options)
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    try:
        yield mesh
    finally:
        dist.destroy_process_group()
        # A gloo thread that still has to free the last collective's tensors when Python shuts down aborts the process
        # (pytorch issue 190489). The threads end with the last reference to the group: FSDP's go with the model, and
        # the mesh, which DTensor's caches keep for ever, has to let go of its own (a test counts the threads).
        getattr(mesh, "_pg_registry", {}).clear()
        gc.collect()


def shard(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard every block, then what is left (embedding, last norm, head), computing in `dtype`. In place."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    modules = [*model.layers, model]
    for module in modules:
        # The last block is needed again at once by the backward: gathering it twice would be waste.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model.layers[-1])
    for module in modules:
        module.set_gradient_divide_factor(1.0)
        if mesh.device_type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


@torch.no_grad()
def initialise(model: Decoder, seed: int, mesh: DeviceMesh) -> None:
    """Give a sharded model on the meta device memory and its initial weights, which do not depend on the sharding."""
    model.to_empty(device=mesh.device_type)
    for name, parameter in model.named_parameters():
        full = initial_weight(name, parameter.shape, model.config.init_std, seed)
        copy_shard(parameter, full)


def copy_shard(parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
    """Copy this rank's part of `full`, which every rank holds, into a sharded parameter."""
    assert isinstance(parameter, DTensor)
    full = full.to(parameter.device, parameter.dtype)
    part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all ranks, on all ranks."""
    dist.all_reduce(value)
    return value
