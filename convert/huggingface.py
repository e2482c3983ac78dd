"""Hugging Face folders, read; `writer.py` writes them.

A folder holds `config.json` and its weights in one of four forms: one file or shards with an index, each as
safetensors or as a pickled PyTorch file. Safetensors is preferred; its header gives every name and shape without
touching the data. Pickled `.bin` files are opened one shard at a time (`files.py`).
"""

import re
from pathlib import Path
from typing import Any

import torch

from .checkpoint import OFFICIAL_WEIGHTS, Checkpoint, check, read_tokenizer_files
from .config import check_token_ids, normalise_config
from .files import DTYPES, TensorFile, open_tensors
from .json_files import AGAIN, read_json

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


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
    return normalise_config(read_json(file), str(file))


class HuggingFaceFolder(Checkpoint):
    """A checkpoint in a Hugging Face folder; see `Checkpoint`."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.source = folder
        generation = folder / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        check_token_ids(self.generation_config, str(generation))
        self._tokenizer_files = read_tokenizer_files(folder)
        self.shapes, self.dtypes, self.stored = {}, {}, {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, TensorFile] = {}
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

    def _shard(self, file: Path) -> TensorFile:
        """The open shard. Only one pickled shard stays open; safetensors are mapped and cost no memory."""
        if file not in self._open:
            if file.suffix == ".bin":
                self.close()
            self._open[file] = open_tensors(file)
        return self._open[file]

    def _list(self, file: Path, promised: list[str] | None) -> None:
        """Record names, shapes and dtypes of one file; `promised` is what the index lists, None without an index."""
        contents = self._shard(file).contents()
        for name in promised or sorted(contents):
            if name not in contents:
                raise ValueError(f"{file}: tensor {name!r:.100} is missing, though the index says it is here; {AGAIN}")
            # Old files carry the rotary frequencies, and a tied model may carry its head twice.
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight" and self.config["tie_word_embeddings"]:
                continue
            shape, stored = contents[name]
            if stored not in DTYPES:
                raise ValueError(
                    f"{file}: tensor {name!r:.100} is stored as {stored}; supported are {', '.join(DTYPES)}, use the "
                    "original weights"
                )
            self.shapes[name], self.stored[name], self.dtypes[name] = shape, stored, DTYPES[stored]
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
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map; {AGAIN}")
    suffix = ".safetensors" if index.name.startswith(SAFETENSORS) else ".bin"
    names_in: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        # A downloaded index must not reach other files of this computer.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]{1,200}", shard) or not shard.endswith(suffix):
            raise ValueError(
                f"{index}: {name!r:.100} points to {shard!r:.100}, which is no {suffix} file beside it; {AGAIN}"
            )
        names_in.setdefault(index.parent / shard, []).append(name)
    absent = sorted(file.name for file in names_in if not file.is_file())
    if absent:
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ValueError(
            f"{index}: lists {absent[0]}{others}, not found beside it; the download is incomplete, get these files too"
        )
    return {file: sorted(names_in[file]) for file in sorted(names_in)}
