"""Training checkpoints: `RUN/checkpoints/step-00000100/`, complete or not there.

DCP stores tensors only, each rank its own shards: `model.*`, `exp_avg.*`, `exp_avg_sq.*`. Beside them lie
`config.json` and the tokenizer's files (what export needs) and `state.json` (the step). Data order is a pure function
of the step, so nothing else has to be remembered. A checkpoint is written under another name and renamed when every
rank is done; whatever a killed run left half-written is never read.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from convert.dcp import Reader
from deepseek_coder.config import ModelConfig
from deepseek_coder.model import Decoder
from deepseek_coder.tokenizer import Tokenizer

from .files import writing


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted((run / "checkpoints").glob("step-*[0-9]"))
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """How many optimizer steps had been done."""
    return json.loads((checkpoint / "state.json").read_text())["step"]


def save(
    run: Path, step: int, model: Decoder, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer, keep: int
) -> Path:
    """Write the checkpoint after `step` steps, then delete all but the newest `keep`. Every rank calls it."""
    final = run / "checkpoints" / f"step-{step:08}"
    temporary = final.with_name(f"{final.name}.tmp")
    try:
        with writing(final):
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            dist.barrier()
            try:
                dcp.save(_tensors(model, optimizer), checkpoint_id=temporary)
            except CheckpointException as error:
                raise OSError(_reason(error, temporary)) from None
            if dist.get_rank() == 0:
                dtype = {"torch_dtype": "float32"}
                (temporary / "config.json").write_text(json.dumps(model.config.to_dict() | dtype, indent=2) + "\n")
                tokenizer.save(temporary)
                (temporary / "state.json").write_text(json.dumps({"step": step}) + "\n")
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if dist.get_rank() == 0:
        for old in sorted(final.parent.glob("step-*[0-9]"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def _reason(error: CheckpointException, folder: Path) -> str:
    """Why DCP failed. To its writer a full disk is a failed assertion, which would not help anyone."""
    if shutil.disk_usage(folder).free < 2**20:
        return os.strerror(errno.ENOSPC)
    return _first(error)


def restore(checkpoint: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into a sharded model and its optimizer, at any world size; the step to go on with.

    Raises ValueError for a damaged checkpoint and for one of another model.
    """
    step = step_of(checkpoint)
    _compare(checkpoint, model.config)
    _make_state(optimizer)
    with damage_named(checkpoint):
        dcp.load(_tensors(model, optimizer), storage_reader=Reader(str(checkpoint)))
    for state in optimizer.state.values():
        state["step"].fill_(step)
    return step


def _compare(checkpoint: Path, config: ModelConfig) -> None:
    """DCP loads what it is asked for: a smaller model would go on with a part of the weights."""
    stored = json.loads((checkpoint / "config.json").read_text())
    for key, value in config.to_dict().items():
        if stored.get(key) != value:
            raise ValueError(
                f"{checkpoint}: holds a model with {key} {stored.get(key)}, the recipe's has {value}; "
                "go on with the old recipe, or set another train.run"
            )


@contextmanager
def damage_named(checkpoint: Path) -> Iterator[None]:
    """Says of a checkpoint that cannot be read what to do about it, in a ValueError."""
    try:
        yield
    except (CheckpointException, ValueError) as error:  # the first is no subclass of Exception
        reason = _first(error) if isinstance(error, CheckpointException) else str(error).partition(";")[0]
        raise ValueError(
            f"{checkpoint}: damaged ({reason}); delete this folder and run the same command again, which uses "
            "the checkpoint before it"
        ) from None


def _first(error: CheckpointException) -> str:
    """One failure of those that the ranks had."""
    failure = next(iter(error.failures.values()))[0]
    return str(failure) or type(failure).__name__


def _tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW make its state in its own form: one step with zero gradients at learning rate 0 changes no weight."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
