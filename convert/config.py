"""One form for every config.json.

transformers wrote `rope_theta`, `rope_scaling` and `torch_dtype` until version 4; version 5 writes `rope_parameters`
and `dtype` and no longer has the old names. The old form is what the official repositories hold and what every reader
understands, the new transformers included, so it is the only form that leaves this module.

Only one architecture is supported, and a config that describes anything else is refused by the name of what is
different: a model that loads and computes something slightly wrong is the worst outcome.
"""

from typing import Any

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED = (*_SIZES, "max_position_embeddings", "rms_norm_eps")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = ("float32", "float16", "bfloat16")
# Far above any model; keeps a corrupt header from asking for a billion layers.
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31 - 1


def normalise_config(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """A Llama config of either form as a new dict in the transformers-4 form, checked.

    `rope_scaling` is None or {"type": "linear", "factor": float}; `num_key_value_heads`, `tie_word_embeddings` and
    `rope_theta` are filled in with their defaults (all heads, False, 10000.0); `head_dim`, `torch_dtype` and the token
    ids appear when given. `source` names the file in errors.

    Raises ValueError, one line with the file, the value and a remedy, for whatever this project does not compute.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{source}: holds {type(raw).__name__} instead of a JSON object; download the file again")
    _check_architecture(raw, source)
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise ValueError(f"{source}: lacks {', '.join(missing)}; take config.json from the model's own repository")
    sizes = {key: _size(raw, key, source) for key in _SIZES}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = heads if raw.get("num_key_value_heads") is None else _size(raw, "num_key_value_heads", source)
    if sizes["num_hidden_layers"] > _MAX_LAYERS:
        raise ValueError(f"{source}: num_hidden_layers {sizes['num_hidden_layers']} is no real model; correct the file")
    if heads % kv_heads:
        raise ValueError(
            f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
            "correct the file"
        )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_key_value_heads": kv_heads,
    }
    if raw.get("head_dim") is not None:
        config["head_dim"] = _size(raw, "head_dim", source)
    elif hidden % heads:
        raise ValueError(
            f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim"
        )
    dim = config.get("head_dim", hidden // heads)
    if dim % 2:
        raise ValueError(f"{source}: head_dim {dim} is odd, rotary embedding needs pairs; correct the file")
    config |= {
        "max_position_embeddings": _size(raw, "max_position_embeddings", source),
        "hidden_act": "silu",
        "rms_norm_eps": _positive(raw["rms_norm_eps"], "rms_norm_eps", source),
        **_rope(raw, source),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": _flag(raw, "tie_word_embeddings", source),
    }
    config |= {key: raw[key] for key in _TOKEN_IDS if raw.get(key) is not None}
    check_token_ids(config, source)
    if raw.get("initializer_range") is not None:
        config["initializer_range"] = _positive(raw["initializer_range"], "initializer_range", source)
    dtype = raw.get("torch_dtype") or raw.get("dtype")
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(f"{source}: torch_dtype {dtype!r} is not supported; supported are {', '.join(_DTYPES)}")
        config["torch_dtype"] = name
    return config


def check_token_ids(config: dict[str, Any], source: str) -> None:
    """ValueError for special ids, of config.json or generation_config.json, that are no ids; only EOS may be a list."""
    for key in _TOKEN_IDS:
        value = config.get(key)
        for token in value if isinstance(value, list) and key == "eos_token_id" else [value]:
            # Old files say -1 where they mean none.
            number = isinstance(token, int) and not isinstance(token, bool) and -1 <= token <= _MAX_SIZE
            if token is not None and not number:
                raise ValueError(f"{source}: {key} is {value!r:.80}; it must be a token id, correct the file")


def _check_architecture(raw: dict[str, Any], source: str) -> None:
    only = "only LlamaForCausalLM (model_type llama) is supported"
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    if architectures is None and model_type is None:
        raise ValueError(f"{source}: names neither architectures nor model_type; {only}")
    if architectures is not None and architectures != ["LlamaForCausalLM"]:
        raise ValueError(f"{source}: architectures {architectures!r} is not supported; {only}")
    if model_type is not None and model_type != "llama":
        raise ValueError(f"{source}: model_type {model_type!r} is not supported; {only}")
    for key in ("attention_bias", "mlp_bias"):
        if _flag(raw, key, source):
            raise ValueError(f"{source}: {key} true is not supported; only models without biases are")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; only silu is")
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{source}: weights quantised with {method!r} are not supported; use the original or a GGUF")


def _rope(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either form."""
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    rope = raw.get(key)
    if rope is not None and not isinstance(rope, dict):
        raise ValueError(f"{source}: {key} {rope!r} is not an object; take config.json from the model's own repository")
    rope = rope or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta")
    if theta is None and key == "rope_parameters":
        raise ValueError(f"{source}: {key} lacks rope_theta; only one set of rotary parameters for all layers works")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"{source}: partial_rotary_factor {partial!r} is not supported; only 1 is")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    scaling = None
    if kind == "linear":
        if "factor" not in rope:
            raise ValueError(f"{source}: {key} is linear but lacks factor; DeepSeek-Coder's is 4.0")
        scaling = {"type": "linear", "factor": _positive(rope["factor"], f"{key} factor", source)}
    elif kind != "default":
        raise ValueError(f"{source}: rope type {kind!r:.80} is not supported; supported are linear and default")
    # Configs older than the key meant 10000, the only base there was.
    return {
        "rope_theta": 10000.0 if theta is None else _positive(theta, "rope_theta", source),
        "rope_scaling": scaling,
    }


def _size(raw: dict[str, Any], key: str, source: str) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_SIZE:
        raise ValueError(f"{source}: {key} is {value!r:.80}; it must be a positive whole number, correct the file")
    return value


def _positive(value: object, what: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:
        raise ValueError(f"{source}: {what} is {value!r:.80}; it must be a positive number, correct the file")
    return float(value)


def _flag(raw: dict[str, Any], key: str, source: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{source}: {key} is {value!r}; it must be true or false, correct the file")
    return bool(value)
