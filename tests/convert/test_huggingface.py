import errno
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from convert import names, open_checkpoint, writer
from convert.huggingface import normalise_config, open_folder, parse_size, write_folder

Tensors = dict[str, torch.Tensor]


def write_plain(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """A model folder written without the code under test."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same(folder: Path, expected: Tensors) -> None:
    with open_folder(folder) as checkpoint:
        assert list(checkpoint.shapes) == list(checkpoint.dtypes)
        assert set(checkpoint.shapes) == set(expected)
        for name, tensor in expected.items():
            ours = checkpoint.tensor(name)
            assert checkpoint.shapes[name] == tuple(ours.shape)
            assert checkpoint.dtypes[name] == ours.dtype == tensor.dtype
            assert torch.equal(ours, tensor), name


def parameters(model: Any) -> Tensors:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# Reading what the peers write.


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reads_what_transformers_saves(tmp_path: Path, tiny_model: Any, kv_heads: int, shard: str) -> None:
    model = tiny_model(num_key_value_heads=kv_heads)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert_same(tmp_path, parameters(model))
    with open_folder(tmp_path) as checkpoint:
        assert checkpoint.config["rope_theta"] == 100000.0
        assert checkpoint.config["rope_scaling"] == {"type": "linear", "factor": 4.0}
        assert checkpoint.config["torch_dtype"] == "float32"
        assert "rope_parameters" not in checkpoint.config
        assert checkpoint.generation_config["eos_token_id"] == 2


def test_reads_tied_models(tmp_path: Path, tiny_model: Any) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "safetensors")
    assert_same(tmp_path / "safetensors", parameters(model))
    # A pickled state dict holds the head a second time; old ones the rotary frequencies too.
    (tmp_path / "bin").mkdir()
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert "lm_head.weight" in state
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "safetensors" / "config.json").read_bytes())
    assert_same(tmp_path / "bin", parameters(model))


@pytest.mark.parametrize("zip_format", [True, False])
def test_reads_pickled_weights(tmp_path: Path, tiny_config: Any, random_tensors: Any, zip_format: bool) -> None:
    tensors = random_tensors(tiny_config, torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)
    assert_same(tmp_path, tensors)


def test_reads_pickled_shards_holding_one_at_a_time(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    tensors = random_tensors(tiny_config, torch.float16)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    weight_map = {}
    for i in range(3):
        part = dict(list(tensors.items())[i::3])
        torch.save(part, tmp_path / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(tmp_path, tensors)
    with open_folder(tmp_path) as checkpoint:
        for name in tensors:
            checkpoint.tensor(name)
            assert len(checkpoint._open) == 1


def test_prefers_safetensors_and_reads_no_data_when_opening(
    tmp_path: Path, tiny_config: Any, random_tensors: Any
) -> None:
    tensors = random_tensors(tiny_config)
    folder = write_plain(tmp_path / "model", tiny_config, tensors)
    (folder / "pytorch_model.bin").write_bytes(b"never looked at")
    assert_same(folder, tensors)
    with open_folder(folder) as checkpoint:
        # Bytes changed after opening are seen, so they had not been read.
        raw = bytearray((folder / "model.safetensors").read_bytes())
        raw[-4:] = b"\0\0\0\0"
        with (folder / "model.safetensors").open("r+b") as handle:
            handle.write(raw)
        changed = [name for name, tensor in tensors.items() if not torch.equal(checkpoint.tensor(name), tensor)]
    assert len(changed) == 1


def test_tensors_stay_valid_after_close(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    tensors = random_tensors(tiny_config)
    folder = write_plain(tmp_path / "model", tiny_config, tensors)
    with open_folder(folder) as checkpoint:
        kept = checkpoint.tensor("model.norm.weight")
    assert torch.equal(kept, tensors["model.norm.weight"])


def test_tokenizer_files_are_those_present(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    folder = write_plain(tmp_path / "model", tiny_config, random_tensors(tiny_config))
    (folder / "tokenizer.json").write_bytes(b"{}\r\n")
    (folder / "chat_template.jinja").write_bytes(b"x")
    (folder / "README.md").write_bytes(b"x")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tokenizer_files == {"tokenizer.json": b"{}\r\n", "chat_template.jinja": b"x"}


# Configs.


def test_official_config(official: Path) -> None:
    raw = json.loads((official / "config.json").read_text())
    config = normalise_config(raw, "config.json")
    assert {key: config[key] for key in raw if key in config} == {key: raw[key] for key in raw if key in config}
    assert set(raw) - set(config) == {"pretraining_tp", "transformers_version", "use_cache"}


def test_normalising_twice_changes_nothing(tiny_config: dict[str, Any]) -> None:
    once = normalise_config(tiny_config, "x")
    assert normalise_config(once, "x") == once == tiny_config


@pytest.mark.parametrize(
    "rope, theta, scaling",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_parameters": {"type": "linear", "factor": 2, "rope_theta": 1e4}},
            1e4,
            {"type": "linear", "factor": 2.0},
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, 1e5, {"type": "linear", "factor": 4.0}),
        ({"rope_scaling": {"type": "default"}}, 1e5, None),
        ({"rope_scaling": None, "rope_theta": None}, 1e4, None),
    ],
)
def test_both_forms_of_rope(tiny_config: dict[str, Any], rope: Any, theta: float, scaling: Any) -> None:
    config = normalise_config({**tiny_config, "rope_scaling": None} | rope, "x")
    assert (config["rope_theta"], config["rope_scaling"]) == (theta, scaling)


def test_defaults_and_lists(tiny_config: dict[str, Any]) -> None:
    raw = {key: tiny_config[key] for key in tiny_config if key not in ("num_key_value_heads", "tie_word_embeddings")}
    del raw["torch_dtype"]
    config = normalise_config(raw | {"eos_token_id": [2, 7], "dtype": "bfloat16", "head_dim": 16}, "x")
    assert (config["num_key_value_heads"], config["tie_word_embeddings"]) == (4, False)
    assert (config["eos_token_id"], config["torch_dtype"], config["head_dim"]) == ([2, 7], "bfloat16", 16)


ROPES = ["yarn", "dynamic", "llama3", "longrope"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*LlamaForCausalLM"),
        ({"model_type": "qwen2"}, "qwen2.*llama"),
        ({"architectures": None, "model_type": None}, "neither architectures nor model_type"),
        *(({"rope_scaling": {"type": name, "factor": 4.0}}, f"{name}.*linear") for name in ROPES),
        *(({"rope_parameters": {"rope_type": name, "rope_theta": 1e4}}, f"{name}.*linear") for name in ROPES),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}, "rope_theta": None}, "lacks rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": "linear"}, "'linear' is not an object"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu.*silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": 32.0}, r"hidden_size is 32\.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers 2000000000"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 33}, "33 is not a multiple"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)
def test_refuses_other_models_by_name(tiny_config: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        normalise_config(tiny_config | changes, "somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json: ")
    assert "\n" not in str(caught.value)


# Broken folders.


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> Path:
    return write_plain(tmp_path / "model", tiny_config, random_tensors(tiny_config))


def refused(folder: Path, *named: str, kind: type[Exception] = ValueError) -> None:
    """Opening `folder` fails with one line that has every one of `named`."""
    with pytest.raises(kind) as caught:
        open_folder(folder)
    message = str(caught.value)
    assert "\n" not in message
    for text in (str(folder), *named):
        assert text in message


def test_missing_folder_says_where_weights_come_from(tmp_path: Path) -> None:
    refused(tmp_path / "no", "huggingface.co/deepseek-ai/deepseek-coder", "config.json", kind=FileNotFoundError)


def test_missing_config(tmp_path: Path) -> None:
    refused(tmp_path, "config.json: not found", kind=FileNotFoundError)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_corrupt_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json: corrupt JSON", "download it again")


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json: holds list")


@pytest.mark.parametrize("eos", ["2", [2, "3"], True])
def test_generation_config_with_wrong_ids(folder: Path, eos: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    refused(folder, f"generation_config.json: eos_token_id is {eos!r}", "correct the file")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights", "model.safetensors", kind=FileNotFoundError)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    refused(folder, "model.safetensors.index.json", "download the index", kind=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "model.safetensors", "truncated or corrupt", "download it again")


def test_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(folder, "model.safetensors", "git lfs pull")


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_truncated_bin(folder: Path, keep: int, tiny_config: Any, random_tensors: Any) -> None:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(random_tensors(tiny_config), file)
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "pytorch_model.bin", "truncated or corrupt", "download it again")


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol, reason", [(2, "would run posix.system"), (4, "holds more than tensors")])
@pytest.mark.parametrize("zip_format", [True, False])
def test_pickle_with_code_is_refused(
    folder: Path, zip_format: bool, protocol: int, reason: str, monkeypatch: Any, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    bad = {"model.norm.weight": Harmful()}
    if zip_format:
        torch.save(bad, folder / "pytorch_model.bin", pickle_protocol=protocol)
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bad, protocol=protocol))
    refused(folder, "pytorch_model.bin", "refused", reason, "use the safetensors weights")
    assert not recwarn.list
    assert not (folder / "harmed").exists()


def test_bin_that_is_no_state_dict(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": {"x": torch.ones(1)}}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "'model' is dict")
    torch.save([1], folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "holds list")


def index_of(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", 7, "x.bin"])
def test_index_cannot_point_elsewhere(folder: Path, shard: object) -> None:
    index_of(folder, {"model.norm.weight": shard})
    refused(folder, "model.safetensors.index.json", "model.norm.weight", "no .safetensors file beside it")


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_index_without_a_map(folder: Path, weight_map: object) -> None:
    index_of(folder, weight_map)
    refused(folder, "model.safetensors.index.json", "no weight_map")


def test_index_names_an_absent_shard(folder: Path) -> None:
    index_of(folder, {"model.norm.weight": "model-2.safetensors"})
    refused(folder, "model-2.safetensors: not found", "download this shard", kind=FileNotFoundError)


def test_index_promises_a_tensor_that_the_shard_lacks(folder: Path) -> None:
    index_of(folder, {"model.norm.bias": "model-1.safetensors"})
    refused(folder, "model-1.safetensors", "'model.norm.bias' is missing")


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight (32,) is missing"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), ["model.norm.weight", "(31,)", "(32,)"]),
        (lambda t: t.update({"model.norm.bias": torch.ones(32)}), ["unexpected tensor 'model.norm.bias' (32,)"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), ["model.norm.weight", "I8"]),
    ],
)
def test_wrong_tensors(folder: Path, tiny_config: Any, random_tensors: Any, change: Any, named: list[str]) -> None:
    tensors = random_tensors(tiny_config)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, *named)


def test_open_checkpoint_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a model folder nor a"):
        open_checkpoint(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_checkpoint(tmp_path / "no.gguf")


# Writing.


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 16}])
def test_transformers_loads_what_we_write(tmp_path: Path, tiny_config: Any, tiny_model: Any, changes: Any) -> None:
    import transformers

    model = tiny_model(**changes)
    write_folder(tmp_path / "out", tiny_config | changes, parameters(model).items(), max_shard_size=20_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert loaded.config.rope_parameters["factor"] == 4.0
    assert loaded.config.rope_parameters["rope_theta"] == 100000.0
    assert loaded.generation_config.eos_token_id == 2


def test_written_layout(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    tensors = random_tensors(tiny_config, torch.bfloat16)
    out = tmp_path / "a" / "b"
    tokenizer = {"tokenizer.json": b"\r\n\xff", "tokenizer_config.json": b"{}"}
    write_folder(out, tiny_config, tensors.items(), tokenizer_files=tokenizer, max_shard_size=10_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = len(set(index["weight_map"].values()))
    assert total > 1
    assert {file.name for file in out.iterdir()} == {
        *(f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        *tokenizer,
    }
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], tensors[name])
    for name, content in tokenizer.items():
        assert (out / name).read_bytes() == content
    # The dtype of the config follows the weights: readers cast to it.
    assert json.loads((out / "config.json").read_text()) == tiny_config | {"torch_dtype": "bfloat16"}
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    modes = {file.stat().st_mode for file in out.iterdir()}
    assert len(modes) == 1, "weights must be as readable as the other files"


def test_bytes_are_deterministic(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    digests = []
    for name in ("one", "two"):
        write_folder(tmp_path / name, tiny_config, random_tensors(tiny_config).items(), max_shard_size=30_000)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 100_000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_round_trip_is_bit_equal(
    tmp_path_factory: Any,
    tiny_config: Any,
    random_tensors: Any,
    size: int,
    dtype: Any,
    kv_heads: int,
    tied: bool,
    order: Any,
) -> None:
    config = tiny_config | {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    tensors = random_tensors(config, dtype)
    items = list(tensors.items())
    order.shuffle(items)
    out = tmp_path_factory.mktemp("round") / "out"
    write_folder(out, config, iter(items), max_shard_size=size)
    assert_same(out, tensors)
    # A shard is over the limit only when it holds a single tensor.
    for file in out.glob("*.safetensors"):
        part = load_file(file)
        assert len(part) == 1 or sum(t.numel() * t.element_size() for t in part.values()) <= size
    with open_folder(out) as checkpoint:
        assert checkpoint.config == config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def test_writes_slices_of_fused_weights_and_aliases(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    config = tiny_config | {"num_hidden_layers": 1}
    tensors = random_tensors(config)
    fused = {name: torch.cat([tensors[part.name] for part in parts]) for name, parts in names.fused(config).items()}
    fused["head.weight"] = fused["embed.weight"]

    def slices() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parts in names.fused(config).items():
            rows = fused[name].split([part.shape[0] for part in parts])
            yield from ((part.name, row) for part, row in zip(parts, rows, strict=True))

    write_folder(tmp_path / "out", config, slices())
    assert_same(tmp_path / "out", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})


@pytest.mark.parametrize("limit", [20_000, 50_000])
def test_one_shard_in_memory(tmp_path: Path, tiny_config: Any, limit: int) -> None:
    config = tiny_config | {"num_hidden_layers": 20}
    alive = most = 0

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal alive, most
        for name, shape in names.huggingface(config).items():
            # The tensor's storage keeps this array alive, however many tensors share it.
            array = np.zeros(shape, np.float32)
            weakref.finalize(array, release, array.nbytes)
            alive += array.nbytes
            most = max(most, alive)
            yield name, torch.from_numpy(array)

    write_folder(tmp_path / "out", config, stream(), max_shard_size=limit)
    largest = 64 * 32 * 4
    # A full shard, the tensor that did not fit, and the one that the generator makes meanwhile.
    assert limit // 2 < most <= limit + 2 * largest


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda items: items.pop(), r"lm_head.weight \(64, 32\) was not given"),
        (lambda items: items.append(items[0]), "model.embed_tokens.weight was given twice"),
        (lambda items: items.append(("x", torch.ones(1))), "x does not belong"),
        (lambda items: items.insert(0, ("lm_head.weight", torch.ones(2))), r"\(2,\), but the config says \(64, 32\)"),
        (lambda items: items.insert(0, ("model.norm.weight", torch.ones(32, dtype=torch.int8))), "torch.int8"),
    ],
)
def test_wrong_tensors_leave_nothing(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, change: Any, named: str
) -> None:
    items = list(random_tensors(tiny_config).items())
    change(items)
    with pytest.raises(ValueError, match=named):
        write_folder(tmp_path / "out", tiny_config, items)
    assert list(tmp_path.iterdir()) == []


def test_odd_arguments(tmp_path: Path, tiny_config: Any) -> None:
    with pytest.raises(ValueError, match="is no tokenizer file"):
        write_folder(tmp_path / "out", tiny_config, [], tokenizer_files={"../evil": b""})
    with pytest.raises(ValueError, match="max_shard_size is 0"):
        write_folder(tmp_path / "out", tiny_config, [], max_shard_size=0)
    assert list(tmp_path.iterdir()) == []


def test_existing_destination(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_folder(out, tiny_config, random_tensors(tiny_config).items())
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    new = random_tensors(tiny_config, seed=1)
    with pytest.raises(FileExistsError, match="add --force"):
        write_folder(out, tiny_config, new.items())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    write_folder(out, tiny_config, new.items(), force=True)
    assert_same(out, new)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["notes.txt", "config.json/x", "file"])
def test_force_replaces_only_model_folders(tmp_path: Path, tiny_config: Any, random_tensors: Any, content: str) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_bytes(b"precious")
    else:
        (out / content).parent.mkdir(parents=True)
        (out / content).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="out: is "):
        write_folder(out, tiny_config, random_tensors(tiny_config).items(), force=True)
    assert (out if content == "file" else out / content).read_bytes() == b"precious"


@pytest.mark.parametrize("step", ["save_file", "_write_json", "_flush_to_disk", "_move_into_place"])
@pytest.mark.parametrize("old", [False, True])
def test_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, monkeypatch: Any, step: str, old: bool
) -> None:
    tensors = random_tensors(tiny_config)
    if old:
        write_folder(tmp_path / "out", tiny_config, tensors.items())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, step, full)
    with pytest.raises(OSError, match=rf"{tmp_path / 'out'}: cannot be written \(No space left.*free some space"):
        write_folder(tmp_path / "out", tiny_config, random_tensors(tiny_config, seed=1).items(), force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if old else [])
    if old:
        assert_same(tmp_path / "out", tensors)


def test_an_error_of_the_source_is_not_the_destinations(tmp_path: Path, tiny_config: Any) -> None:
    def unreadable() -> Iterator[tuple[str, torch.Tensor]]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "source.bin")
        yield

    with pytest.raises(OSError, match=r"Input/output error: 'source\.bin'"):
        write_folder(tmp_path / "out", tiny_config, unreadable())
    assert list(tmp_path.iterdir()) == []


def test_failed_rename_brings_the_old_model_back(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, monkeypatch: Any
) -> None:
    tensors = random_tensors(tiny_config)
    write_folder(tmp_path / "out", tiny_config, tensors.items())
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.tmp"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="broken"):
        write_folder(tmp_path / "out", tiny_config, tensors.items(), force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert_same(tmp_path / "out", tensors)


def run_writer(tmp_path: Path, config: dict[str, Any], before: str, during: str) -> subprocess.Popen[str]:
    """A process that writes tmp_path/out; `before` runs first, `during` between two tensors late in the stream."""
    body = f"""
        import json, os, resource, signal, sys, time, torch
        from pathlib import Path
        from convert import names
        from convert.huggingface import write_folder
        folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
        def stream():
            for i, (name, shape) in enumerate(names.huggingface(config).items()):
                if i == 15:
                    {during}
                yield name, torch.zeros(shape)
        {before}
        write_folder(folder / "out", config, stream(), max_shard_size=20_000, force=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(body), str(tmp_path), json.dumps(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_killed_process_leaves_no_destination(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    process = run_writer(tmp_path, tiny_config, "pass", "(folder / 'now').touch(); time.sleep(60)")
    deadline = time.monotonic() + 60
    while not (tmp_path / "now").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"now", ".out.tmp"}
    # What it left does not disturb the next attempt, which removes it.
    tensors = random_tensors(tiny_config)
    write_folder(tmp_path / "out", tiny_config, tensors.items())
    assert_same(tmp_path / "out", tensors)
    assert {entry.name for entry in tmp_path.iterdir()} == {"now", "out"}


@pytest.mark.parametrize("renames, survivor", [(1, "old"), (2, "new")])
def test_killed_while_replacing(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, renames: int, survivor: str
) -> None:
    """Killed after the first rename of the folders (old set aside) or the second (new in place)."""
    old = random_tensors(tiny_config)
    write_folder(tmp_path / "out", tiny_config, old.items())
    kill = f"""
        rename, done = Path.rename, []
        def rename_and_die(self, target):
            rename(self, target)
            done.extend([target] if self.parent == folder else [])
            if len(done) == {renames}:
                os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = rename_and_die"""
    process = run_writer(tmp_path, tiny_config, kill, "pass")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.old").exists()
    assert (tmp_path / "out").exists() == (survivor == "new")
    with pytest.raises(FileExistsError, match="add --force"):
        write_folder(tmp_path / "out", tiny_config, [])
    zeros = {name: torch.zeros_like(tensor) for name, tensor in old.items()}
    assert_same(tmp_path / "out", old if survivor == "old" else zeros)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_operating_system_refuses_to_write(tmp_path: Path, tiny_config: Any) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    process = run_writer(tmp_path, tiny_config, limit, "pass")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"OSError: .*/out: cannot be written .*File too large", stderr.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5_000_000_000), ("500 mb", 500_000_000), ("2GiB", 2**31), ("1.5KB", 1500), ("77", 77), ("8B", 8)],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 apples", "5IB", "1e9"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 5GB"):
        parse_size(text)


def test_formats_agree(tmp_path: Path, tiny_config: Any, random_tensors: Callable[..., Tensors]) -> None:
    """The same model as safetensors and as pickle opens the same."""
    tensors = random_tensors(tiny_config, torch.float16)
    write_folder(tmp_path / "a", tiny_config, tensors.items())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    torch.save(tensors, tmp_path / "b" / "pytorch_model.bin")
    with open_folder(tmp_path / "a") as one, open_folder(tmp_path / "b") as two:
        assert (one.shapes, one.dtypes, one.stored, one.config) == (two.shapes, two.dtypes, two.stored, two.config)
