"""GGUF files, written."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from convert import open_checkpoint
from convert.gguf import open_gguf
from convert.gguf_tokenizer import build_tokenizer_files, tokenizer_metadata
from convert.gguf_writer import write_gguf
from convert.writer import write_folder

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "q8_0"])
def test_there_and_back(tmp_path: Path, tiny_config: Any, random_tensors: Any, kv_heads: int, kind: str) -> None:
    """HF -> GGUF -> tensors: equal up to the dtype, with the library's own values for Q8_0."""
    config = tiny_config | {"num_key_value_heads": kv_heads, "intermediate_size": 64}
    tensors = random_tensors(config)
    write_gguf(tmp_path / "m.gguf", config, tensors.items(), kind)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        same = {key: config[key] for key in config if key != "torch_dtype"}
        assert {key: checkpoint.config[key] for key in same} == same
        for name, tensor in tensors.items():
            expected = tensor
            if tensor.ndim == 2 and kind == "q8_0":
                q8_0 = gguf.GGMLQuantizationType.Q8_0
                expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), q8_0), q8_0))
            elif tensor.ndim == 2:
                expected = tensor.to(getattr(torch, kind))
            assert torch.equal(checkpoint.tensor(name), expected), name


def test_the_library_reads_it(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    """Names, types, shapes and keys, asked of the gguf library's own reader."""
    config = tiny_config | {"head_dim": 16, "eos_token_id": [2, 3], "pad_token_id": 5}
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config).items(), "float16")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    for key, value in {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.padding_token_id": 5,
    }.items():
        assert fields[key] == value, key
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_blocks_do_not_fit_stay_float16(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    tensors = random_tensors(tiny_config)
    write_gguf(tmp_path / "m.gguf", tiny_config, tensors.items(), "q8_0")
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        # 48 numbers a row.
        assert checkpoint.stored["model.layers.0.mlp.down_proj.weight"] == "F16"
        assert checkpoint.stored["model.layers.0.mlp.up_proj.weight"] == "Q8_0"


def test_refusals_leave_nothing(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    out, tensors = tmp_path / "m.gguf", random_tensors(tiny_config)
    with pytest.raises(ValueError, match="room for two EOS ids"):
        write_gguf(out, tiny_config | {"eos_token_id": [1, 2, 3]}, tensors.items(), "float32")
    with pytest.raises(ValueError, match="was expected"):
        write_gguf(out, tiny_config, reversed(tensors.items()), "float32")
    with pytest.raises(ValueError, match=r"lm_head\.weight was expected, but nothing was given"):
        write_gguf(out, tiny_config, list(tensors.items())[:-1], "float32")
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="add --force"):
        write_gguf(out, tiny_config, tensors.items(), "float32")
    assert out.read_bytes() == b"precious"
    write_gguf(out, tiny_config, tensors.items(), "float32", force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        write_gguf(tmp_path / "folder", tiny_config, tensors.items(), "float32", force=True)


def test_the_same_bytes_again_over_what_a_killed_process_left(
    tmp_path: Path, tiny_config: Any, random_tensors: Any
) -> None:
    tensors = random_tensors(tiny_config)
    write_gguf(tmp_path / "a" / "m.gguf", tiny_config, tensors.items(), "q8_0")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".m.gguf.tmp").write_bytes(bytes(1_000_000))
    write_gguf(tmp_path / "b" / "m.gguf", tiny_config, tensors.items(), "q8_0")
    assert (tmp_path / "a" / "m.gguf").read_bytes() == (tmp_path / "b" / "m.gguf").read_bytes()
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["m.gguf"]


def test_an_id_that_means_none(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    """-1 in configs of 2023."""
    write_gguf(tmp_path / "m.gguf", tiny_config | {"pad_token_id": -1}, random_tensors(tiny_config).items(), "float32")
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        assert "pad_token_id" not in checkpoint.config
        assert checkpoint.config["eos_token_id"] == 2


def test_a_disk_that_is_full_when_the_file_is_closed(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, monkeypatch: Any
) -> None:
    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "close", full)
    with pytest.raises(OSError, match=rf"{tmp_path / 'm.gguf'}: cannot be written \(No space left.*free some space"):
        write_gguf(tmp_path / "m.gguf", tiny_config, random_tensors(tiny_config).items(), "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.network
@pytest.mark.parametrize("name", ["deepseek-coder", "deepseek-llm"])
def test_tokenizers_survive(llama_cpp_vocabularies: Path, tmp_path: Path, name: str) -> None:
    """llama.cpp's own vocabulary file -> tokenizer.json -> metadata: what llama.cpp's converter wrote, and back."""
    path = llama_cpp_vocabularies / f"ggml-vocab-{name}.gguf"
    with open_gguf(path) as checkpoint:
        theirs, files, vocab_size = checkpoint.metadata, checkpoint.tokenizer_files, checkpoint.config["vocab_size"]
    ours = tokenizer_metadata(files, vocab_size, "here")
    for key in ("model", "pre", "merges", "add_bos_token", "bos_token_id", "eos_token_id"):
        assert ours[f"tokenizer.ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"], key
    pairs = zip(ours["tokenizer.ggml.tokens"], theirs["tokenizer.ggml.tokens"], strict=True)
    assert all(our == their for our, their in pairs)
    # Its converter called fillers user-defined in 2024 and unused since.
    fillers = {i for i, token in enumerate(ours["tokenizer.ggml.tokens"]) if token == f"[PAD{i}]"}
    kinds = zip(ours["tokenizer.ggml.token_type"], theirs["tokenizer.ggml.token_type"], strict=True)
    assert all(our == their for i, (our, their) in enumerate(kinds) if i not in fillers)
    back = build_tokenizer_files(theirs | ours, "here")
    assert back["tokenizer.json"] == files["tokenizer.json"]
    if name == "deepseek-coder":
        assert [ours[f"tokenizer.ggml.fim_{part}_token_id"] for part in ("pre", "suf", "mid")] == [32016, 32015, 32017]


def test_official_tokenizer_survives(official: Path, tmp_path: Path) -> None:
    files = {name: (official / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    metadata = tokenizer_metadata(files, 32256, "here")
    back = build_tokenizer_files(metadata, "here")
    assert json.loads(back["tokenizer.json"]) == json.loads(files["tokenizer.json"])
    ours, theirs = (json.loads(content["tokenizer_config.json"]) for content in (back, files))
    assert ours["chat_template"] == theirs["chat_template"]
    assert (ours["add_bos_token"], ours["tokenizer_class"]) == (True, "LlamaTokenizerFast")
    assert ours["eos_token"] == "<|EOT|>"
    # And transformers renders the same prompt from it.
    transformers = pytest.importorskip("transformers")
    for name, content in back.items():
        (tmp_path / name).write_bytes(content)
    messages = [{"role": "user", "content": "Sort a list."}, {"role": "assistant", "content": "sorted(x)"}]
    prompts = [
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
        for folder in (tmp_path, official)
    ]
    assert prompts[0] == prompts[1]
    assert "### Instruction:" in prompts[0]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model": {"type": "Unigram", "vocab": {}, "merges": []}}, "'Unigram' cannot go into a GGUF file"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "word rules have no name in GGUF files"),
        ({"pre_tokenizer": None}, "is no tokenizer"),
        ({"normalizer": {"type": "NFC"}}, "its normalizer has no place"),
        ({"added_tokens": [{"id": 9, "content": ["x"], "special": True}]}, "is no tokenizer"),
        ({"added_tokens": [{"id": 9, "content": "\ud800", "special": True}]}, "halves of characters"),
        ({"added_tokens": [{"id": 300, "content": "x", "special": True}]}, "has ids above 299"),
        ({"added_tokens": [{"id": 1}]}, "is no tokenizer"),
    ],
)
def test_tokenizers_without_a_place_in_gguf(change: dict[str, Any], named: str) -> None:
    steps = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }
    assert tokenizer_metadata({"tokenizer.json": json.dumps(content).encode()}, 300, "x")["tokenizer.ggml.merges"] == [
        "a b"
    ]
    with pytest.raises(ValueError, match=named) as caught:
        tokenizer_metadata({"tokenizer.json": json.dumps(content | change).encode()}, 300, "here")
    assert str(caught.value).startswith("here: ")
    with pytest.raises(ValueError, match=r"here: tokenizer\.json: corrupt JSON"):
        tokenizer_metadata({"tokenizer.json": b"{"}, 300, "here")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        tokenizer_metadata({"tokenizer.model": b""}, 300, "here")


@pytest.mark.network
def test_smollm2_through_our_own_gguf(smollm2: Path, tmp_path: Path) -> None:
    """Trained weights, tied head, its tokenizer: GGUF (Q4_1) -> GGUF (F16) -> HF; the norms are bit-equal."""
    with open_gguf(smollm2) as source:
        tensors = ((name, source.tensor(name)) for name in source.shapes)
        write_gguf(tmp_path / "m.gguf", source.config, tensors, "float16", tokenizer_files=source.tokenizer_files)
        with open_gguf(tmp_path / "m.gguf") as written:
            assert written.tokenizer_files["tokenizer.json"] == source.tokenizer_files["tokenizer.json"]
            assert written.config["tie_word_embeddings"] is True
            for name in source.shapes:
                assert torch.equal(written.tensor(name).half(), source.tensor(name).half()), name
            tokenizer = Tokenizer.from_str(written.tokenizer_files["tokenizer.json"].decode())
            assert tokenizer.encode("<|im_start|>user").ids[0] == 1
            stream = ((name, written.tensor(name)) for name in written.shapes)
            write_folder(tmp_path / "out", written.config, stream, tokenizer_files=written.tokenizer_files)
    with open_checkpoint(tmp_path / "out") as folder:
        assert folder.config["torch_dtype"] == "float16"


def test_scales_beyond_float16_are_refused(tmp_path, tiny_config, random_tensors):
    tensors = random_tensors(tiny_config)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = -127 * 65536.0
    with pytest.raises(ValueError, match=rf"tensor {name} has values that float16 cannot hold; use --dtype bfloat16"):
        write_gguf(tmp_path / "m.gguf", tiny_config, tensors.items(), "q8_0")
    assert not list(tmp_path.iterdir())
