import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from convert import open_checkpoint
from convert.config import normalise_config
from convert.huggingface import open_folder

Tensors = dict[str, torch.Tensor]


def write_plain(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """A model folder written without the code under test."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Reading what the peers write.


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reads_what_transformers_saves(
    tmp_path: Path, tiny_model: Any, kv_heads: int, shard: str, assert_same: Any, parameters: Any
) -> None:
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


def test_reads_tied_models(tmp_path: Path, tiny_model: Any, assert_same: Any, parameters: Any) -> None:
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
def test_reads_pickled_weights(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, zip_format: bool, assert_same: Any
) -> None:
    tensors = random_tensors(tiny_config, torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)
    assert_same(tmp_path, tensors)


def test_reads_pickled_shards_holding_one_at_a_time(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any
) -> None:
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


def test_parameters_are_tensors_too(tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any) -> None:
    """People save named_parameters(), which ask for gradients."""
    tensors = random_tensors(tiny_config)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, tensors)
    with open_folder(tmp_path) as checkpoint:
        assert not checkpoint.tensor("model.norm.weight").requires_grad


def test_prefers_safetensors_and_reads_no_data_when_opening(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, assert_same: Any
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


def test_pickled_weights_are_mapped(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    """A change of the file after opening is seen: a shard of 10 GB is not read into memory."""
    tensors = random_tensors(tiny_config)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file)
    with open_folder(tmp_path) as checkpoint:
        at = file.read_bytes().index(tensors["model.norm.weight"].numpy().tobytes())
        with file.open("r+b") as handle:
            handle.seek(at)
            handle.write(b"\0\0\0\0")
        assert checkpoint.tensor("model.norm.weight")[0] == 0


@pytest.mark.parametrize("sharded", [False, True])
def test_prefers_safetensors_in_every_form(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, sharded: bool, assert_same: Any
) -> None:
    """Some official repositories hold the weights twice, in shards of different numbers."""
    tensors = random_tensors(tiny_config)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config))
    for kind, count in (("model.safetensors", 3), ("pytorch_model.bin", 2)):
        shards = {}
        for i in range(count):
            part = {name: tensors[name] for name in list(tensors)[i::count]}
            file = tmp_path / kind.replace(".", f"-{i + 1:05}-of-{count:05}.")
            save_file(part, file) if count == 3 else file.write_bytes(b"never looked at")
            shards |= dict.fromkeys(part, file.name)
        (tmp_path / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    if not sharded:
        for file in [*tmp_path.glob("model-*"), tmp_path / "model.safetensors.index.json"]:
            file.unlink()
        save_file(tensors, tmp_path / "model.safetensors")
    assert_same(tmp_path, tensors)


def test_tensors_stay_valid_after_close(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    tensors = random_tensors(tiny_config)
    folder = write_plain(tmp_path / "model", tiny_config, tensors)
    with open_folder(folder) as checkpoint:
        kept = checkpoint.tensor("model.norm.weight")
    assert torch.equal(kept, tensors["model.norm.weight"])


def test_tokenizer_files_are_those_present(tmp_path: Path, tiny_config: Any, random_tensors: Any) -> None:
    folder = write_plain(tmp_path / "model", tiny_config, random_tensors(tiny_config))
    (folder / "tokenizer.json").write_bytes(b"{}\r\n")
    others = ("chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    for name in (*others, "README.md"):
        (folder / name).write_bytes(b"x")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tokenizer_files == {"tokenizer.json": b"{}\r\n"} | dict.fromkeys(others, b"x")


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
        ({"pad_token_id": -2}, "pad_token_id is -2"),
        ({"bos_token_id": 2**40}, "bos_token_id is 1099511627776"),
        ({"initializer_range": [[0.02]]}, r"initializer_range is \[\[0.02\]\]"),
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


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"a":' + b"[" * 60 + b"]" * 60 + b"}"])
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


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(32).to_sparse(),
        torch.zeros(32, device="meta"),
        # One number in the file, which stands for as many as its reader would have to make.
        torch.zeros(1).expand(32),
    ],
)
def test_bin_with_other_than_plain_tensors(folder: Path, tiny_config: Any, random_tensors: Any, value: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(random_tensors(tiny_config) | {"model.norm.weight": value}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "'model.norm.weight' is Tensor instead of a plain tensor")


def test_bin_with_other_names(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({(1, 2): torch.ones(1)}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "names a tensor by tuple")


def test_compressed_bin(folder: Path, tiny_config: Any, random_tensors: Any) -> None:
    """A few megabytes could become gigabytes; PyTorch itself never compresses."""
    (folder / "model.safetensors").unlink()
    torch.save(random_tensors(tiny_config), folder / "plain")
    with (
        zipfile.ZipFile(folder / "plain") as plain,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    refused(folder, "pytorch_model.bin", "corrupt PyTorch file")


def index_of(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "shard",
    ["../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", 7, "x.bin", "x" * 300 + ".safetensors"],
)
def test_index_cannot_point_elsewhere(folder: Path, shard: object) -> None:
    index_of(folder, {"model.norm.weight": shard})
    refused(folder, "model.safetensors.index.json", "model.norm.weight", "no .safetensors file beside it")


@pytest.mark.parametrize("weight_map", [None, [], {}])
def test_index_without_a_map(folder: Path, weight_map: object) -> None:
    index_of(folder, weight_map)
    refused(folder, "model.safetensors.index.json", "no weight_map")


@pytest.mark.parametrize("others, message", [(0, "lists model-2.safetensors, not"), (2, "safetensors and 2 more, not")])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_index_names_an_absent_shard(folder: Path, others: int, message: str, kind: str) -> None:
    weight_map = {f"tensor {i}": f"model-{i}.{kind}" for i in range(2, 3 + others)}
    index_of(folder, weight_map, f"{'model' if kind == 'safetensors' else 'pytorch_model'}.{kind}.index.json")
    refused(folder, ".index.json: lists model-2", message.replace("safetensors", kind), "the download is incomplete")


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
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    for name in ("model.onnx", "pytorch_model.bin"):
        with pytest.raises(ValueError, match="neither a model folder nor a"):
            open_checkpoint(tmp_path / name)
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="is a LoRA adapter; give its base model"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_checkpoint(tmp_path / "no.gguf")
