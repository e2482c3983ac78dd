"""Writes a Hugging Face folder, one shard in memory at a time.

The folder appears as a whole or not at all (`destination.py`). The same tensors in the same order always give the same
bytes. A conversion of many gigabytes may be killed: with `resume`, every finished shard is on the disk and noted in
progress.json of the temporary folder, and the same call goes on behind it.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import names
from .checkpoint import TOKENIZER_FILES, Deferred
from .config import normalise_config
from .destination import flush_to_disk, new_folder, writing

_PROGRESS = "progress.json"

DEFAULT_SHARD_SIZE = 5_000_000_000
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")}
_UNITS |= {f"{prefix}IB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or "1000000"; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2] or ""] if match and (match[2] or "") in _UNITS else 0
    if not 1 <= size < math.inf:
        raise ValueError(f"size {text!r:.80} is not understood; write for example 5GB, 500MB or 2GiB")
    return int(size)


def write_folder(
    path: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor | Deferred]],
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    generation_config: dict[str, Any] | None = None,
    model_card: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    force: bool = False,
    resume: str | None = None,
) -> None:
    """Write a model folder that transformers, vLLM and this project load. Holds one shard in memory at a time.

    tensors             (Hugging Face name, float32, float16 or bfloat16 tensor on any device), each name once; a
                        `Deferred` one is not made if its shard is finished
    tokenizer_files     file name -> content, written byte for byte
    generation_config   None: the token ids of the config
    model_card          text of README.md
    max_shard_size      bytes of tensor data a file; a larger single tensor gets a file of its own
    force               replace an existing model folder
    resume              names the work: source, dtype, shard size. What a killed call of the same name finished is kept

    Raises FileExistsError for a destination in the way, ValueError for tensors that do not fit the config, OSError for
    what the disk refuses. After any error the destination is as before and the temporary folder is gone; what a killed
    process leaves, the next call for the same destination puts right. One process at a time may write a destination.
    """
    config = normalise_config(config, "config of the model to write")
    _check_tokenizer_names(tokenizer_files or {})
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size}; give a positive number of bytes")
    destination = Path(path).resolve()
    resumable = None if resume is None else lambda folder: bool(_finished_shards(folder, resume))
    with new_folder(destination, force, resumable) as temporary:
        dtype = _write_weights(destination, temporary, config, tensors, max_shard_size, resume)
        with writing(destination):
            _write_json(temporary / "config.json", {**config, "torch_dtype": dtype})
            if generation_config is None:
                generation_config = {key: config[key] for key in config if key.endswith("_token_id")}
            _write_json(temporary / "generation_config.json", generation_config)
            if model_card is not None:
                (temporary / "README.md").write_text(model_card, encoding="utf-8")
            for name, content in (tokenizer_files or {}).items():
                (temporary / name).write_bytes(content)


def write_tokenizer(path: str | Path, tokenizer_files: Mapping[str, bytes], force: bool = False) -> None:
    """Write a folder with the files of a tokenizer only. Raises as `write_folder` does."""
    _check_tokenizer_names(tokenizer_files)
    with new_folder(path, force) as temporary, writing(Path(path).resolve()):
        for name, content in tokenizer_files.items():
            (temporary / name).write_bytes(content)


def _check_tokenizer_names(files: Mapping[str, bytes]) -> None:
    unknown = sorted(set(files) - set(TOKENIZER_FILES))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no tokenizer file; these are {', '.join(TOKENIZER_FILES)}")


# One finished shard: tensor name -> its bytes and the name of its dtype.
Shard = dict[str, tuple[int, str]]


def _write_weights(
    destination: Path,
    folder: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor | Deferred]],
    limit: int,
    resume: str | None,
) -> str:
    """Write the shards and, if there are several, the index; returns the dtype that most bytes have, as a name."""
    expected = names.huggingface(config)
    shards = [] if resume is None else _finished_shards(folder, resume)
    finished = {name for shard in shards for name in shard}
    seen: set[str] = set()
    pending: dict[str, torch.Tensor] = {}
    noted: Future[None] | None = None

    def note(count: int) -> None:
        flush_to_disk(folder / f"{count - 1}.part")
        _write_json(folder / f"{_PROGRESS}.new", {"resume": resume, "shards": shards[:count]})
        (folder / f"{_PROGRESS}.new").replace(folder / _PROGRESS)

    def flush() -> None:
        nonlocal noted
        # Around each write and not the whole loop: `tensors` reads other files, whose errors are not ours.
        with writing(destination):
            _save(pending, folder / f"{len(shards)}.part")
            shards.append({key: (tensor.nbytes, _name(tensor.dtype)) for key, tensor in pending.items()})
            if noted is not None:
                noted.result()
            if resume is not None:
                noted = disk.submit(note, len(shards))
        pending.clear()

    # The next shard is made and written while the disk takes this one: waiting for each made it half as slow again.
    with ThreadPoolExecutor(1) as disk:
        for name, given in tensors:
            if name in finished:
                seen.add(name)
                continue
            # Before the tensor is made, which may take as much memory again.
            if pending and sum(other.nbytes for other in pending.values()) + given.nbytes > limit:
                flush()
            tensor = given.make() if isinstance(given, Deferred) else given
            _check_tensor(name, tensor, expected, seen)
            seen.add(name)
            # Detached, on the host and with storage of its own layout: what the file format demands.
            tensor = tensor.detach().to("cpu").contiguous()
            if any(tensor.data_ptr() == other.data_ptr() for other in pending.values()):
                tensor = tensor.clone()
            pending[name] = tensor
        missing = [name for name in expected if name not in seen]
        if missing:
            raise ValueError(f"tensor {missing[0]} {expected[missing[0]]} was not given, but the config asks for it")
        if pending:
            flush()
        if noted is not None:
            with writing(destination):
                noted.result()

    sizes = {name: size for shard in shards for name, (size, _) in shard.items()}
    weight_map: dict[str, str] = {}
    with writing(destination):
        # First, so that a folder with final names is never taken for one to go on with.
        (folder / _PROGRESS).unlink(missing_ok=True)
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            (folder / f"{i}.part").rename(folder / file)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder / "model.safetensors.index.json", index)
    bytes_by_dtype: Counter[str] = Counter()
    for shard in shards:
        for size, dtype in shard.values():
            bytes_by_dtype[dtype] += size
    return bytes_by_dtype.most_common(1)[0][0]


def _finished_shards(folder: Path, resume: str) -> list[Shard]:
    """What progress.json notes, if it belongs to this work and the files are there; they were on the disk before it."""
    try:
        progress = json.loads((folder / _PROGRESS).read_bytes())
        shards = progress["shards"] if progress["resume"] == resume else []
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return shards if all((folder / f"{i}.part").is_file() for i in range(len(shards))) else []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(name: str, tensor: torch.Tensor, expected: dict[str, tuple[int, ...]], seen: set[str]) -> None:
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
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
