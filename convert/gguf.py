"""GGUF files, as llama.cpp writes them, behind the same face as a Hugging Face folder.

Two things differ from Hugging Face. Weights may be quantised in blocks; they are expanded to float32 one tensor at a
time, when asked for. And llama.cpp rotates adjacent pairs of a head's channels (`rope.py`): its converter reorders the
rows of the query and key matrices, and here they are put back. Writing is in `gguf_writer.py`.

The header is read here and not by the `gguf` library: a corrupt count makes that loop for hours, it needs several
seconds for a large vocabulary, and unquantised files then load without it. The library does the dequantisation.
"""

import struct
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import names
from .checkpoint import OFFICIAL_WEIGHTS, Checkpoint, check
from .config import normalise_config
from .gguf_tokenizer import build_tokenizer_files
from .json_files import AGAIN
from .rope import to_half_split

_STRING, _ARRAY = 8, 9
# GGUF value type -> numpy dtype, for everything of fixed size.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_UNQUANTISED = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}


class Stored(NamedTuple):
    """A tensor of the file: `shape` as in PyTorch, ggml type number, and where its `size` bytes begin."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    size: int


def open_gguf(path: str | Path) -> "GGUFFile":
    """Open a GGUF file of architecture llama, with a model or with a vocabulary only; no weights are read.

    Raises FileNotFoundError or ValueError: one sentence with the file, what is wrong and what to do.
    """
    return GGUFFile(Path(path))


class GGUFFile(Checkpoint):
    """A checkpoint in a GGUF file; see `Checkpoint`. Without tensors, `shapes` is empty and only the rest works."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {OFFICIAL_WEIGHTS}")
        self.source = path
        # Copy-on-write: tensors are views of the file until somebody writes to them.
        self._data = np.memmap(path, np.uint8, mode="c") if path.stat().st_size else np.empty(0, np.uint8)
        self.metadata, stored = _Header(self._data, path).read()
        self.config = _config(self.metadata, stored, str(path))
        self.generation_config = {key: value for key, value in self.config.items() if key.endswith("_token_id")}
        self._stored = _rename(stored, self.config, str(path))
        self.shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        self.dtypes = {
            name: _UNQUANTISED[tensor.kind][1] if tensor.kind in _UNQUANTISED else torch.float32
            for name, tensor in self._stored.items()
        }
        self.stored = {name: _kind_name(tensor.kind) for name, tensor in self._stored.items()}
        if stored:
            check(self)
            weights = {self.dtypes[name] for name, shape in self.shapes.items() if len(shape) == 2}
            # One half type for all matrices is the type of the model; anything else comes out as float32.
            dtype = weights.pop() if len(weights) == 1 else torch.float32
            self.config["torch_dtype"] = str(dtype).removeprefix("torch.")

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """`tokenizer.json` and `tokenizer_config.json`, rebuilt from the vocabulary in the file.

        ValueError when the file has none, or one whose rules for splitting text are not known here.
        """
        return build_tokenizer_files(self.metadata, str(self.source))

    @property
    def weight_files(self) -> list[Path]:
        return [self.source]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they stand in the file."""
        stored = self._stored[name]
        return self._data[stored.begin : stored.begin + stored.size]

    def tensor(self, name: str) -> torch.Tensor:
        stored, raw = self._stored[name], self.raw(name)
        if stored.kind in _UNQUANTISED:
            # numpy has no bfloat16, so the bits travel as integers.
            bits = torch.from_numpy(raw.view(np.int32 if stored.kind == 0 else np.int16))
            tensor = bits.view(_UNQUANTISED[stored.kind][1]).reshape(stored.shape)
        else:
            tensor = torch.from_numpy(_dequantise(raw, stored, f"{self.source}: tensor {name}"))
        return to_half_split(name, tensor, self.config)

    def close(self) -> None:
        self._data = np.empty(0, np.uint8)


def _dequantise(raw: np.ndarray, stored: Stored, what: str) -> np.ndarray:
    quants = library().quants
    try:
        kind = library().GGMLQuantizationType(stored.kind)
        # The library wants rows of blocks, one row of bytes for each row of the matrix, and holds its result twice.
        rows, expanded = np.asarray(raw).reshape(*stored.shape[:-1], -1), np.empty(stored.shape, np.float32)
        for i in range(0, len(rows), 1024):
            expanded[i : i + 1024] = quants.dequantize(rows[i : i + 1024], kind)
        return expanded
    except NotImplementedError:
        raise ValueError(f"{what} is stored as {_kind_name(stored.kind)}, which cannot be expanded; use Q8_0") from None


def library() -> Any:
    """The gguf package, for quantised files and for writing. ValueError where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ValueError(
            "writing GGUF files and reading quantised ones needs the gguf package: pip install gguf"
        ) from None
    return gguf


def _kind_name(kind: int) -> str:
    return _UNQUANTISED[kind][0] if kind in _UNQUANTISED else library().GGMLQuantizationType(kind).name


