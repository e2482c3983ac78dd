"""The map between our tensor names and other people's.

The one hard idea: in memory some matrices are fused (one matmul instead of three), in files they never are. Both
nn.Linear layouts are (out, in), so fusing is plain concatenation of rows: `wqkv` is [all q; all k; all v] and
`w_gate_up` is [gate; up]. One table therefore serves both directions. Loading walks the parts and copies each
into its rows; saving walks the same parts and slices the rows out again. Neither needs a second copy of the model,
and tensor parallelism or LoRA, which treat q, k and v separately, read the row counts from the same table.

A config here is a plain dict in the transformers-4 form, as `convert.config.normalise_config` returns it.
"""

from typing import Any, NamedTuple


class Part(NamedTuple):
    """One Hugging Face tensor: `name` and `shape` (out, in) or (hidden,)."""

    name: str
    shape: tuple[int, ...]


def head_dim(config: dict[str, Any]) -> int:
    """Size of one attention head: the config's own `head_dim`, else hidden_size / num_attention_heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def fused(config: dict[str, Any]) -> dict[str, list[Part]]:
    """For each of our parameter names, in model order, the Hugging Face tensors whose rows concatenated make it.

    `head.weight` is absent when the config ties it to the embedding. Counts: 9 tensors a layer plus 3 (2 when tied).
    """
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query_rows = config["num_attention_heads"] * head_dim(config)
    kv_rows = config["num_key_value_heads"] * head_dim(config)
    table = {"embed.weight": [Part("model.embed_tokens.weight", (vocab, hidden))]}
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table[f"{ours}.attention_norm.weight"] = [Part(f"{theirs}.input_layernorm.weight", (hidden,))]
        table[f"{ours}.attention.wqkv.weight"] = [
            Part(f"{theirs}.self_attn.q_proj.weight", (query_rows, hidden)),
            Part(f"{theirs}.self_attn.k_proj.weight", (kv_rows, hidden)),
            Part(f"{theirs}.self_attn.v_proj.weight", (kv_rows, hidden)),
        ]
        table[f"{ours}.attention.wo.weight"] = [Part(f"{theirs}.self_attn.o_proj.weight", (hidden, query_rows))]
        table[f"{ours}.mlp_norm.weight"] = [Part(f"{theirs}.post_attention_layernorm.weight", (hidden,))]
        table[f"{ours}.mlp.w_gate_up.weight"] = [
            Part(f"{theirs}.mlp.gate_proj.weight", (intermediate, hidden)),
            Part(f"{theirs}.mlp.up_proj.weight", (intermediate, hidden)),
        ]
        table[f"{ours}.mlp.w_down.weight"] = [Part(f"{theirs}.mlp.down_proj.weight", (hidden, intermediate))]
    table["norm.weight"] = [Part("model.norm.weight", (hidden,))]
    if not config.get("tie_word_embeddings"):
        table["head.weight"] = [Part("lm_head.weight", (vocab, hidden))]
    return table


def huggingface(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor name of this model and its shape, in model order."""
    return {part.name: part.shape for parts in fused(config).values() for part in parts}


_GGUF_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf(config: dict[str, Any]) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name, for every tensor of this model, in model order."""
    table = {}
    for name in huggingface(config):
        if name in _GGUF_MODEL:
            table[name] = _GGUF_MODEL[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            table[name] = f"blk.{layer}.{_GGUF_LAYER[rest.removesuffix('.weight')]}.weight"
    return table
