"""Writes a GGUF file that llama.cpp runs, one tensor in memory at a time; `gguf.py` tells what differs.

The `gguf` library does the layout and the quantisation. Norms are always F32, as llama.cpp computes with them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import names
from .checkpoint import Deferred, cast
from .config import normalise_config
from .destination import new_file, writing
from .gguf import library
from .gguf_tokenizer import tokenizer_metadata
from .rope import to_adjacent_pairs

# Our names of the formats, and the library's.
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


def write_gguf(
    path: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor | Deferred]],
    kind: str,
    *,
    tokenizer_files: Mapping[str, bytes] | None = None,
    generation_config: dict[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write one GGUF file of architecture llama.

    tensors             (Hugging Face name, floating-point tensor), every tensor of the config, in the order of
                        `names.huggingface`
    kind                format of the matrices, a key of `KINDS`; q8_0 leaves rows that are no multiple of 32 as F16
    tokenizer_files     None or {}: a file without vocabulary, which runs on token ids only
    generation_config   its EOS ids win over the config's; a GGUF file has room for two
    force               replace an existing file

    Raises FileExistsError, OSError, and ValueError for what a GGUF file cannot hold; nothing is left after an error.
    """
    gguf = library()
    config = normalise_config(config, "config of the model to write")
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "no_vocab"}
    if tokenizer_files:
        metadata = tokenizer_metadata(tokenizer_files, config["vocab_size"], str(path))
    metadata |= _metadata(config, {**config, **(generation_config or {})}, str(path))
    metadata["general.file_type"] = int(gguf.LlamaFileType[_FILE_TYPES[kind]])
    metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    with new_file(path, force) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            shapes = names.huggingface(config)
            for name, foreign in names.gguf(config).items():
                stored = gguf.GGMLQuantizationType[_stored(shapes[name], kind)]
                block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
                size = int(np.prod(shapes[name])) // block * block_bytes
                writer.add_tensor_info(foreign, shapes[name], np.dtype(np.float32), size, raw_dtype=stored)
            with writing(Path(path).resolve()):
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            given = iter(tensors)
            for expected in shapes:
                name, tensor = next(given, ("nothing", torch.empty(0)))
                if name != expected:
                    raise ValueError(f"tensor {expected} was expected, but {name} was given; give all, in model order")
                raw = encode(name, tensor.make() if isinstance(tensor, Deferred) else tensor, config, kind)
                with writing(Path(path).resolve()):
                    writer.write_tensor_data(raw)
        finally:
            # Closing writes what is still in the buffers.
            with writing(Path(path).resolve()):
                writer.close()


def encode(name: str, tensor: torch.Tensor, config: dict[str, Any], kind: str) -> np.ndarray:
    """The bytes of Hugging Face tensor `name` as they stand in a GGUF file of this kind, as a numpy array."""
    gguf = library()
    tensor = to_adjacent_pairs(name, tensor.detach().cpu(), config)
    stored = _stored(tuple(tensor.shape), kind)
    if stored == "Q8_0":
        # A block's scale, its largest value over 127, is a float16.
        wide = tensor.float()
        cast(name, torch.stack(wide.aminmax()) / 127, torch.float16)
        return gguf.quants.quantize(wide.numpy(), gguf.GGMLQuantizationType.Q8_0)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
    # numpy has no bfloat16, so the bits travel as bytes.
    return cast(name, tensor, dtype).contiguous().view(torch.uint8).numpy()


def _stored(shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % 32 else KINDS[kind]


_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _metadata(config: dict[str, Any], ids: dict[str, Any], path: str) -> dict[str, Any]:
    """Sizes, rotary embedding and special ids, under the keys that llama.cpp reads."""
    metadata: dict[str, Any] = {
        "general.name": Path(path).stem,
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": names.head_dim(config),
        "llama.rope.freq_base": config["rope_theta"],
    }
    if "head_dim" in config:
        metadata |= {f"llama.attention.{part}_length": config["head_dim"] for part in ("key", "value")}
    if config["rope_scaling"]:
        metadata["llama.rope.scaling.type"] = "linear"
        metadata["llama.rope.scaling.factor"] = config["rope_scaling"]["factor"]
    eos = ids.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    if len(ends) > 2:
        raise ValueError(
            f"{path}: a GGUF file has room for two EOS ids, the model has {eos}; shorten eos_token_id in "
            "generation_config.json"
        )
    special = {"bos": ids.get("bos_token_id"), "padding": ids.get("pad_token_id")}
    special |= dict(zip(("eos", "eot"), ends, strict=False))
    return metadata | {f"tokenizer.ggml.{key}_token_id": i for key, i in special.items() if i not in (None, -1)}


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
