"""The two orders of the rows of query and key matrices.

Hugging Face rotates the two halves of a head, channels (0, D/2), (1, D/2 + 1), ...; Meta's own checkpoints, llama2.c
and GGUF files rotate adjacent pairs (0, 1), (2, 3), ... Both compute the same once the rows are reordered. The wrong
order still gives fluent nonsense, so the tests compare logits and trained weights.
"""

from typing import Any

from torch import Tensor


def to_half_split(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """The tensor of Hugging Face `name` from adjacent-pair order; all but q and k (rows, hidden) come back as given."""
    heads = _heads(name, config)
    return weight if heads is None else _swap(weight, heads, -1, 2)


def to_adjacent_pairs(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """The inverse of `to_half_split`."""
    heads = _heads(name, config)
    return weight if heads is None else _swap(weight, heads, 2, -1)


def _heads(name: str, config: dict[str, Any]) -> int | None:
    kind = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    return next((config[key] for end, key in kind.items() if name.endswith(end)), None)


def _swap(weight: Tensor, heads: int, outer: int, inner: int) -> Tensor:
    rows, hidden = weight.shape
    sizes = [rows // heads // 2 if size == -1 else size for size in (outer, inner)]
    return weight.reshape(heads, *sizes, hidden).transpose(1, 2).reshape(rows, hidden)
