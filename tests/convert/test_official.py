"""Every released model: described by its config alone, and computed like transformers does in its own head layout."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from convert import names, open_checkpoint
from convert.__main__ import app
from convert.gguf_writer import write_gguf
from convert.writer import write_folder
from deepseek_coder import ModelConfig, load
from deepseek_coder.config import RELEASED
from deepseek_coder.model import Decoder
from deepseek_coder.weights import copy_weights

transformers = pytest.importorskip("transformers")
# Parameters of the official configs, counted by others (Megatron logs, public listings, the official index file).
PARAMETERS = {"1.3b": 1_346_471_936, "5.7bmqa": 5_700_325_376, "6.7b": 6_740_512_768, "33b": 33_342_991_360}
PARAMETERS["7b"] = 6_910_365_696
HEADS = {"1.3b": (16, 16), "5.7bmqa": (32, 1), "6.7b": (32, 32), "33b": (56, 8), "7b": (32, 32)}


def size_of(name: str) -> str:
    return name.split("-")[2]


@pytest.mark.parametrize("name", RELEASED)
def test_described_by_config_alone(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name].to_dict()))
    done = CliRunner().invoke(app, ["--inspect", str(tmp_path / "config.json")])
    assert done.exit_code == 0, done.output
    heads, kv_heads = HEADS[size_of(name)]
    scaling = "4096, rope theta 10000" if "v1.5" in name else "16384, rope theta 100000, linear factor 4"
    for text in (f"{PARAMETERS[size_of(name)]:,}", f"{heads} heads of 128, {kv_heads} for keys", scaling, "no weights"):
        assert text in done.output


@pytest.mark.parametrize("name", [name for name in RELEASED if "base" in name])
@torch.no_grad()
def test_shrunk_models_compute_alike(tmp_path: Path, name: str) -> None:
    """Official vocabulary, RoPE and heads; two narrow layers. Through Hugging Face and through GGUF, all agree."""
    # transformers asks for a width that is a multiple of the heads.
    width = 4 * RELEASED[name].num_heads
    config = dataclasses.replace(RELEASED[name], hidden_size=width, intermediate_size=96, num_layers=2)
    torch.manual_seed(0)
    raw = {**config.to_dict(), "initializer_range": 0.1}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()
    assert theirs.config.rope_parameters["rope_theta"] == config.rope_theta
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(config.vocab_size, (1, 48))
    wanted = theirs(tokens).logits
    with open_checkpoint(tmp_path / "theirs") as source:
        tensors = {tensor: source.tensor(tensor) for tensor in names.huggingface(source.config)}
        write_folder(tmp_path / "ours", source.config, tensors.items(), max_shard_size=10_000_000)
        write_gguf(tmp_path / "m.gguf", source.config, tensors.items(), "float32")
    for path in (tmp_path / "ours", tmp_path / "m.gguf"):
        with open_checkpoint(path) as checkpoint:
            model = Decoder(ModelConfig.from_dict(checkpoint.config)).eval()
            copy_weights(model, checkpoint)
            assert all(torch.equal(checkpoint.tensor(tensor), kept) for tensor, kept in tensors.items())
        assert (model(tokens) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(tokens).logits, wanted)


@pytest.mark.network
@torch.no_grad()
def test_smollm2_has_the_same_bits_per_byte(smollm2: Path, tmp_path: Path) -> None:
    """Our model on the GGUF and transformers on the exported folder, on the first kilobytes of three real files."""
    import email.message
    import textwrap

    done = CliRunner().invoke(app, [str(smollm2), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    ours, tokenizer = load(smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    license_text = Path(__file__).parents[2] / "LICENSE"
    for file in (Path(textwrap.__file__), Path(email.message.__file__), license_text):
        text = file.read_bytes()[:1500].decode("utf-8", "ignore")
        ids = tokenizer.encode(text)
        assert ids == their_tokenizer(text, add_special_tokens=False).input_ids
        tokens = torch.tensor([ids])

        def bits_per_byte(logits: torch.Tensor, tokens: torch.Tensor = tokens, text: str = text) -> float:
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")
            return loss.item() / math.log(2) / len(text.encode())

        one, other = bits_per_byte(ours(tokens)), bits_per_byte(theirs(tokens).logits)
        # A model that understands the text, so that the comparison says something.
        assert one < 2
        assert abs(one - other) < 1e-4
