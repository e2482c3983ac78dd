import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from convert import names, open_checkpoint
from convert.gguf import open_gguf
from convert.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer_files
from convert.writer import write_folder

gguf = pytest.importorskip("gguf")
Tensors = dict[str, torch.Tensor]


def to_adjacent_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The reordering of llama.cpp's converter: half-split rows to adjacent pairs."""
    rows, hidden = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


@pytest.fixture
def config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """Wide enough for blocks of 32 and unlike in every size, so that a mix-up shows."""
    return tiny_config | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


# Ids 0-255 are the byte symbols, then one merge, a control token, a user token and fillers.
BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
SYMBOLS = [chr(c) for c in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
TOKENS = [*SYMBOLS, "ab", "<end>", "<user>", "[PAD259]", "[PAD260]"]


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    kind: str = "F32",
    edit: Callable[[Any], None] = lambda writer: None,
    pre: str = "gpt-2",
) -> Path:
    """A GGUF file made by the gguf library; `kind` is the type of the matrices, `edit` adds to the writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 257 + [3, 4, 4, 5])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)
    edit(writer)
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, foreign in names.gguf(config).items():
        if name not in tensors:
            continue
        array = tensors[name].float().numpy()
        if name.endswith("q_proj.weight"):
            array = to_adjacent_pairs(array, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            array = to_adjacent_pairs(array, config["num_key_value_heads"])
        used = quantisation if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(foreign, gguf.quants.quantize(array, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_come_back_in_half_split_order(
    tmp_path: Path, config: Any, random_tensors: Any, kv_heads: int, kind: str
) -> None:
    config = config | {"num_key_value_heads": kv_heads}
    original = random_tensors(config)
    quantisation = gguf.GGMLQuantizationType[kind]
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", config, original, kind)) as checkpoint:
        assert checkpoint.shapes == names.huggingface(config)
        for name, tensor in original.items():
            ours = checkpoint.tensor(name)
            if tensor.ndim == 1:
                assert checkpoint.stored[name] == "F32"
                assert torch.equal(ours, tensor)
                continue
            assert checkpoint.stored[name] == kind
            assert checkpoint.dtypes[name] == ours.dtype == dtype
            # Rows are quantised one by one, so their order makes no difference to the values.
            stored = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), quantisation), quantisation)
            assert torch.equal(ours.float(), torch.from_numpy(stored)), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_super_blocks(tmp_path: Path, config: Any, random_tensors: Any, kind: str) -> None:
    """The library expands these types but does not make them, so the blocks are random bytes."""
    config = config | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    original = random_tensors(config)
    foreign = names.gguf(config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    raw = {}
    quantisation = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    for name in ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"]:
        rows, width = original.pop(name).shape
        raw[name] = np.random.default_rng(0).integers(0, 60, (rows, width // block * block_bytes), np.uint8)

    def edit(writer: Any) -> None:
        for name, blocks in raw.items():
            writer.add_tensor(foreign[name], blocks, raw_dtype=quantisation)

    with open_gguf(write_gguf(tmp_path / "m.gguf", config, original, edit=edit)) as checkpoint:
        for name, blocks in raw.items():
            assert checkpoint.stored[name] == kind
            ours = checkpoint.tensor(name).numpy()
            back = to_adjacent_pairs(ours, heads[name.split(".")[4]])
            np.testing.assert_array_equal(back, gguf.quants.dequantize(blocks, quantisation))


def test_config_from_metadata(tmp_path: Path, config: Any, random_tensors: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), "F16")
    with open_gguf(path) as checkpoint:
        assert checkpoint.config == config | {"eos_token_id": 257, "torch_dtype": "float16"}
        assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 257}
        assert checkpoint.source == path


def test_end_of_turn_joins_the_end_tokens_and_tied_heads(tmp_path: Path, config: Any, random_tensors: Any) -> None:
    config = config | {"tie_word_embeddings": True}

    def edit(writer: Any) -> None:
        writer.add_eot_token_id(258)
        writer.add_pad_token_id(257)

    with open_gguf(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), edit=edit)) as checkpoint:
        assert checkpoint.config["tie_word_embeddings"] is True
        assert checkpoint.config["eos_token_id"] == [257, 258]
        assert checkpoint.config["pad_token_id"] == 257
        assert "lm_head.weight" not in checkpoint.shapes


def test_tensors_are_private_and_survive_close(tmp_path: Path, config: Any, random_tensors: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    before = path.read_bytes()
    with open_gguf(path) as checkpoint:
        norm = checkpoint.tensor("model.norm.weight")
        norm += 1
    assert norm.sum().isfinite()
    assert path.read_bytes() == before


def test_transformers_computes_the_same_from_a_converted_gguf(tmp_path: Path, config: Any, tiny_model: Any) -> None:
    import transformers

    model = tiny_model(**{key: config[key] for key in ("hidden_size", "intermediate_size", "head_dim")}).eval()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with open_gguf(write_gguf(tmp_path / "m.gguf", config, tensors)) as checkpoint:
        stream = ((name, checkpoint.tensor(name)) for name in checkpoint.shapes)
        write_folder(tmp_path / "out", checkpoint.config, stream, tokenizer_files=checkpoint.tokenizer_files)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(50)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_tokenizer_of_a_small_vocabulary(tmp_path: Path, config: Any, random_tensors: Any) -> None:
    def edit(writer: Any) -> None:
        writer.add_chat_template("{{ x }}")

    with open_gguf(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), edit=edit)) as checkpoint:
        files = checkpoint.tokenizer_files
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.get_vocab_size() == 259, "fillers are left out"
    ids = tokenizer.encode("ab<user>é<end>").ids
    assert (ids[0], ids[1], ids[-1]) == (256, 258, 257)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<user>é"
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["bos_token"] == TOKENS[1]
    assert settings["eos_token"] == "<end>"
    assert settings["add_bos_token"] is True
    assert settings["chat_template"] == "{{ x }}"
    assert "pad_token" not in settings


# What is refused.


def refused(path: Path, *named: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    for text in (str(path), *named):
        assert text in message


@pytest.mark.parametrize(
    "edit, named",
    [
        (lambda w: w.add_string("general.architecture", "qwen2"), ["architecture 'qwen2'", "only llama"]),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), ["rope type 'yarn'", "linear"]),
        (lambda w: w.add_uint32("llama.expert_count", 8), ["8 experts", "dense"]),
        (lambda w: w.add_uint16("split.count", 2), ["split", "llama-gguf-split --merge"]),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 8), ["8 of 16"]),
        (lambda w: w.add_array("llama.attention.head_count", [4, 4]), ["num_attention_heads is [4, 4]"]),
        (lambda w: w.add_uint32("llama.embedding_length", 128), ["model.embed_tokens.weight", "(64, 64)", "(64, 128)"]),
        (lambda w: w.add_uint32("llama.block_count", 3), ["model.layers.2.input_layernorm.weight", "missing"]),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), ["rope_freqs.weight", "linear"]),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), ["unexpected", "blk.0.attn_q.bias"]),
    ],
)
def test_other_models_are_refused_by_name(
    tmp_path: Path, config: Any, random_tensors: Any, edit: Any, named: list[str]
) -> None:
    # Of a key given twice the later value counts.
    refused(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), edit=edit), *named)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe' is not known"),
        ({"tokenizer.ggml.pre": None}, "None is not known"),
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.merges": None}, "lacks its token types or its merges"),
        ({"tokenizer.ggml.merges": ["q z"]}, "'q z' does not fit"),
        ({"tokenizer.ggml.token_type": [1]}, "lacks its token types"),
        ({"tokenizer.ggml.token_type": [4] * len(TOKENS)}, "no normal tokens"),
        ({"tokenizer.ggml.bos_token_id": 999}, "bos_token_id 999"),
        ({"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}, "a token twice"),
    ],
)
def test_unusable_vocabularies(
    tmp_path: Path, config: Any, random_tensors: Any, change: dict[str, Any], named: str
) -> None:
    with open_gguf(write_gguf(tmp_path / "m.gguf", config, random_tensors(config))) as checkpoint:
        metadata = checkpoint.metadata | change
    with pytest.raises(ValueError, match=named) as caught:
        build_tokenizer_files(metadata, "m.gguf")
    assert str(caught.value).startswith("m.gguf: ")


VALUES = ["x", "", "x" * 10_000, [1, 2], ["a", "b"], [1.5], -1, 0, 2**31 - 1, float("nan"), float("inf"), True]


def test_values_of_another_type(tmp_path: Path, config: Any, random_tensors: Any) -> None:
    """Each key of the metadata with values of other types: a model, or one clear line."""
    path, tensors = tmp_path / "m.gguf", random_tensors(config)
    with open_gguf(write_gguf(path, config, tensors)) as checkpoint:
        keys = [*checkpoint.metadata, "split.count", "llama.expert_count", "llama.rope.scale_linear"]
    messages = []
    for key in keys:
        for value in VALUES:

            def edit(writer: Any, key: str = key, value: Any = value) -> None:
                if isinstance(value, list):
                    writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY)
                else:
                    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

            path.unlink()
            try:
                with open_gguf(write_gguf(path, config, tensors, edit=edit)) as checkpoint:
                    _ = checkpoint.tokenizer_files
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > 150
    unclear = [m for m in messages if not m.startswith(f"{path}: ") or "\n" in m or len(m) > len(str(path)) + 500]
    assert unclear == []


def test_unknown_pre_tokenizer_spoils_only_the_tokenizer(tmp_path: Path, config: Any, random_tensors: Any) -> None:
    tensors = random_tensors(config)
    with open_gguf(write_gguf(tmp_path / "m.gguf", config, tensors, pre="falcon")) as checkpoint:
        assert torch.equal(checkpoint.tensor("model.norm.weight"), tensors["model.norm.weight"])
        with pytest.raises(ValueError, match="'falcon' is not known, only deepseek-coder"):
            _ = checkpoint.tokenizer_files


@pytest.fixture
def sound(tmp_path: Path, config: Any, random_tensors: Any) -> Path:
    return write_gguf(tmp_path / "m.gguf", config, random_tensors(config), "Q8_0")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\3\4 no gguf at all", b"GGUF"])
def test_no_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", "GGUF", "download it again")


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions(sound: Path, version: int) -> None:
    sound.write_bytes(b"GGUF" + struct.pack("<I", version) + sound.read_bytes()[8:])
    refused(sound, f"version {version} is not supported", "2 and 3")


@pytest.mark.parametrize("count", [2**63, 2**40, 2**64 - 1])
@pytest.mark.parametrize("at", [8, 16])
def test_huge_counts(sound: Path, count: int, at: int) -> None:
    raw = bytearray(sound.read_bytes())
    raw[at : at + 8] = struct.pack("<Q", count)
    sound.write_bytes(raw)
    refused(sound, "truncated or corrupt", "download it again")


@pytest.mark.parametrize("kind", [4, 8, 12])
def test_huge_arrays_and_strings(tmp_path: Path, kind: int) -> None:
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, 2**60)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair + bytes(100))
    refused(tmp_path / "m.gguf", "truncated or corrupt")
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 2**63)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair + bytes(100))
    refused(tmp_path / "m.gguf", "truncated or corrupt")


def test_truncation_anywhere(sound: Path) -> None:
    raw = sound.read_bytes()
    for keep in [*range(0, 3000, 61), *range(3000, len(raw), 5003), len(raw) - 40]:
        sound.write_bytes(raw[:keep])
        refused(sound)


def test_random_damage_gives_a_clear_error_or_a_model(sound: Path) -> None:
    raw = sound.read_bytes()
    dice = random.Random(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(8 * 1024)] = dice.randrange(256)
        sound.write_bytes(damaged)
        try:
            with open_gguf(sound) as checkpoint:
                for name in checkpoint.shapes:
                    checkpoint.tensor(name)
                _ = checkpoint.tokenizer_files
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 50
    for message in messages:
        assert message.startswith(str(sound))
        assert "\n" not in message
        assert len(message) < 500


def test_unquantised_files_need_no_gguf_package(tmp_path: Path, config: Any, random_tensors: Any) -> None:
    plain = write_gguf(tmp_path / "plain.gguf", config, random_tensors(config), "F16")
    quantised = write_gguf(tmp_path / "quantised.gguf", config, random_tensors(config), "Q8_0")
    code = (
        "import sys; sys.modules['gguf'] = None; sys.modules['sentencepiece'] = None\n"
        "from convert import open_checkpoint\n"
        "c = open_checkpoint(sys.argv[1]); [c.tensor(n) for n in c.shapes]; c.tokenizer_files\n"
        "try: open_checkpoint(sys.argv[2])\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(plain), str(quantised)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "pip install gguf" in done.stdout


# Real files.


def vectors(path: Path) -> list[tuple[str, list[int]]]:
    """llama.cpp's test strings and their ids, without a begin token."""
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts[:46], lines[:46], strict=True)]


