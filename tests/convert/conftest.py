"""Tiny Llama models made by transformers, and llama.cpp's tokenizer vocabularies."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
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
