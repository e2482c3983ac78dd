"""Training checkpoints of torch.distributed.checkpoint (DCP), read without trusting them.

A DCP folder holds tensors cut into shards, and `.metadata`, a pickle that says where each lies. torch unpickles that
file freely; here only the classes that describe tensors are let through, so a checkpoint cannot run code.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

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
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream, file).load()
        except FileNotFoundError:
            raise FileNotFoundError(f"{file.parent}: not a training checkpoint (no .metadata)") from None
        except (EOFError, pickle.UnpicklingError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{file}: damaged or refused ({error})") from None
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, file: Path):
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read(folder: str | Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, whole, on the CPU, the prefix removed. Needs no process group."""
    reader = Reader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
