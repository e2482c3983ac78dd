"""Training checkpoints of torch.distributed.checkpoint (DCP), read without trusting them.

A DCP folder holds tensors cut into shards, and `.metadata`, a pickle that says where each lies. torch unpickles that
file freely; here only the classes that describe tensors are let through, so a checkpoint cannot run code.

`open_training` takes from each shard the rows of the tensor that was asked for, whatever the number of GPUs that wrote
them. Shards are mapped and not read as a whole: a run on one GPU stores a fused matrix in one piece, which for the 33B
model is 1.1 GB.
"""

import io
import pickle
import pickletools
import re
import sys
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from . import names
from .checkpoint import Checkpoint, read_tokenizer_files
from .files import STORED
from .huggingface import read_config
from .json_files import first_line

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class Reader(FileSystemReader):
    """torch's reader with a restricted unpickler for `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a DCP folder. FileNotFoundError, or ValueError for a file that is damaged or names other code."""
    file = folder / ".metadata"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: not a training checkpoint (no .metadata)") from None
    try:
        _refuse_huge_numbers(content)
        metadata = _Unpickler(io.BytesIO(content)).load()
    except Exception as error:
        # A damaged pickle makes its classes fail in any way.
        raise ValueError(f"{file}: damaged or refused ({str(error)[:160] or type(error).__name__})") from None
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise ValueError(f"{file}: damaged or refused (it holds no metadata)")
    return metadata


def _refuse_huge_numbers(content: bytes) -> None:
    """Python's unpickler allocates what some opcodes ask for before it looks whether there is as much."""
    for opcode, argument, _ in pickletools.genops(content):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError("a memo of impossible size")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def open_training(folder: str | Path, prefix: str = "model.") -> "TrainingCheckpoint":
    """Open a training checkpoint: DCP shards with `config.json` and the tokenizer's files beside them.

    The tensors whose names begin with `prefix` are the model. Raises FileNotFoundError or ValueError: one sentence.
    """
    return TrainingCheckpoint(Path(folder), prefix)


class _Shard(NamedTuple):
    """A part of a stored tensor: where it lies in the tensor, and in which bytes of which file."""

    offsets: torch.Size
    sizes: torch.Size
    file: Path
    begin: int
    length: int


