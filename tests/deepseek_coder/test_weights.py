import json

import pytest
import torch

from deepseek_coder import Decoder, ModelConfig, load, save
from deepseek_coder.__main__ import info
from pretrain.tokenizer import train


def write(folder, spare_rows):
    tokenizer = train(["def add(a, b):\n    return a + b\n" * 20], 300)
    rows = tokenizer.vocab_size + spare_rows
    torch.manual_seed(0)
    save(folder, Decoder(ModelConfig(rows, 32, 48, 1, 2, 1, head_dim=16, eos_token_ids=(7,))), tokenizer)
    return folder


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer and weights belong to different models"):
        load(write(tmp_path / "model", -1))
    load(write(tmp_path / "exact", 0))


def test_generation_config_names_the_ends_for_load_and_info(tmp_path, capsys):
    folder = write(tmp_path / "model", 0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load(folder)[0].config.eos_token_ids == (7, 9)
    info(str(folder))
    assert "7, 9" in capsys.readouterr().out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_to_ours_and_back_is_bit_equal(tmp_path, kv_heads, dtype):
    """MHA, GQA and MQA with linear RoPE, through the fused weights of a `Decoder`."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train(["def add(a, b):\n    return a + b\n" * 20], 300)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        eos_token_id=[2, 3],
    )
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    for name, content in tokenizer.files.items():
        (tmp_path / "theirs" / name).write_bytes(content)
    model, read = load(tmp_path / "theirs", "cpu", dtype)
    save(tmp_path / "ours", model, read, max_shard_size=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.rope_parameters.items() >= theirs.config.rope_parameters.items()
    assert again.generation_config.eos_token_id == [2, 3]
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, content in tokenizer.files.items():
        assert (tmp_path / "ours" / name).read_bytes() == content
