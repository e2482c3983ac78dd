"""Meta's and llama2.c's checkpoints. The oracle is their arithmetic, written out below; transformers must agree."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from convert import open_checkpoint
from convert.writer import write_folder

transformers = pytest.importorskip("transformers")
Tensors = dict[str, torch.Tensor]


def forward(t: Tensors, tokens: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Meta's llama/model.py for one sequence: complex rotation of adjacent pairs."""
    dim, heads = t["norm.weight"].shape[0], 4
    size = dim // heads
    angles = torch.arange(len(tokens))[:, None] / theta ** (torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (dim,), t[name], 1e-5)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = t["tok_embeddings.weight"][tokens]
    for i in range(2):
        h = norm(x, f"layers.{i}.attention_norm.weight")
        q, k, v = ((h @ t[f"layers.{i}.attention.w{part}.weight"].T).unflatten(-1, (-1, size)) for part in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (k, v))
        out = F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (q, k, v)), is_causal=True)
        x = x + out.transpose(0, 1).flatten(1) @ t[f"layers.{i}.attention.wo.weight"].T
        h = norm(x, f"layers.{i}.ffn_norm.weight")
        w1, w2, w3 = (t[f"layers.{i}.feed_forward.w{part}.weight"] for part in "123")
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "norm.weight") @ t["output.weight"].T


def agrees(path: Path, tensors: Tensors, theta: float = 10000.0) -> None:
    """The converted folder gives in transformers the logits that Meta's arithmetic gives on `tensors`."""
    out = path.parent / "converted"
    with open_checkpoint(path) as checkpoint:
        write_folder(out, checkpoint.config, ((name, checkpoint.tensor(name)) for name in checkpoint.shapes))
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(64, (16,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens[None]).logits[0], forward(tensors, tokens, theta), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_consolidated(tmp_path: Path, llama2c: Any, kv_heads: int) -> None:
    tensors, folder = llama2c.make(kv_heads), tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(llama2c.params | {"n_kv_heads": kv_heads, "rope_theta": 500000.0}))
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    torch.save(tensors | {"rope.freqs": torch.ones(4)}, folder / "consolidated.00.pth")
    agrees(folder, tensors, 500000.0)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tokenizer_files == {"tokenizer.model": b"sentencepiece"}
        assert checkpoint.config["rope_theta"] == 500000.0
        assert checkpoint.stored["model.norm.weight"] == "F32"


@pytest.mark.parametrize("embedding", [0, 1])
def test_parts_of_a_tensor_parallel_model(tmp_path: Path, llama2c: Any, embedding: int) -> None:
    """Llama 1 and 2 cut the columns of the embedding, Llama 3 its rows."""
    tensors, folder = llama2c.make(), tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(llama2c.params | {"n_kv_heads": 2, "vocab_size": -1}))

    def part(name: str, tensor: torch.Tensor, i: int) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return tensor
        columns = name.endswith(("wo.weight", "w2.weight")) or (name == "tok_embeddings.weight" and embedding == 1)
        return tensor.chunk(2, 1 if columns else 0)[i].clone()

    for i in range(2):
        torch.save({name: part(name, tensor, i) for name, tensor in tensors.items()}, folder / f"consolidated.0{i}.pth")
    agrees(folder, tensors)
    torch.save({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth: has no matrix tok_embeddings\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_training_checkpoint_of_llama2c(tmp_path: Path, llama2c: Any, tied: bool) -> None:
    tensors = llama2c.make(tied=tied)
    state = {f"_orig_mod.{name}": tensor for name, tensor in (tensors | {"freqs_cos": torch.ones(2)}).items()}
    saved = {
        "model": state,
        "model_args": llama2c.params | {"n_kv_heads": 2},
        "iter_num": 5,
        "optimizer": {"state": {}},
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    agrees(tmp_path / "ckpt.pt", tensors)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_llama2c(tmp_path: Path, llama2c: Any, version: int, tied: bool) -> None:
    worth = llama2c.write(tmp_path / "stories.bin", llama2c.make(tied=tied), version, tied)
    agrees(tmp_path / "stories.bin", worth)
    with open_checkpoint(tmp_path / "stories.bin") as checkpoint:
        assert checkpoint.stored["model.layers.0.mlp.up_proj.weight"] == ("INT8" if version == 2 else "F32")
        assert checkpoint.config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("version", [0, 1, 2])
def test_damaged_llama2c(tmp_path: Path, llama2c: Any, version: int) -> None:
    path = tmp_path / "stories.bin"
    llama2c.write(path, llama2c.make(), version, False)
    raw = path.read_bytes()
    for content, named in [
        (raw[:-4], "bytes where its header asks for"),
        (raw + b"\0", "bytes where its header asks for"),
        (raw[:100], "too short"),
        (b"", "too short"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=named) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
    if version == 2:
        path.write_bytes(raw[:37] + struct.pack("<i", 7) + raw[41:])
        with pytest.raises(ValueError, match="groups of 7 do not divide"):
            open_checkpoint(path)
        path.write_bytes(raw[:4] + struct.pack("<i", 3) + raw[8:])
        with pytest.raises(ValueError, match="version 3 is not supported"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "params, tensors, named",
    [
        ({"use_scaled_rope": True}, {}, "use_scaled_rope"),
        ({"dim": None}, {}, "lacks hidden_size"),
        ({"dim": 64}, {}, "tensor model.embed_tokens.weight has shape"),
        ({"n_layers": 3}, {}, "model.layers.2.input_layernorm.weight"),
        ({}, {"layers.0.attention.bias": torch.ones(2)}, "unexpected tensor 'layers.0.attention.bias'"),
        ({}, {"norm.weight": torch.ones(32, dtype=torch.int8)}, "'norm.weight' is torch.int8"),
        ({}, {"layers.0.feed_forward.w1.weight": torch.ones(3)}, "has no matrix layers.0.feed_forward.w1.weight"),
        ({}, {"norm.weight": "x"}, "'norm.weight' is str instead of a plain tensor"),
    ],
)
def test_other_checkpoints_are_refused(
    tmp_path: Path, llama2c: Any, params: dict[str, Any], tensors: Any, named: str
) -> None:
    (tmp_path / "params.json").write_text(json.dumps(llama2c.params | {"n_kv_heads": 2} | params))
    torch.save(llama2c.make() | tensors, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=named) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_weights_and_other_pickles(tmp_path: Path, llama2c: Any) -> None:
    (tmp_path / "params.json").write_text(json.dumps(llama2c.params))
    with pytest.raises(FileNotFoundError, match="download the weights too"):
        open_checkpoint(tmp_path)
    for content in ({"model": llama2c.make()}, [1], {"model": 1, "model_args": llama2c.params}):
        torch.save(content, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match="holds no model and model_args"):
            open_checkpoint(tmp_path / "ckpt.pt")
