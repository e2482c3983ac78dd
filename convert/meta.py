"""Meta's own checkpoints and those of llama2.c, import only.

Three forms with one set of names: a folder with `params.json` and `consolidated.NN.pth` (several files are the parts of
a tensor-parallel model), llama2.c's training checkpoint `ckpt.pt`, and llama2.c's `.bin` files: version 0 (float32
without a magic number), 1 (float32) and 2 (int8 in groups with a float32 scale each). All of them rotate adjacent pairs
(`rope.py`). Sources: Meta's llama/model.py, karpathy/llama2.c model.py, export.py and runq.c.
"""

import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import names
from .checkpoint import Checkpoint, check, read_tokenizer_files
from .config import normalise_config
from .files import STORED, check_tensors, unpickle
from .json_files import AGAIN, read_json
from .rope import to_half_split

_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}
_MODEL = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
# The dimension along which a tensor-parallel model is cut: rows of what it fans out to, columns of what it gathers.
_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
_MAGIC = b"24ka"  # "ak42" as a little-endian integer


def _foreign(name: str) -> str:
    if name in _MODEL:
        return _MODEL[name]
    _, _, layer, rest = name.split(".", 3)
    return f"layers.{layer}.{_LAYER[rest]}"


class _Meta(Checkpoint, ABC):
    """What the forms share: tensors under Meta's names, made by `_read`, reordered for half-split RoPE."""

    _files: list[Path]
    _tokenizer: dict[str, bytes]

    @property
    def weight_files(self) -> list[Path]:
        return self._files

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return self._tokenizer

    def tensor(self, name: str) -> torch.Tensor:
        return to_half_split(name, self._read(name), self.config)

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...

    def close(self) -> None:
        pass