class TrainingCheckpoint(Checkpoint):
    """A model in a DCP folder; see `Checkpoint`. Of a fused matrix, each Hugging Face tensor is a range of rows."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.source = folder
        self.config = read_config(folder)
        self.generation_config = {key: value for key, value in self.config.items() if key.endswith("_token_id")}
        metadata = read_metadata(folder)
        self._shards: dict[str, list[_Shard]] = {}
        self._part_of: dict[str, tuple[str, int]] = {}
        self.shapes, self.dtypes, self.stored = {}, {}, {}
        for name, parts in names.fused(self.config).items():
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            try:
                dtype, self._shards[name] = self._find(metadata, prefix + name, shape)
            except (AttributeError, TypeError) as error:
                # Objects of the right classes with wrong contents.
                raise ValueError(f"{folder / '.metadata'}: damaged at {prefix}{name} ({error!s:.100})") from None
            row = 0
            for part in parts:
                self._part_of[part.name] = name, row
                self.shapes[part.name], self.dtypes[part.name] = part.shape, dtype
                self.stored[part.name] = STORED[dtype]
                row += part.shape[0]
        for file in sorted({shard.file for shards in self._shards.values() for shard in shards}):
            if not file.is_file():
                raise ValueError(f"{file}: not found, though .metadata has tensors there; copy this file too")

    def _find(self, metadata: Metadata, name: str, shape: tuple[int, ...]) -> tuple[torch.dtype, list[_Shard]]:
        """Dtype and shards of a stored tensor, which together cover its shape."""
        entry = metadata.state_dict_metadata.get(name)
        where = f"{self.source / '.metadata'}: tensor {name}"
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{where} is missing; config.json and checkpoint belong to different models")
        if entry.properties.dtype not in STORED:
            raise ValueError(f"{where} is of an unknown type; only float32, float16 and bfloat16 are supported")
        size = torch.Size(entry.size)
        if size != shape:
            raise ValueError(
                f"{where} has shape {tuple(size)!s:.80}, but config.json asks for {shape}; "
                "they belong to different models"
            )
        shards = []
        for chunk in entry.chunks:
            offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
            inside = (0 <= o <= o + size <= limit for o, size, limit in zip(offsets, sizes, shape, strict=False))
            if not len(offsets) == len(sizes) == len(shape) or not all(inside):
                raise ValueError(f"{where} has a shard outside of it; the file is damaged")
            info = metadata.storage_data.get(MetadataIndex(name, offsets))
            if not isinstance(info, _StorageInfo):
                raise ValueError(f"{where} has a shard that no file holds; the checkpoint is damaged")
            # Written by whoever made the checkpoint, so it must not reach other files of this computer.
            if not re.fullmatch(r"[^/\\:\0]{1,200}", info.relative_path):
                raise ValueError(f"{where} points to {info.relative_path!r:.100}, which is no file of the checkpoint")
            if info.transform_descriptors:
                raise ValueError(f"{where} is compressed, which is not supported; save the checkpoint without")
            shards.append(
                _Shard(offsets, sizes, self.source / info.relative_path, index(info.offset), index(info.length))
            )
        cells = sum(shard.sizes.numel() for shard in shards)
        if cells != torch.Size(shape).numel():
            raise ValueError(f"{where} has shards of {cells} numbers for a shape {shape}; the file is damaged")
        return entry.properties.dtype, shards

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return read_tokenizer_files(self.source)

    @property
    def weight_files(self) -> list[Path]:
        return sorted(self.source.glob("*.distcp"))

    def tensor(self, name: str) -> Tensor:
        """ValueError for a damaged shard."""
        stored, row = self._part_of[name]
        rows = self.shapes[name][0]
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        for shard in self._shards[stored]:
            top = shard.offsets[0]
            begin, end = max(top, row), min(top + shard.sizes[0], row + rows)
            if begin < end:
                # Rows are cut here; the other dimensions are whole in the part and perhaps cut in the shard.
                columns = tuple(slice(o, o + size) for o, size in zip(shard.offsets[1:], shard.sizes[1:], strict=True))
                part = self._map(shard, stored, tensor.dtype)[begin - top : end - top]
                tensor[(slice(begin - row, end - row), *columns)] = part
        return tensor

    def _map(self, shard: _Shard, name: str, dtype: torch.dtype) -> Tensor:
        """The shard as a view of its file, to be copied: shards begin at any byte, whatever the size of a number."""
        file = shard.file
        if not 0 <= shard.begin < shard.begin + shard.length <= file.stat().st_size:
            raise ValueError(f"{file}: truncated, {name} ends after the end of the file; use another checkpoint")
        try:
            with file.open("rb") as stream:
                view = _create_file_view(stream, shard.begin, shard.length)
                # A shard is what torch.save made of one tensor. Its header is read by torch, its data left where it is.
                archive = torch._C.PyTorchFileReader(view)  # type: ignore[call-overload]
                if archive.has_record("byteorder") and archive.get_record("byteorder") != sys.byteorder.encode():
                    raise ValueError("its bytes are in another order than this machine's")
                view.seek(0)
                header = torch.load(view, map_location="meta", weights_only=True)  # type: ignore[arg-type]
                begin, size = shard.begin + archive.get_record_offset("data/0"), header.untyped_storage().nbytes()
            # Copy-on-write, because torch knows no arrays that are read-only.
            data = torch.from_numpy(np.memmap(file, np.uint8, "c", begin, (size,))).view(header.dtype)
            tensor = data.as_strided(header.shape, header.stride(), header.storage_offset())
        except Exception as error:
            # torch raises whatever its parts raise.
            raise ValueError(
                f"{file}: the shard of {name} is damaged ({first_line(error)}); use another checkpoint"
            ) from None
        if tensor.shape != shard.sizes or tensor.dtype != dtype:
            raise ValueError(f"{file}: the shard of {name} is not what .metadata says; use another checkpoint")
        return tensor

    def close(self) -> None:
        pass
