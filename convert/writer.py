"""Writes a Hugging Face folder; `huggingface.py` tells the idea."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from . import names
from .checkpoint import TOKENIZER_FILES
from .config import normalise_config

DEFAULT_SHARD_SIZE = 5_000_000_000
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")}
_UNITS |= {f"{prefix}IB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or "1000000"; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match and (match[2] or "") in _UNITS else 0
    if size <= 0:
        raise ValueError(f"size {text!r} is not understood; write for example 5GB, 500MB or 2GiB")
    return size


def write_folder(
    path: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    generation_config: dict[str, Any] | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
) -> None:
    """Write a model folder that transformers, vLLM and this project load. Holds one shard in memory at a time.

    tensors             (Hugging Face name, float32, float16 or bfloat16 tensor on any device), each name once
    tokenizer_files     file name -> content, written byte for byte
    generation_config   None: the token ids of the config
    max_shard_size      bytes of tensor data a file; a larger single tensor gets a file of its own
    force               replace an existing model folder

    Raises FileExistsError for a destination in the way, ValueError for tensors that do not fit the config, OSError for
    what the disk refuses. After any error the destination is as before and the temporary folder is gone; what a killed
    process leaves, the next call for the same destination puts right. One process at a time may write a destination.
    """
    config = normalise_config(config, "config of the model to write")
    unknown = sorted(set(tokenizer_files or {}) - set(TOKENIZER_FILES))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no tokenizer file; these are {', '.join(TOKENIZER_FILES)}")
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size}; give a positive number of bytes")
    destination = Path(path).resolve()
    with _writing(destination):
        _recover(destination)
    _refuse_existing(destination, force)
    temporary = _temporary(destination)
    with _writing(destination):
        temporary.mkdir(parents=True)
    try:
        dtype = _write_weights(destination, config, tensors, max_shard_size)
        with _writing(destination):
            _write_json(temporary / "config.json", {**config, "torch_dtype": dtype})
            if generation_config is None:
                generation_config = {key: config[key] for key in config if key.endswith("_token_id")}
            _write_json(temporary / "generation_config.json", generation_config)
            for name, content in (tokenizer_files or {}).items():
                (temporary / name).write_bytes(content)
            for file in temporary.iterdir():
                _flush_to_disk(file)
            _move_into_place(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(destination: Path) -> Path:
    """Where the new folder grows. The name is fixed, so that the next call finds what a killed process left."""
    return destination.parent / f".{destination.name}.tmp"


def _set_aside(destination: Path) -> Path:
    """Where a replaced folder waits until the new one is in place."""
    return destination.parent / f".{destination.name}.old"


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    """Turns what the disk refuses into one sentence; the temporary files that the error might name are gone by then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The safetensors library reports a full disk as its own error.
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise OSError(
            f"{destination}: cannot be written ({reason}); free some space or choose another disk or folder"
        ) from None


def _recover(destination: Path) -> None:
    """Put right what a killed process left: half a folder, or an old one set aside for a new one that never came."""
    temporary, old = _temporary(destination), _set_aside(destination)
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and _is_free(destination):
        old.rename(destination)
    elif old.exists():
        _delete(old, temporary)


def _delete(old: Path, temporary: Path) -> None:
    """Under the temporary name it is never put back, should the deletion be interrupted half-way."""
    old.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _is_free(destination: Path) -> bool:
    return not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))


def _refuse_existing(destination: Path, force: bool) -> None:
    if _is_free(destination):
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination}: is a file; choose another destination")
    if not force:
        raise FileExistsError(
            f"{destination}: exists and is not empty; choose another folder or add --force (force=True)"
        )
    # Replacing deletes the old folder, so a slip such as the home folder must not pass.
    if not (destination / "config.json").is_file() or any(entry.is_dir() for entry in destination.iterdir()):
        raise FileExistsError(
            f"{destination}: is no plain model folder (config.json and files only), so it is not replaced; "
            "choose another destination or delete it yourself"
        )


def _write_weights(
    destination: Path, config: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], limit: int
) -> str:
    """Write the shards and, if there are several, the index; returns the dtype that most bytes have, as a name."""
    folder = _temporary(destination)
    expected = names.huggingface(config)
    shards: list[list[str]] = []
    bytes_of: dict[str, int] = {}
    pending: dict[str, torch.Tensor] = {}
    bytes_by_dtype: dict[torch.dtype, int] = {}

    def flush() -> None:
        # Around each write and not the whole loop: `tensors` reads other files, whose errors are not ours.
        with _writing(destination):
            _save(pending, folder / f"{len(shards)}.part")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        _check_tensor(name, tensor, expected, bytes_of)
        size = tensor.numel() * tensor.element_size()
        if pending and sum(bytes_of[key] for key in pending) + size > limit:
            flush()
        # Detached, on the host and with storage of its own layout: what the file format demands.
        tensor = tensor.detach().to("cpu").contiguous()
        if any(tensor.data_ptr() == other.data_ptr() for other in pending.values()):
            tensor = tensor.clone()
        pending[name] = tensor
        bytes_of[name] = size
        bytes_by_dtype[tensor.dtype] = bytes_by_dtype.get(tensor.dtype, 0) + size
    missing = [name for name in expected if name not in bytes_of]
    if missing:
        raise ValueError(f"tensor {missing[0]} {expected[missing[0]]} was not given, but the config asks for it")
    flush()

    weight_map: dict[str, str] = {}
    with _writing(destination):
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            (folder / f"{i}.part").rename(folder / file)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder / "model.safetensors.index.json", index)
    return str(max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype])).removeprefix("torch.")


def _check_tensor(
    name: str, tensor: torch.Tensor, expected: dict[str, tuple[int, ...]], seen: Mapping[str, int]
) -> None:
    if name not in expected:
        raise ValueError(f"tensor {name} does not belong to this model; its config has no place for it")
    if name in seen:
        raise ValueError(f"tensor {name} was given twice; give each tensor once")
    if tuple(tensor.shape) != expected[name]:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, but the config says {expected[name]}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"tensor {name} is {tensor.dtype}; only float32, float16 and bfloat16 can be written")


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    # The library replaces the file by one that only its owner can read.
    file.chmod(mode)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _move_into_place(destination: Path) -> None:
    """Rename the temporary folder to `destination`; an existing one is set aside first and deleted last."""
    temporary, old = _temporary(destination), _set_aside(destination)
    if _is_free(destination):
        temporary.replace(destination)
        return
    destination.rename(old)
    try:
        temporary.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    _delete(old, temporary)