@pytest.mark.network
@pytest.mark.parametrize("name", ["deepseek-coder", "deepseek-llm", "gpt-2"])
def test_rebuilt_tokenizers_give_the_ids_of_llama_cpp(llama_cpp_vocabularies: Path, name: str) -> None:
    path = llama_cpp_vocabularies / f"ggml-vocab-{name}.gguf"
    if name == "gpt-2":
        # Another architecture, but a vocabulary of the same kind.
        fields = gguf.GGUFReader(path).fields
        files = build_tokenizer_files({key: field.contents() for key, field in fields.items()}, str(path))
    else:
        with open_gguf(path) as checkpoint:
            files = checkpoint.tokenizer_files
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    pairs = vectors(path)
    assert len(pairs) == 46
    for text, ids in pairs:
        assert tokenizer.encode(text).ids == ids, text


@pytest.mark.network
def test_vocabulary_only_files(llama_cpp_vocabularies: Path) -> None:
    path = llama_cpp_vocabularies / "ggml-vocab-deepseek-coder.gguf"
    with open_gguf(path) as checkpoint:
        assert checkpoint.shapes == {}
        assert checkpoint.config["rope_scaling"] == {"type": "linear", "factor": 4.0}
        assert checkpoint.config["rms_norm_eps"] == 1e-6
        settings = json.loads(checkpoint.tokenizer_files["tokenizer_config.json"])
        metadata = checkpoint.metadata
        expected = checkpoint.tokenizer_files
    assert settings["bos_token"] == "<｜begin▁of▁sentence｜>"
    assert settings["eos_token"] == settings["pad_token"] == "<｜end▁of▁sentence｜>"
    assert settings["add_bos_token"] is True
    peer = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
    assert metadata.keys() == peer.keys()
    for key, value in metadata.items():
        assert value == (pytest.approx(peer[key]) if isinstance(value, float) else peer[key]), key
    # Files from before the key existed are recognised by their vocabulary.
    for old in ({"tokenizer.ggml.pre": None}, {"tokenizer.ggml.pre": "default"}):
        assert build_tokenizer_files(metadata | old, str(path)) == expected
    with (
        open_gguf(llama_cpp_vocabularies / "ggml-vocab-llama-spm.gguf") as checkpoint,
        pytest.raises(ValueError, match="kind 'llama' is not supported"),
    ):
        _ = checkpoint.tokenizer_files
    refused(llama_cpp_vocabularies / "ggml-vocab-gpt-2.gguf", "architecture 'gpt2'")