class _Header:
    """Reads the header; every length is checked against the file before it is used."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self._data, self._path, self._at = data.data, path, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """The metadata, and the tensors under their GGUF names."""
        if bytes(self._data[:4]) != b"GGUF":
            raise ValueError(f"{self._path}: is no GGUF file (it does not begin with GGUF); {AGAIN}")
        self._at = 4
        version = self._unpack("<I")
        if version not in (2, 3):
            raise ValueError(
                f"{self._path}: GGUF version {version} is not supported, little-endian 2 and 3 are; convert the "
                "original model anew with a current llama.cpp"
            )
        tensor_count, key_count = self._unpack("<Q"), self._unpack("<Q")
        # The shortest key-value pair has 13 bytes, the shortest tensor entry 32.
        self._need(13 * key_count + 32 * tensor_count)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            metadata[key] = self._value(self._unpack("<I"))
        return metadata, self._tensors(tensor_count, metadata.get("general.alignment", 32))

    def _tensors(self, count: int, alignment: object) -> dict[str, Stored]:
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self._corrupt(f"alignment {alignment!r:.80}")
        entries = []
        for _ in range(count):
            name, dims = self._string(), self._unpack("<I")
            # Names appear in messages; llama.cpp allows 63 bytes.
            if len(name) > 100 or not name.isprintable():
                raise self._corrupt("unreadable tensor name")
            if not 1 <= dims <= 4:
                raise self._corrupt(f"tensor {name} with {dims} dimensions")
            # GGUF lists the fastest dimension first.
            shape = tuple(self._unpack("<Q") for _ in range(dims))[::-1]
            entries.append((name, shape, self._unpack("<I"), self._unpack("<Q")))
        data_begin = -(-self._at // alignment) * alignment
        tensors: dict[str, Stored] = {}
        for name, shape, kind, offset in entries:
            size = self._size(name, shape, kind)
            begin = data_begin + offset
            if offset % alignment or name in tensors:
                raise self._corrupt(f"tensor {name} twice or out of line")
            if begin + size > len(self._data):
                raise ValueError(f"{self._path}: truncated, tensor {name} ends after the end of the file; {AGAIN}")
            tensors[name] = Stored(shape, kind, begin, size)
        return tensors

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        if kind in _UNQUANTISED:
            block, block_bytes = 1, _UNQUANTISED[kind][1].itemsize
        else:
            gguf = library()
            if kind not in [known.value for known in gguf.GGMLQuantizationType]:
                raise ValueError(f"{self._path}: tensor {name} has unknown type {kind}; update the gguf package")
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        elements = 1
        for size in shape:
            elements *= size
        if elements == 0 or shape[-1] % block:
            raise self._corrupt(f"tensor {name} of shape {shape}")
        return elements // block * block_bytes

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0]
        element, count = self._unpack("<I"), self._unpack("<Q")
        if element != _STRING:
            return self._numbers(element, count)
        self._need(8 * count)
        return [self._string() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise self._corrupt(f"value of type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        self._need(count * dtype.itemsize)
        values = np.frombuffer(self._data, dtype, count, self._at)
        self._at += count * dtype.itemsize
        # 1e-6 in single precision is to be 1e-06 again and not 9.99999997e-07.
        return [float(str(value)) for value in values] if dtype == np.float32 else values.tolist()

    def _string(self) -> str:
        length = self._unpack("<Q")
        self._need(length)
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode("utf-8", errors="replace")

    def _unpack(self, form: str) -> int:
        size = struct.calcsize(form)
        self._need(size)
        self._at += size
        return struct.unpack_from(form, self._data, self._at - size)[0]

    def _need(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError(f"{self._path}: truncated or corrupt GGUF header at byte {self._at}; {AGAIN}")

    def _corrupt(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: corrupt GGUF header ({what}); {AGAIN}")


def _rename(stored: dict[str, Stored], config: dict[str, Any], source: str) -> dict[str, Stored]:
    """The tensors under their Hugging Face names, in model order; names without a counterpart stay, at the end."""
    if "rope_freqs.weight" in stored:
        raise ValueError(f"{source}: rope_freqs.weight (llama3 scaling) is not supported; only linear scaling is")
    remaining = dict(stored)
    renamed = {name: remaining.pop(foreign) for name, foreign in names.gguf(config).items() if foreign in remaining}
    return renamed | remaining


def _config(metadata: dict[str, Any], stored: dict[str, Stored], source: str) -> dict[str, Any]:
    """config.json in the transformers-4 form from the metadata."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{source}: architecture {architecture!r:.80} is not supported; only llama is")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(f"{source}: is one part of a split model; join the parts with llama-gguf-split --merge")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{key}", default)

    if get("expert_count", 0):
        raise ValueError(
            f"{source}: a mixture of {get('expert_count')!r:.80} experts is not supported; only dense models are"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = get("vocab_size") or (len(tokens) if isinstance(tokens, list) else None)
    if "token_embd.weight" in stored:
        vocab_size = stored["token_embd.weight"].shape[0]
    eos, end_of_turn = metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")
    raw = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "rope_scaling": _rope_scaling(get),
        "tie_word_embeddings": bool(stored) and "output.weight" not in stored,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [eos, end_of_turn] if end_of_turn not in (None, eos) and eos is not None else eos,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    config = normalise_config(raw, source)
    channels = names.head_dim(config)
    rotated = get("rope.dimension_count", channels)
    if rotated != channels:
        raise ValueError(
            f"{source}: rotates {rotated!r:.80} of {channels} channels of a head; only rotating all is supported"
        )
    return config


def _rope_scaling(get: Any) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        # Files of 2023 named only the factor of linear scaling.
        kind, factor = "linear", get("rope.scale_linear", 1.0)
        return {"type": kind, "factor": factor} if factor != 1.0 else None
    return {"type": kind, "factor": get("rope.scaling.factor")}
