"""The training run, from top to bottom: processes, data, model, optimizer, loop.

Run it as `python -m pretrain train RECIPE.toml`, or under torchrun for several devices. A run that was interrupted
goes on from its newest checkpoint when it is started again with the same recipe.
"""

import functools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset

from convert import open_checkpoint
from convert.checkpoint import Deferred
from convert.names import fused
from convert.writer import write_folder
from deepseek_coder.config import ModelConfig
from deepseek_coder.model import Decoder

from . import checkpoint, metrics, optimizer, parallel
from .dataset import Window, Windows, join_windows, load_windows
from .files import write_json, writing
from .mixture import Mixture
from .recipe import Recipe, to_dict
from .schedule import learning_rate


def train(recipe: Recipe) -> None:
    """Train as the recipe says; metrics and checkpoints land in `recipe.train.run`.

    Raises ValueError or FileNotFoundError for what a user can mend, FloatingPointError when the loss or the gradient
    is no longer a number (before it reaches the weights).
    """
    settings = recipe.train
    device_type = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError('train.device is "cuda", but torch finds no GPU here; set it to "cpu"')
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device_type == "cuda" else "float32"))
    with parallel.process_group(device_type) as mesh, metrics.progress_bar(dist.get_rank() == 0) as bar:
        torch.manual_seed(settings.seed)
        _train(recipe, mesh, torch.device(device_type), dtype, bar)


def _train(recipe: Recipe, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, bar: Progress) -> None:
    settings, run = recipe.train, Path(recipe.train.run)
    rank, world = dist.get_rank(), dist.get_world_size()
    if settings.batch % (world * settings.micro_batch):
        raise ValueError(
            f"train.batch {settings.batch} cannot be split over {world} processes in micro-batches of "
            f"{settings.micro_batch}; make it a multiple of {world * settings.micro_batch}"
        )

    # Data: windows are a pure function of their number.
    data = recipe.data
    how = (data.fim_rate, data.fim_loss, data.fim_modes, data.fim_spans, data.packing)
    windows = load_windows(data.source, "train", data.window, settings.seed, *how)
    valid = load_windows(data.source, "valid", data.window, 0, 0.0, "all") if settings.validate_every else None
    tokenizer = windows.tokenizer

    # Model: described on the meta device, sharded, then filled.
    config = recipe.model_config(tokenizer.vocab_size, tokenizer.bos_id, windows.eos)
    with torch.device("meta"):
        model = Decoder(config)
    parallel.shard(model, mesh, dtype)
    parallel.initialise(model, settings.seed, mesh)
    if settings.init:
        _load_weights(model, settings.init)
    schedule = recipe.optimizer
    adamw = optimizer.build(model, schedule.betas, schedule.eps, schedule.weight_decay)

    newest = checkpoint.latest(run)
    first = checkpoint.restore(newest, model, adamw) if newest else 0
    # A run that was killed right after the checkpoint still owes its validation.
    validated = any(r["step"] == first - 1 and "valid_loss" in r for r in metrics.read(run / "metrics.jsonl"))
    if rank == 0:
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
        write_json(run / "recipe.json", to_dict(recipe))
        log = metrics.MetricsFile(run / "metrics.jsonl", first)
        print(_headline(config.num_parameters, windows, settings.batch * data.window, first, newest), flush=True)
        if isinstance(windows.tokens, Mixture):
            print(windows.tokens.described(settings.steps * settings.batch / windows.windows_in(0)), flush=True)

    def report(row: dict) -> None:
        if rank == 0:
            log.write(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    # The loop. A step is `batch` windows, cut over ranks and micro-batches.
    per_rank = settings.batch // world
    micro_batches = per_rank // settings.micro_batch
    loader = _micro_batches(
        windows, settings.batch, per_rank, rank, settings.micro_batch, data.workers, first, settings.steps
    )
    if valid is not None and not validated and (first == settings.steps or first % settings.validate_every == 0):
        report({"step": max(first - 1, 0), **validate(model, valid, device, settings.validate_windows)})
    task = bar.add_task("training", total=settings.steps, completed=first)
    clock, clock_step = time.perf_counter(), first
    for step in range(first, settings.steps):
        model.train()
        parts = [next(loader) for _ in range(micro_batches)]
        # The step's loss is the mean over all its tokens, on all ranks, so the count is needed before the first one.
        count = parallel.total(torch.tensor(float(sum((p.targets != -100).sum() for p in parts)), device=device))
        loss = torch.zeros((), device=device)
        for part in parts:
            tokens, targets, cu_seqlens = _to(part, device)
            loss_sum, _ = model(tokens, cu_seqlens=cu_seqlens, max_seqlen=data.window, targets=targets)
            (loss_sum / count).backward()
            loss += loss_sum.detach() / count
        norm = optimizer.clip(model, schedule.clip)
        loss = parallel.total(loss)
        if not math.isfinite(float(norm)) or not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"step {step}: loss {float(loss)}, gradient norm {float(norm)}; "
                f"windows {step * settings.batch} to {(step + 1) * settings.batch - 1}. Nothing was updated; "
                "lower optimizer.learning_rate and run again, which goes on from the newest checkpoint."
            )
        rate = learning_rate(step, settings.steps, schedule.learning_rate, schedule.warmup_steps, schedule.stage_ends)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad(set_to_none=True)

        done = step + 1
        row = {"step": step, "loss": float(loss), "learning_rate": rate, "gradient_norm": float(norm)}
        if done % max(settings.log_every, 1) == 0 or done == settings.steps:
            row |= _speed(recipe, config, (done - clock_step) / (time.perf_counter() - clock), world, device)
            report(row)
        elif rank == 0:
            log.write(row)
        # Save before validating: a failure there must not cost the steps before it.
        if done == settings.steps or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
            checkpoint.save(run, done, model, adamw, tokenizer, settings.keep_checkpoints)
        if valid is not None and (done == settings.steps or done % settings.validate_every == 0):
            report({"step": step, **validate(model, valid, device, settings.validate_windows)})
        if "tokens_per_second" in row:
            clock, clock_step = time.perf_counter(), done
        bar.update(task, completed=done)


