"""The README's commands, in its order."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from typer.testing import CliRunner

from convert import names
from convert.__main__ import app
from convert.adapter import write_adapter
from convert.gguf_tokenizer import PRE_TOKENIZERS
from convert.gguf_writer import write_gguf

COMMANDS = re.findall(
    r"^python -m convert (.+?)(?:  +#.*)?$", (Path(__file__).parents[2] / "README.md").read_text(), re.M
)


def test_commands(
    tmp_path: Path, tiny_config: Any, random_tensors: Any, llama2c: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = random_tensors(tiny_config)
    rules = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["deepseek-coder"]}
    vocabulary = {"type": "BPE", "vocab": {chr(33 + i): i for i in range(60)} | {"!a": 60}, "merges": ["! a"]}
    vocabulary["vocab"]["a"] = 61
    tokenizer = {"model": vocabulary, "added_tokens": [], "pre_tokenizer": rules}
    for folder in ("MODEL", "CHECKPOINT", "META-LLAMA"):
        (tmp_path / folder).mkdir()
    (tmp_path / "MODEL" / "config.json").write_text(json.dumps(tiny_config))
    (tmp_path / "MODEL" / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(tensors, tmp_path / "MODEL" / "model.safetensors")
    files = {"tokenizer.json": json.dumps(tokenizer).encode()}
    write_gguf("MODEL.gguf", tiny_config, tensors.items(), "float16", tokenizer_files=files)
    pair = torch.randn(2, 32), torch.randn(64, 2)
    write_adapter("ADAPTER", tiny_config, {"layers.0.attention.wqkv.weight": pair}, alpha=2)
    fused = names.fused(tiny_config).items()
    state = {f"model.{name}": torch.cat([tensors[part.name] for part in parts]) for name, parts in fused}
    dcp.save(state, checkpoint_id=tmp_path / "CHECKPOINT", no_dist=True)
    (tmp_path / "CHECKPOINT" / "config.json").write_text(json.dumps(tiny_config))
    (tmp_path / "META-LLAMA" / "params.json").write_text(json.dumps(llama2c.params | {"n_kv_heads": 2}))
    torch.save(llama2c.make(), tmp_path / "META-LLAMA" / "consolidated.00.pth")
    llama2c.write(tmp_path / "stories.bin", llama2c.make(), 2, False)
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "VOCABULARY.gguf", "llama")
    for key, value in open_metadata(tmp_path / "MODEL.gguf").items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert len(COMMANDS) == 8
    for command in COMMANDS:
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, f"{command}: {done.output} {done.exception}"
    # And the results are models again.
    for made in ("FOLDER", "MODEL-q8_0.gguf", "MERGED", "EXPORTED", "LLAMA", "STORIES"):
        done = CliRunner().invoke(app, ["--inspect", made])
        assert done.exit_code == 0, made
        assert "LlamaForCausalLM" in done.output
    assert (tmp_path / "TOKENIZER" / "tokenizer.json").is_file()


def open_metadata(path: Path) -> dict[str, Any]:
    from convert.gguf import open_gguf

    with open_gguf(path) as file:
        return file.metadata