@pytest.mark.network
def test_rebuilt_deepseek_coder_tokenizer_is_the_official_one(llama_cpp_vocabularies: Path, official: Path) -> None:
    with open_gguf(llama_cpp_vocabularies / "ggml-vocab-deepseek-coder.gguf") as checkpoint:
        rebuilt = json.loads(checkpoint.tokenizer_files["tokenizer.json"])
        config = checkpoint.config
    theirs = json.loads((official / "tokenizer.json").read_text(encoding="utf-8"))
    assert rebuilt == theirs
    assert rebuilt["added_tokens"] == theirs["added_tokens"]
    assert list(rebuilt["model"]["vocab"].items()) == sorted(theirs["model"]["vocab"].items(), key=lambda item: item[1])
    raw = json.loads((official / "config.json").read_text())
    same = set(raw) & set(config) - {"eos_token_id", "torch_dtype"}
    assert {key: config[key] for key in same} == {key: raw[key] for key in same}


def test_word_rules_are_the_official_ones(official: Path) -> None:
    theirs = json.loads((official / "tokenizer.json").read_text(encoding="utf-8"))
    assert theirs["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["deepseek-coder"]}


@pytest.mark.network
def test_smollm2_agrees_with_the_gguf_library(smollm2: Path) -> None:
    reader = gguf.GGUFReader(smollm2)
    peer = {tensor.name: tensor for tensor in reader.tensors}
    with open_gguf(smollm2) as checkpoint:
        config = checkpoint.config
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
        assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (1e5, 1e-5, True)
        assert len(checkpoint.shapes) == len(peer) == 30 * 9 + 2
        for name, foreign in names.gguf(config).items():
            tensor = peer[foreign]
            assert checkpoint.stored[name] == tensor.tensor_type.name
            expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for part, heads in (("q_proj", 9), ("k_proj", 3)):
                if part in name:
                    pairs = expected.reshape(heads, 32, 2, 576)
                    expected = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).reshape(heads * 64, 576)
            assert torch.equal(checkpoint.tensor(name), expected), name


@pytest.mark.network
def test_smollm2_tokenizer(smollm2: Path) -> None:
    with open_gguf(smollm2) as checkpoint:
        files = checkpoint.tokenizer_files
        tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())] == tokens
    text = "def f(x):\n    return 123 + x  # naïve über 你好\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert [tokens[i] for i in ids if tokens[i].isdigit()] == ["1", "2", "3"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1


@pytest.mark.network
def test_converted_smollm2_speaks(smollm2: Path, tmp_path: Path) -> None:
    """Swapped pairs or heads would still give fluent nonsense; trained weights tell."""
    transformers = pytest.importorskip("transformers")
    with open_gguf(smollm2) as checkpoint:
        stream = ((name, checkpoint.tensor(name)) for name in checkpoint.shapes)
        files = checkpoint.tokenizer_files
        write_folder(tmp_path / "out", checkpoint.config, stream, tokenizer_files=files, max_shard_size=200_000_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0, prompt.input_ids.shape[1] :]) == " Paris."
