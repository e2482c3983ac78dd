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
