"""Hugging Face folders, read and written.

Reading: a folder holds `config.json` and its weights in one of four forms: one file or shards with an index, each as
safetensors or as a pickled PyTorch file. Safetensors is preferred; its header gives every name and shape without
touching the data. A pickle is a program, so `.bin` files go through PyTorch's restricted unpickler, memory-mapped and
one shard at a time.

Writing: nobody may ever see half a model. Everything goes into a temporary sibling of the destination, which is
renamed at the end; whatever happens before that, a full disk or a killed process, leaves the destination as it was.
A process killed between the two renames that replace an old folder leaves it set aside, and the next call for the same
destination puts it back.
The same tensors in the same order always give the same bytes.
"""

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import OFFICIAL_WEIGHTS, TOKENIZER_FILES, Checkpoint, check
from .config import check_token_ids, normalise_config
from .writer import parse_size, write_folder

__all__ = ["HuggingFaceFolder", "normalise_config", "open_folder", "parse_size", "read_config", "write_folder"]

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED = {dtype: name for name, dtype in _DTYPES.items()}
_AGAIN = "download it again"


def open_folder(path: str | Path) -> "HuggingFaceFolder":
    """Open a Hugging Face folder and check its tensors against its config; no weights are read.

    Raises FileNotFoundError or ValueError: one sentence with the file, what is wrong and what to do.
    """
    return HuggingFaceFolder(Path(path))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder in the transformers-4 form."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; {OFFICIAL_WEIGHTS}, and a model folder holds config.json, model*.safetensors "
            "(or pytorch_model*.bin) and tokenizer.json"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: not found; a model folder holds config.json, model*.safetensors (or pytorch_model*.bin) and "
            "tokenizer.json"
        )
    return normalise_config(_read_json(file), str(file))


class HuggingFaceFolder(Checkpoint):
    """A checkpoint in a Hugging Face folder; see `Checkpoint`."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.source = folder
        generation = folder / "generation_config.json"
        self.generation_config = _read_json(generation) if generation.is_file() else {}
        check_token_ids(self.generation_config, str(generation))
        self._tokenizer_files = {
            name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()
        }
        self.shapes, self.dtypes, self.stored = {}, {}, {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, _Shard] = {}
        try:
            for file, promised in _weight_files(folder).items():
                self._list(file, promised)
            check(self)
        except BaseException:
            self.close()
            raise

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return dict(self._tokenizer_files)

    @property
    def weight_files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def tensor(self, name: str) -> torch.Tensor:
        return self._shard(self._file_of[name]).tensor(name)

    def close(self) -> None:
        for shard in self._open.values():
            shard.close()
        self._open.clear()

    def _shard(self, file: Path) -> "_Shard":
        """The open shard. Only one pickled shard stays open; safetensors are mapped and cost no memory."""
        if file not in self._open:
            if file.suffix == ".bin":
                self.close()
            self._open[file] = _Pickled(file) if file.suffix == ".bin" else _Safetensors(file)
        return self._open[file]

    def _list(self, file: Path, promised: list[str] | None) -> None:
        """Record names, shapes and dtypes of one file; `promised` is what the index lists, None without an index."""
        contents = self._shard(file).contents()
        for name in promised or sorted(contents):
            if name not in contents:
                raise ValueError(f"{file}: tensor {name!r:.100} is missing, though the index says it is here; {_AGAIN}")
            # Old files carry the rotary frequencies, and a tied model may carry its head twice.
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight" and self.config["tie_word_embeddings"]:
                continue
            shape, stored = contents[name]
            if stored not in _DTYPES:
                raise ValueError(
                    f"{file}: tensor {name!r:.100} is stored as {stored}; supported are {', '.join(_DTYPES)}, use the "
                    "original weights"
                )
            self.shapes[name], self.stored[name], self.dtypes[name] = shape, stored, _DTYPES[stored]
            self._file_of[name] = file


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files with weights and the tensors that an index promises in each; None for a single file without index."""
    for single in (SAFETENSORS, BIN):
        if (folder / single).is_file():
            return {folder / single: None}
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _read_index(index)
    shards = sorted(file.name for file in folder.iterdir() if re.fullmatch(r"(model|pytorch_model)-.*\.\w+", file.name))
    if shards:
        raise FileNotFoundError(
            f"{folder}: holds {shards[0]} but no {SAFETENSORS}.index.json or {BIN}.index.json; download the index too"
        )
    raise FileNotFoundError(
        f"{folder}: no weights; download {SAFETENSORS} (or its shards and {SAFETENSORS}.index.json, or the "
        "pytorch_model.bin forms) into it"
    )