class Consolidated(_Meta):
    """A folder with params.json and consolidated.NN.pth, or llama2.c's ckpt.pt.

    Raises FileNotFoundError or ValueError: one sentence with the file, what is wrong and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.source = path
        if path.is_dir():
            params = read_json(path / "params.json")
            self._files = sorted(path.glob("consolidated.*.pth"))
            if not self.weight_files:
                raise FileNotFoundError(
                    f"{path}: holds params.json but no consolidated.*.pth; download the weights too"
                )
            self._parts = [check_tensors(unpickle(file), file) for file in self.weight_files]
        else:
            self._files = [path]
            saved = unpickle(path)
            params = saved.get("model_args", {}) if isinstance(saved, dict) else {}
            if not isinstance(params, dict) or not params or not isinstance(saved.get("model"), dict):
                raise ValueError(
                    f"{path}: holds no model and model_args; give a checkpoint of llama2.c or a model folder"
                )
            # torch.compile puts this before every name.
            state = check_tensors(saved["model"], path)
            self._parts = [{name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}]
        # Buffers that are computed from the config.
        computed = ("rope.freqs", "freqs_cos", "freqs_sin", "freqs_cis")
        self._parts = [{n: t for n, t in part.items() if n not in computed} for part in self._parts]
        head = ["output.weight"] if "output.weight" in self._parts[0] else []
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", *head):
            for part, file in zip(self._parts, self.weight_files, strict=True):
                if name not in part or part[name].ndim != 2:
                    raise ValueError(f"{file}: has no matrix {name}; this is no Llama checkpoint of Meta's form")
        self.config = self._config(params, str(path / "params.json" if path.is_dir() else path))
        self.generation_config = {}
        self._tokenizer = read_tokenizer_files(path) if path.is_dir() else {}
        ours = {_foreign(name): name for name in names.huggingface(self.config)}
        self.shapes, self.dtypes, self.stored = {}, {}, {}
        for foreign, tensor in self._parts[0].items():
            if foreign == "output.weight" and self.config["tie_word_embeddings"]:
                continue
            name = ours.get(foreign, str(foreign))
            if tensor.dtype not in STORED:
                raise ValueError(
                    f"{self.weight_files[0]}: tensor {foreign!r:.100} is {tensor.dtype}; use float weights"
                )
            self.shapes[name] = self._shape(foreign, tensor)
            self.dtypes[name], self.stored[name] = tensor.dtype, STORED[tensor.dtype]
        check(self)

    def _config(self, params: dict[str, Any], source: str) -> dict[str, Any]:
        if params.get("use_scaled_rope"):
            raise ValueError(f"{source}: use_scaled_rope (llama3 scaling) is not supported; only linear scaling is")
        embedding, head = self._parts[0]["tok_embeddings.weight"], self._parts[0].get("output.weight")
        # The file of a tied model holds the same tensor twice, or once.
        tied = head is None or head.data_ptr() == embedding.data_ptr()
        vocab = embedding.shape[0] if tied else sum(part["output.weight"].shape[0] for part in self._parts)
        return normalise_config(
            {
                "model_type": "llama",
                "vocab_size": vocab,
                "hidden_size": params.get("dim"),
                "intermediate_size": sum(part["layers.0.feed_forward.w1.weight"].shape[0] for part in self._parts),
                "num_hidden_layers": params.get("n_layers"),
                "num_attention_heads": params.get("n_heads"),
                "num_key_value_heads": params.get("n_kv_heads"),
                "max_position_embeddings": params.get("max_seq_len", 4096),
                "rms_norm_eps": params.get("norm_eps", 1e-5),
                "rope_theta": params.get("rope_theta", 10000.0),
                "tie_word_embeddings": tied,
            },
            source,
        )

    def _dimension(self, foreign: str) -> int | None:
        """Where the parts of this tensor join; None for one that every part holds whole."""
        if foreign == "tok_embeddings.weight":
            # Llama 1 and 2 cut the columns of the embedding, Llama 3 its rows.
            return 0 if self._parts[0][foreign].shape[1] == self.config["hidden_size"] else 1
        if foreign.endswith("norm.weight"):
            return None
        return 1 if foreign.endswith(_COLUMNS) else 0

    def _shape(self, foreign: str, tensor: torch.Tensor) -> tuple[int, ...]:
        shape, dimension = list(tensor.shape), self._dimension(foreign)
        if dimension is not None and dimension < len(shape):
            shape[dimension] *= len(self._parts)
        return tuple(shape)

    def _read(self, name: str) -> torch.Tensor:
        foreign = _foreign(name)
        parts, dimension = [part.get(foreign) for part in self._parts], self._dimension(foreign)
        for part, file in zip(parts, self.weight_files, strict=True):
            if part is None or part.shape != self._parts[0][foreign].shape:
                raise ValueError(f"{file}: tensor {foreign} is missing or unlike the other parts'; {AGAIN}")
        return parts[0] if dimension is None or len(parts) == 1 else torch.cat(parts, dimension)  # type: ignore[arg-type,return-value]


class _Place(NamedTuple):
    """Where a tensor begins: its numbers, and in version 2 the scales behind them."""

    numbers: int
    scales: int | None


class Llama2C(_Meta):
    """A llama2.c .bin file. Its tokenizer is a file of another kind and is not read.

    Raises FileNotFoundError or ValueError: one sentence with the file, what is wrong and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.source, self._files, self._tokenizer, self.generation_config = path, [path], {}, {}
        self._data = np.memmap(path, np.uint8, mode="c") if path.stat().st_size else np.empty(0, np.uint8)
        header = bytes(self._data[:256])
        if len(header) < 256:
            raise ValueError(f"{path}: is too short for a llama2.c file; {AGAIN}")
        self._group, version = 0, 0
        if header[:4] == _MAGIC:
            version, *sizes, shared = struct.unpack_from("<8iB", header, 4)
            if version not in (1, 2):
                raise ValueError(f"{path}: llama2.c version {version} is not supported, 0, 1 and 2 are")
            tied, begin = bool(shared), 256
            if version == 2:
                (self._group,) = struct.unpack_from("<i", header, 37)
        else:
            sizes = list(struct.unpack_from("<7i", header))
            # Version 0 says by the sign whether the head is the embedding.
            tied, begin = sizes[5] > 0, 28
            sizes[5] = abs(sizes[5])
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        self.config = normalise_config(
            {
                "model_type": "llama",
                **dict(zip((*keys, "vocab_size", "max_position_embeddings"), sizes, strict=True)),
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "tie_word_embeddings": tied,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "torch_dtype": "float32",
            },
            str(path),
        )
        self.shapes = names.huggingface(self.config)
        self.dtypes = dict.fromkeys(self.shapes, torch.float32)
        quantised = [name for name, shape in self.shapes.items() if version == 2 and len(shape) == 2]
        self.stored = dict.fromkeys(self.shapes, "F32") | dict.fromkeys(quantised, "INT8")
        self._places, end = self._lay_out(version, begin)
        if end != len(self._data):
            raise ValueError(f"{path}: has {len(self._data)} bytes where its header asks for {end}; {AGAIN}")

    def _lay_out(self, version: int, at: int) -> tuple[dict[str, _Place], int]:
        """Where each tensor begins, in the order of the file, and where the file ends."""
        ours = {_foreign(name): name for name in self.shapes}
        layers = range(self.config["num_hidden_layers"])
        norms = [f"layers.{i}.{kind}.weight" for kind in ("attention_norm", "ffn_norm") for i in layers]
        attention = [f"layers.{i}.attention.{kind}.weight" for kind in ("wq", "wk", "wv", "wo") for i in layers]
        mlp = [f"layers.{i}.feed_forward.{kind}.weight" for kind in ("w1", "w2", "w3") for i in layers]
        half = len(layers)
        if version == 0:
            order = ["tok_embeddings.weight", *norms[:half], *attention, *norms[half:], *mlp, "norm.weight"]
        else:
            order = [*norms, "norm.weight", "tok_embeddings.weight", *attention, *mlp]
        places = {}
        for foreign in [*order, *(["output.weight"] if "output.weight" in ours else [])]:
            name = ours[foreign]
            if version == 0 and foreign == "output.weight":
                # The cosines and sines of the rotary embedding.
                at += 4 * self.config["max_position_embeddings"] * names.head_dim(self.config)
            size = int(np.prod(self.shapes[name], dtype=object))
            if self.stored[name] == "F32":
                places[name] = _Place(at, None)
                at += 4 * size
            else:
                if self._group <= 0 or size % self._group:
                    raise ValueError(f"{self.source}: groups of {self._group} do not divide {foreign}; {AGAIN}")
                places[name] = _Place(at, at + size)
                at += size + 4 * (size // self._group)
        if version == 0 and "output.weight" not in ours:
            at += 4 * self.config["max_position_embeddings"] * names.head_dim(self.config)
        return places, at

    def _read(self, name: str) -> torch.Tensor:
        numbers, scales = self._places[name]
        shape, size = self.shapes[name], int(np.prod(self.shapes[name]))
        if scales is None:
            return torch.from_numpy(self._data[numbers : numbers + 4 * size].view(np.float32)).reshape(shape)
        values = torch.from_numpy(self._data[numbers:scales].view(np.int8)).reshape(-1, self._group)
        factors = torch.from_numpy(self._data[scales : scales + 4 * (size // self._group)].view(np.float32))
        return (values.float() * factors[:, None]).reshape(shape)

    def close(self) -> None:
        self._data = np.empty(0, np.uint8)
