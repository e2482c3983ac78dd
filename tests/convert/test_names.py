import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import names
from convert.config import normalise_config


def test_the_official_index_lists_exactly_our_names(official: Path) -> None:
    config = normalise_config(json.loads((official / "config.json").read_text()), "config.json")
    index = json.loads((official / "model.safetensors.index.json").read_text())
    shapes = names.huggingface(config)
    assert len(shapes) == 291
    assert set(shapes) == set(index["weight_map"])
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == index["metadata"]["total_size"]
    assert index["metadata"]["total_size"] == 13_481_025_536


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"head_dim": 16}, {"tie_word_embeddings": True}])
def test_names_and_shapes_are_those_of_transformers(tiny_config: dict[str, Any], tiny_model: Any, changes: Any) -> None:
    model = tiny_model(**changes)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert names.huggingface(tiny_config | changes) == expected


def test_fused_parameters_are_the_rows_of_their_parts_in_order(tiny_config: dict[str, Any]) -> None:
    table = names.fused(tiny_config)
    assert len(table) == 6 * 2 + 3
    assert next(iter(table)) == "embed.weight"
    assert list(table)[-1] == "head.weight"
    layer = "model.layers.1."
    assert table["layers.1.attention.wqkv.weight"] == [
        names.Part(layer + "self_attn.q_proj.weight", (32, 32)),
        names.Part(layer + "self_attn.k_proj.weight", (16, 32)),
        names.Part(layer + "self_attn.v_proj.weight", (16, 32)),
    ]
    assert [part.name for part in table["layers.1.mlp.w_gate_up.weight"]] == [
        layer + "mlp.gate_proj.weight",
        layer + "mlp.up_proj.weight",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_counts_per_layer(tiny_config: dict[str, Any], tied: bool) -> None:
    config = tiny_config | {"tie_word_embeddings": tied, "num_hidden_layers": 5}
    assert len(names.huggingface(config)) == 9 * 5 + (2 if tied else 3)
    assert ("head.weight" in names.fused(config)) is not tied


def test_gguf_names_are_those_of_the_gguf_library(tiny_config: dict[str, Any]) -> None:
    gguf = pytest.importorskip("gguf")
    peer = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    ours = names.gguf(tiny_config)
    assert ours == {name: peer.get_name(name, try_suffixes=(".weight",)) for name in names.huggingface(tiny_config)}
