"""Files of tensors, safetensors and pickles, read without trusting them.

A pickle is a program, so it goes through PyTorch's restricted unpickler, memory-mapped.
"""

import pickle
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .json_files import AGAIN, first_line

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = {dtype: name for name, dtype in DTYPES.items()}


def open_tensors(file: Path) -> "TensorFile":
    """Open a .safetensors file, or anything else as a pickled state dict. ValueError as in `unpickle`."""
    return Safetensors(file) if file.suffix == ".safetensors" else Pickled(file)


def unpickle(file: Path) -> Any:
    """What a PyTorch file holds: tensors, mapped where the format allows it, and plain containers.

    ValueError for a damaged file and for a pickle that names anything else, which is not run.
    """
    with explained(file), warnings.catch_warnings():
        # A pickle protocol that the unpickler does not know gets a warning; what follows from it is an error.
        warnings.simplefilter("ignore")
        # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        if mapped:
            with zipfile.ZipFile(file) as archive:
                # PyTorch compresses nothing; a small file could become any number of gigabytes.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def check_tensors(state: Any, file: Path) -> dict[str, torch.Tensor]:
    """`state` if it is a plain state dict, a ValueError otherwise."""
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds {type(state).__name__} instead of named tensors; use the original weights")
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{file}: names a tensor by {type(name).__name__}; use the original weights")
        if not _is_plain(value):
            raise ValueError(
                f"{file}: {name!r:.100} is {type(value).__name__} instead of a plain tensor; this is no plain state "
                "dict, use the original weights"
            )
    # People save parameters, too, which ask for gradients.
    return {name: value.detach() for name, value in state.items()}


def _is_plain(value: Any) -> bool:
    """A tensor with a place in the file for every number: not sparse, and not one number that stands for billions."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


class TensorFile(ABC):
    """An open file of tensors."""

    @abstractmethod
    def contents(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name -> shape and stored format."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor: ...

    def close(self) -> None:  # noqa: B027, mapped files need none
        pass


class Safetensors(TensorFile):
    def __init__(self, file: Path) -> None:
        self._file = file
        with explained(file):
            self._handle = safe_open(file, framework="pt", device="cpu").__enter__()

    def contents(self) -> dict[str, tuple[tuple[int, ...], str]]:
        slices = {name: self._handle.get_slice(name) for name in self._handle.keys()}  # noqa: SIM118, no mapping
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}

    def tensor(self, name: str) -> torch.Tensor:
        with explained(self._file):
            return self._handle.get_tensor(name)

    def close(self) -> None:
        self._handle.__exit__(None, None, None)


class Pickled(TensorFile):
    def __init__(self, file: Path) -> None:
        self._state = check_tensors(unpickle(file), file)

    def contents(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {
            name: (tuple(value.shape), STORED.get(value.dtype, str(value.dtype).removeprefix("torch.")))
            for name, value in self._state.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self._state[name]


class explained:
    """Turns what the readers of weight files raise into one sentence with the file and the remedy."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What the system refuses names the file; without a name it is a damaged file that asks for the impossible.
        refused = isinstance(error, OSError) and error.filename is not None
        if error is None or refused or not isinstance(error, Exception):
            return
        file = self._file
        with file.open("rb") as handle:
            if handle.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{file}: is a Git LFS pointer, not weights; run `git lfs pull` in its folder"
                ) from None
        if isinstance(error, SafetensorError):
            raise ValueError(f"{file}: truncated or corrupt safetensors ({first_line(error)}); {AGAIN}") from None
        if isinstance(error, pickle.UnpicklingError):
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = (
                f"because this pickle would run {code[1]} instead of only holding tensors"
                if code
                else "because this pickle holds more than tensors, or is damaged"
            )
            raise ValueError(f"{file}: refused, {reason}; use the safetensors weights") from None
        raise ValueError(f"{file}: truncated or corrupt PyTorch file; {AGAIN}") from None
