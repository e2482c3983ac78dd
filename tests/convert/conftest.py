"""Tiny Llama models made by transformers, and llama.cpp's tokenizer vocabularies."""

import hashlib
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
VOCABULARIES = ("deepseek-coder", "deepseek-llm", "gpt-2", "llama-spm")


@pytest.fixture(scope="session")
def llama_cpp_vocabularies() -> Path:
    """Folder with ggml-vocab-NAME.gguf and its test vectors .gguf.inp and .gguf.out, from an sdist on PyPI."""
    folder = ROOT / ".cache" / "llama-cpp-vocabularies"
    wanted = [f"ggml-vocab-{name}.gguf{suffix}" for name in VOCABULARIES for suffix in ("", ".inp", ".out")]
    if all((folder / name).is_file() for name in wanted):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # Several test processes may do this at once; each unpacks for itself and renames.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
        done = subprocess.run([*command, "-d", temporary, LLAMA_CPP], capture_output=True, text=True)
        if done.returncode:
            message = f"{LLAMA_CPP} could not be fetched: {done.stderr.strip()[-300:]}"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        archive = next(Path(temporary).glob("*.tar.gz"))
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == LLAMA_CPP_SHA256
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if name in wanted and (content := tar.extractfile(member)) is not None:
                    (Path(temporary) / name).write_bytes(content.read())
                    (Path(temporary) / name).rename(folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Makes a random transformers LlamaForCausalLM; keyword arguments change its config."""
    transformers = pytest.importorskip("transformers")

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        settings = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        }
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))

    return make


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """The config of `tiny_model()` in the transformers-4 form."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 100000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


@pytest.fixture(scope="session")
def random_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    """Random tensors, Hugging Face name -> tensor, for a config."""
    from convert import names

    def make(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = names.huggingface(config)
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    return make


@pytest.fixture(scope="session")
def parameters() -> Callable[[Any], dict[str, torch.Tensor]]:
    """The parameters of a transformers model, name -> tensor."""
    return lambda model: {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """Fails unless a model folder holds exactly the expected tensors, bit for bit."""
    from convert.huggingface import open_folder

    def check(folder: Path, expected: dict[str, torch.Tensor]) -> None:
        with open_folder(folder) as checkpoint:
            assert list(checkpoint.shapes) == list(checkpoint.dtypes)
            assert set(checkpoint.shapes) == set(expected)
            for name, tensor in expected.items():
                ours = checkpoint.tensor(name)
                assert checkpoint.shapes[name] == tuple(ours.shape)
                assert checkpoint.dtypes[name] == ours.dtype == tensor.dtype
                assert torch.equal(ours, tensor), name

    return check


@pytest.fixture(scope="session")
def llama2c() -> SimpleNamespace:
    """Random models in Meta's form: `params` (two layers, 4 heads), `make()` and `write()` for llama2.c's files."""
    return SimpleNamespace(params=PARAMS, make=make_meta_tensors, write=write_llama2c)


DIM, HIDDEN, LAYERS, HEADS, VOCAB, LENGTH = 32, 48, 2, 4, 64, 16
PARAMS = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "vocab_size": VOCAB,
    "norm_eps": 1e-5,
    "max_seq_len": LENGTH,
}


def make_meta_tensors(kv_heads: int = 2, tied: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kv = DIM // HEADS * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCAB, DIM), "norm.weight": (DIM,)}
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.attention.{name}.weight": (n, DIM)
            for name, n in zip(("wq", "wk", "wv", "wo"), (DIM, kv, kv, DIM), strict=True)
        }
        shapes |= {f"layers.{i}.feed_forward.{name}.weight": (HIDDEN, DIM) for name in ("w1", "w3")}
        shapes |= {f"layers.{i}.feed_forward.w2.weight": (DIM, HIDDEN)}
        shapes |= {f"layers.{i}.{name}.weight": (DIM,) for name in ("attention_norm", "ffn_norm")}
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    head = tensors["tok_embeddings.weight"] if tied else torch.randn(VOCAB, DIM, generator=generator)
    return tensors | {"output.weight": head}


def write_llama2c(
    path: Path, t: dict[str, torch.Tensor], version: int, tied: bool, group: int = 16
) -> dict[str, torch.Tensor]:
    """llama2.c's export.py, versions 0, 1 and 2; returns the tensors as they are worth after quantisation."""
    layer = {
        name: [t[f"layers.{i}.{name}.weight"] for i in range(LAYERS)]
        for name in (
            *(f"attention.{part}" for part in ("wq", "wk", "wv", "wo")),
            *(f"feed_forward.{part}" for part in ("w1", "w2", "w3")),
            "attention_norm",
            "ffn_norm",
        )
    }
    matrices = [tensor for name, tensors in layer.items() if "norm" not in name for tensor in tensors]
    attention, mlp = matrices[: 4 * LAYERS], matrices[4 * LAYERS :]
    head = [] if tied else [t["output.weight"]]
    vocab = -VOCAB if version == 0 and not tied else VOCAB
    sizes = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, 2, vocab, LENGTH)
    worth = dict(t)
    with path.open("wb") as file:

        def floats(*tensors: torch.Tensor) -> None:
            for tensor in tensors:
                file.write(tensor.numpy().astype("<f4").tobytes())

        if version == 0:
            file.write(sizes)
            floats(t["tok_embeddings.weight"], *layer["attention_norm"], *attention, *layer["ffn_norm"], *mlp)
            floats(
                t["norm.weight"], torch.ones(LENGTH, DIM // HEADS // 2), torch.ones(LENGTH, DIM // HEADS // 2), *head
            )
            return worth
        header = struct.pack("<Ii", 0x616B3432, version) + sizes + struct.pack("<B", tied)
        header += struct.pack("<i", group) if version == 2 else b""
        file.write(header.ljust(256, b"\0"))
        floats(*layer["attention_norm"], *layer["ffn_norm"], t["norm.weight"])
        for tensor in [t["tok_embeddings.weight"], *attention, *mlp, *head]:
            if version == 1:
                floats(tensor)
                continue
            groups = tensor.reshape(-1, group)
            scale = groups.abs().amax(1) / 127
            numbers = torch.round(groups / scale[:, None]).to(torch.int8)
            file.write(numbers.numpy().tobytes())
            floats(scale)
            name = next(name for name, other in t.items() if other is tensor)
            worth[name] = (numbers.float() * scale[:, None]).reshape(tensor.shape)
    if tied:
        worth["output.weight"] = worth["tok_embeddings.weight"]
    return worth