@torch.no_grad()
def validate(model: Decoder, windows: Windows, device: torch.device, limit: int) -> dict[str, float]:
    """Mean loss in nats a token, and bits per byte of the predicted text, on held-out documents, plain (no FIM).

    limit: how many windows at most, 0 for all; always the same ones.
    """
    model.eval()
    rank, world = dist.get_rank(), dist.get_world_size()
    bytes_of = torch.tensor(windows.tokenizer.num_bytes(), device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    number = min(windows.windows_in(0), limit or windows.windows_in(0))
    for start in range(0, number, world):
        # Every rank runs every round, the last ones on a window without targets: FSDP gathers weights in step.
        tokens, targets, cu_seqlens = _to(windows[min(start + rank, number - 1)], device)
        if start + rank >= number:
            targets = torch.full_like(targets, -100)
        loss_sum, count = model(tokens, cu_seqlens=cu_seqlens, max_seqlen=windows.window, targets=targets)
        num_bytes = (bytes_of[targets.clamp(min=0)] * (targets != -100)).sum()
        sums += torch.stack([loss_sum.double(), count.double(), num_bytes.double()])
    nll, count, num_bytes = parallel.total(sums).tolist()
    return {"valid_loss": nll / count, "bits_per_byte": metrics.bits_per_byte(nll, num_bytes)}


class _MicroBatches(Dataset):
    """Micro-batch m of one rank: its windows, joined."""

    def __init__(self, windows: Windows, batch: int, per_rank: int, rank: int, micro_batch: int):
        self.windows, self.batch, self.per_rank, self.rank, self.micro_batch = (
            windows,
            batch,
            per_rank,
            rank,
            micro_batch,
        )

    def __getitem__(self, index: int) -> Window:
        step, part = divmod(index, self.per_rank // self.micro_batch)
        first = step * self.batch + self.rank * self.per_rank + part * self.micro_batch
        return join_windows([self.windows[i] for i in range(first, first + self.micro_batch)])


def _micro_batches(
    windows: Windows, batch: int, per_rank: int, rank: int, micro_batch: int, workers: int, first: int, steps: int
) -> Iterator[Window]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if workers else "true")
    a_step = per_rank // micro_batch
    order = range(first * a_step, steps * a_step)
    dataset = _MicroBatches(windows, batch, per_rank, rank, micro_batch)
    return iter(DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers))


def _to(window: Window, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    moved = [t.to(device, non_blocking=True) for t in (window.tokens, window.targets, window.cu_seqlens)]
    return moved[0], moved[1], moved[2]


@torch.no_grad()
def _load_weights(model: Decoder, folder: str) -> None:
    """Start from a model folder. Its sizes must be the recipe's, but for padding rows of the vocabulary."""
    parameters = dict(model.named_parameters())
    with open_checkpoint(folder) as source:
        for name, parts in fused(model.config.to_dict()).items():
            for part in parts:
                if source.shapes.get(part.name) != part.shape:
                    raise ValueError(
                        f"{folder}: {part.name} has shape {source.shapes.get(part.name)}, the recipe's model "
                        f"{part.shape}; set the recipe's [model] to the folder's sizes"
                    )
            parallel.copy_shard(parameters[name], torch.cat([source.tensor(part.name) for part in parts]))


def _speed(
    recipe: Recipe, config: ModelConfig, steps_per_second: float, world: int, device: torch.device
) -> dict[str, float]:
    """tokens/s over all devices; where the device's peak is known, model FLOPs utilisation in both conventions."""
    window = recipe.data.window
    tokens = steps_per_second * recipe.train.batch * window
    row = {"tokens_per_second": tokens}
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        for key, causal in (("mfu", False), ("mfu_causal", True)):
            value = metrics.mfu(config, window, tokens / world, name, causal)
            if value is not None:
                row[key] = value
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _headline(parameters: int, windows: Windows, step_tokens: int, first: int, newest: Path | None) -> str:
    start = f"going on from {newest}" if newest else "from the start"
    return (
        f"{parameters:,} parameters; {windows.windows_in(0):,} windows of {windows.window:,} tokens an epoch; "
        f"{step_tokens:,} tokens a step; {start} (step {first})"
    )


def export(run: str | Path, out: str | Path, force: bool = False) -> None:
    """The newest checkpoint of a run as a Hugging Face folder, weights in fp32 as they were trained."""
    newest = checkpoint.latest(Path(run))
    if newest is None:
        raise FileNotFoundError(f"{run}: no checkpoint in it; train first, or name the run's folder")
    with checkpoint.damage_named(newest):
        source = open_checkpoint(newest)

    def read(name: str) -> torch.Tensor:
        with checkpoint.damage_named(newest):
            return source.tensor(name)

    with source:
        sizes = {name: math.prod(shape) * source.dtypes[name].itemsize for name, shape in source.shapes.items()}
        tensors = ((name, Deferred(size, functools.partial(read, name))) for name, size in sizes.items())
        write_folder(out, source.config, tensors, tokenizer_files=source.tokenizer_files, force=force)
