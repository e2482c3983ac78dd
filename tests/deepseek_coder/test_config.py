import json

import pytest
import torch

from convert import names
from convert.config import normalise_config
from deepseek_coder import Decoder, ModelConfig
from deepseek_coder.config import RELEASED

# Published: the safetensors indexes and model listings.
PARAMETERS = {
    "deepseek-coder-1.3b-base": 1_346_471_936,
    "deepseek-coder-1.3b-instruct": 1_346_471_936,
    "deepseek-coder-5.7bmqa-base": 5_700_325_376,
    "deepseek-coder-6.7b-base": 6_740_512_768,
    "deepseek-coder-6.7b-instruct": 6_740_512_768,
    "deepseek-coder-33b-base": 33_342_991_360,
    "deepseek-coder-33b-instruct": 33_342_991_360,
    "deepseek-coder-7b-base-v1.5": 6_910_365_696,
    "deepseek-coder-7b-instruct-v1.5": 6_910_365_696,
}


def test_every_released_model_is_listed():
    assert set(PARAMETERS) == set(RELEASED)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_to_the_last_digit(name):
    config = ModelConfig.released(name)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters == PARAMETERS[name]
    rows = {our: sum(part.shape[0] for part in parts) for our, parts in names.fused(config.to_dict()).items()}
    assert rows == {our: p.shape[0] for our, p in model.named_parameters()}


def test_official_config_and_tensor_names(official):
    config = ModelConfig.from_dict(normalise_config(json.loads((official / "config.json").read_text()), "config.json"))
    assert config == ModelConfig.released("deepseek-coder-6.7b-instruct")
    index = json.loads((official / "model.safetensors.index.json").read_text())
    parts = [part for parts in names.fused(config.to_dict()).values() for part in parts]
    assert {part.name for part in parts} == set(index["weight_map"])
    assert 2 * config.num_parameters == index["metadata"]["total_size"]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"deepseek-coder-33b-base"):
        ModelConfig.released("deepseek-coder-5.7bmqa-instruct")


def test_dict_round_trip():
    for config in RELEASED.values():
        assert ModelConfig.from_dict(normalise_config(config.to_dict(), "x")) == config


def test_nonsense_sizes_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads"):
        ModelConfig(100, 64, 64, 1, num_heads=6, num_kv_heads=4)
