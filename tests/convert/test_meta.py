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
DIM, HIDDEN, LAYERS, HEADS, VOCAB, LENGTH = 32, 48, 2, 4, 64, 16
PARAMS = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "vocab_size": VOCAB,
    "norm_eps": 1e-5,
    "max_seq_len": LENGTH,
}
Tensors = dict[str, torch.Tensor]


def make(kv_heads: int = 2, tied: bool = False) -> Tensors:
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


def forward(t: Tensors, tokens: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Meta's llama/model.py for one sequence: complex rotation of adjacent pairs."""
    size = DIM // HEADS
    angles = torch.arange(len(tokens))[:, None] / theta ** (torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (DIM,), t[name], 1e-5)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = t["tok_embeddings.weight"][tokens]
    for i in range(LAYERS):
        h = norm(x, f"layers.{i}.attention_norm.weight")
        q, k, v = ((h @ t[f"layers.{i}.attention.w{part}.weight"].T).unflatten(-1, (-1, size)) for part in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (k, v))
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
    tokens = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens[None]).logits[0], forward(tensors, tokens, theta), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_consolidated(tmp_path: Path, kv_heads: int) -> None:
    tensors, folder = make(kv_heads), tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_kv_heads": kv_heads, "rope_theta": 500000.0}))
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    torch.save(tensors | {"rope.freqs": torch.ones(4)}, folder / "consolidated.00.pth")
    agrees(folder, tensors, 500000.0)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tokenizer_files == {"tokenizer.model": b"sentencepiece"}
        assert checkpoint.config["rope_theta"] == 500000.0
        assert checkpoint.stored["model.norm.weight"] == "F32"


@pytest.mark.parametrize("embedding", [0, 1])
def test_parts_of_a_tensor_parallel_model(tmp_path: Path, embedding: int) -> None:
    """Llama 1 and 2 cut the columns of the embedding, Llama 3 its rows."""
    tensors, folder = make(), tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_kv_heads": 2, "vocab_size": -1}))

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
def test_training_checkpoint_of_llama2c(tmp_path: Path, tied: bool) -> None:
    tensors = make(tied=tied)
    state = {f"_orig_mod.{name}": tensor for name, tensor in (tensors | {"freqs_cos": torch.ones(2)}).items()}
    saved = {"model": state, "model_args": PARAMS | {"n_kv_heads": 2}, "iter_num": 5, "optimizer": {"state": {}}}
    torch.save(saved, tmp_path / "ckpt.pt")
    agrees(tmp_path / "ckpt.pt", tensors)


def write_llama2c(path: Path, t: Tensors, version: int, tied: bool, group: int = 16) -> Tensors:
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


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_llama2c(tmp_path: Path, version: int, tied: bool) -> None:
    worth = write_llama2c(tmp_path / "stories.bin", make(tied=tied), version, tied)
    agrees(tmp_path / "stories.bin", worth)
    with open_checkpoint(tmp_path / "stories.bin") as checkpoint:
        assert checkpoint.stored["model.layers.0.mlp.up_proj.weight"] == ("INT8" if version == 2 else "F32")
        assert checkpoint.config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("version", [0, 1, 2])
def test_damaged_llama2c(tmp_path: Path, version: int) -> None:
    path = tmp_path / "stories.bin"
    write_llama2c(path, make(), version, False)
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
        ({}, {"norm.weight": torch.ones(DIM, dtype=torch.int8)}, "'norm.weight' is torch.int8"),
        ({}, {"layers.0.feed_forward.w1.weight": torch.ones(3)}, "has no matrix layers.0.feed_forward.w1.weight"),
        ({}, {"norm.weight": "x"}, "'norm.weight' is str instead of a tensor"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, params: dict[str, Any], tensors: Any, named: str) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"n_kv_heads": 2} | params))
    torch.save(make() | tensors, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=named) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_weights_and_other_pickles(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(FileNotFoundError, match="download the weights too"):
        open_checkpoint(tmp_path)
    for content in ({"model": make()}, [1], {"model": 1, "model_args": PARAMS}):
        torch.save(content, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match="holds no model and model_args"):
            open_checkpoint(tmp_path / "ckpt.pt")
