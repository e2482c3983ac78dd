"""Sampling and the plain generate loop: one sequence, a contiguous KV cache, one token at a time.

A completion ends at an EOS id, at a stop string, at `max_new_tokens`, or where the context is full. A stop string may
begin in one token and end in another, so text that could still become one is held back until it cannot.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import kernels

from .config import ModelConfig
from .model import Decoder, KVCache
from .prompts import completion
from .tokenizer import EOS, EOT, Tokenizer


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> str:
    """The completion of `prompt` (text, or ids from `prompts`), without the prompt and without the stop string.

    temperature: 0 takes the likeliest token; otherwise tokens are drawn from the smallest set whose probability
    reaches `top_p`. The same seed gives the same text on the same device and dtype.

    Raises ValueError for an empty prompt and for one that is longer than the context.
    """
    return "".join(stream(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, stop))


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """`generate`, in pieces as they become certain: whole characters that no stop string can take back."""
    text, decoder = "", tokenizer.stream()
    for token in _tokens(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed):
        text += decoder.push(token)
        certain, stopped = _before_stop(text, stop)
        if certain:
            yield certain
        if stopped:
            return
        text = text[len(certain) :]
    text += decoder.finish()
    certain, stopped = _before_stop(text, stop)
    yield certain if stopped else text


def _before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(the part of `text` that is certain to be printed, whether a stop string was met)."""
    found = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    if found:
        return text[: min(found)], True
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held], False


@torch.inference_mode()
def _tokens(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """New ids one by one, EOS not included."""
    ids = completion(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    limit = check_prompt(model.config, len(ids), max_new_tokens, temperature, top_p)
    weight = model.embed.weight
    ends = end_ids(model.config, tokenizer)
    cache = KVCache(model.config, 1, limit, weight.device, weight.dtype)
    tokens = torch.tensor([ids], device=weight.device)
    for position in range(len(ids), limit + 1):
        # Rows past the vocabulary are padding of the embedding: no token.
        logits = model(tokens, cache=cache)[:, : tokenizer.vocab_size]
        tokens = kernels.sample(logits, temperature, 0, top_p, 0.0, _seed(seed, position, weight.device))[:, None]
        token = int(tokens)
        if token in ends:
            return
        yield token


def check_prompt(config: ModelConfig, length: int, max_new_tokens: int, temperature: float, top_p: float) -> int:
    """How many positions a completion may fill at most; ValueError for a request that cannot be served."""
    if length == 0:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens must be at least 1, temperature at least 0, top_p in (0, 1]; "
            f"got {max_new_tokens}, {temperature}, {top_p}"
        )
    if length >= config.max_position_embeddings:
        raise ValueError(
            f"the prompt is {length} tokens, the model's context {config.max_position_embeddings}; shorten the prompt"
        )
    return min(length + max_new_tokens, config.max_position_embeddings) - 1


def end_ids(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends a text: the model's, the tokenizer's, and both of DeepSeek-Coder's own.

    An instruct model ends a turn with EOT, but a plain completion with end-of-sentence.
    """
    ids = [*config.eos_token_ids, tokenizer.eos_id, tokenizer.control.get(EOS), tokenizer.control.get(EOT)]
    return frozenset(i for i in ids if i is not None)


def _seed(seed: int, position: int, device: torch.device) -> Tensor:
    """(1,) int64: a seed of its own for every position, so that draws do not repeat."""
    return torch.tensor([(seed * 1_000_003 + position) % 2**63], device=device)