def _read_index(index: Path) -> dict[Path, list[str] | None]:
    content = _read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map; {_AGAIN}")
    suffix = ".safetensors" if index.name.startswith(SAFETENSORS) else ".bin"
    names_in: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        # A downloaded index must not reach other files of this computer.
        if not isinstance(shard, str) or re.search(r"[/\\:\0]", shard) or not shard.endswith(suffix):
            raise ValueError(
                f"{index}: {name!r:.100} points to {shard!r:.100}, which is no {suffix} file beside it; {_AGAIN}"
            )
        names_in.setdefault(index.parent / shard, []).append(name)
    for file in sorted(names_in):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found, though {index.name} lists it; download this shard too")
    return {file: sorted(names_in[file]) for file in sorted(names_in)}


class _Shard:
    """An open file of tensors."""

    def contents(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name -> shape and stored format."""
        raise NotImplementedError

    def tensor(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        pass


class _Safetensors(_Shard):
    def __init__(self, file: Path) -> None:
        self._file = file
        with _Explain(file):
            self._handle = safe_open(file, framework="pt", device="cpu").__enter__()

    def contents(self) -> dict[str, tuple[tuple[int, ...], str]]:
        slices = {name: self._handle.get_slice(name) for name in self._handle.keys()}  # noqa: SIM118, no mapping
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}

    def tensor(self, name: str) -> torch.Tensor:
        with _Explain(self._file):
            return self._handle.get_tensor(name)

    def close(self) -> None:
        self._handle.__exit__(None, None, None)


class _Pickled(_Shard):
    def __init__(self, file: Path) -> None:
        with _Explain(file), warnings.catch_warnings():
            # A pickle protocol that the unpickler does not know gets a warning; what follows from it is an error.
            warnings.simplefilter("ignore")
            # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(state, dict):
            raise ValueError(f"{file}: holds {type(state).__name__} instead of named tensors; use the original weights")
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"{file}: {name!r} is {type(value).__name__} instead of a tensor; this is no plain state dict, "
                    "use the original weights"
                )
        self._state: dict[str, torch.Tensor] = state

    def contents(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {
            str(name): (tuple(value.shape), _STORED.get(value.dtype, str(value.dtype).removeprefix("torch.")))
            for name, value in self._state.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self._state[name]


class _Explain:
    """Turns what the readers of weight files raise into one sentence with the file and the remedy."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, OSError) or not isinstance(error, Exception):
            return
        file = self._file
        with file.open("rb") as handle:
            if handle.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{file}: is a Git LFS pointer, not weights; run `git lfs pull` in its folder"
                ) from None
        if isinstance(error, SafetensorError):
            raise ValueError(f"{file}: truncated or corrupt safetensors ({_first_line(error)}); {_AGAIN}") from None
        if isinstance(error, pickle.UnpicklingError):
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = (
                f"because this pickle would run {code[1]} instead of only holding tensors"
                if code
                else "because this pickle holds more than tensors, or is damaged"
            )
            raise ValueError(f"{file}: refused, {reason}; use the safetensors weights") from None
        raise ValueError(f"{file}: truncated or corrupt PyTorch file; {_AGAIN}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(". ") if lines else type(error).__name__


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: corrupt JSON ({_first_line(error)}); {_AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {type(content).__name__} instead of a JSON object; {_AGAIN}")
    return content
