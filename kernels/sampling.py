"""Choosing the next token.

The hard part is randomness that a batch cannot disturb. A random generator is a stream: what a row draws depends on how
many rows drew before it. Here the noise of vocabulary entry j is a hash of (seed, j), made in integer arithmetic, so a
row's choice is a function of its own logits, parameters and seed, whatever its neighbours are, on the CPU and the GPU
alike (up to the last bits of the logarithm). With Gumbel noise g_j = -log(-log(u_j)),

    argmax over j of (logit_j / temperature + g_j)

is a draw from the softmax: sampling becomes an argmax, and needs no sum over the vocabulary.
"""

import torch
from torch import Tensor

from . import reference
from .dispatch import check


@torch.no_grad()
def sample(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seeds: int | Tensor,
) -> Tensor:
    """One token id per row: logits (rows, vocab) -> (rows,) int64.

    Every parameter is a number or a tensor (rows,). temperature 0: the likeliest token, whatever the filters say; then,
    on the tempered distribution, in this order: top_k (0: off) keeps the k likeliest, top_p (1: off) the fewest
    likeliest whose probabilities, scaled to sum 1, reach p, min_p (0: off) those at least min_p times as likely as the
    likeliest. seeds: integers; one per row and step.

    ValueError for wrong shapes and for numbers out of range (tensors are not looked into: that would wait for the GPU).
    """
    check(
        logits.dim() == 2 and logits.is_floating_point(), lambda: f"sample: logits {tuple(logits.shape)} {logits.dtype}"
    )
    ranges = {
        "temperature": (temperature, 0.0, float("inf")),
        "top_k": (top_k, 0, float("inf")),
        "top_p": (top_p, 0.0, 1.0),
        "min_p": (min_p, 0.0, 1.0),
    }
    for name, (value, low, high) in ranges.items():
        if not isinstance(value, Tensor) and not low <= value <= high:
            raise ValueError(f"sample: {name} {value} is outside [{low}, {high}]")
    if not isinstance(temperature, Tensor) and temperature == 0:
        return logits.argmax(-1)
    t = _per_row(temperature, logits, torch.float32, "temperature")
    greedy = t == 0
    tempered = logits.float() / torch.where(greedy, 1.0, t)[:, None]
    if any(isinstance(value, Tensor) for value in (top_k, top_p, min_p)) or top_k != 0 or top_p != 1 or min_p != 0:
        k = _per_row(top_k, logits, torch.int64, "top_k")
        p = _per_row(top_p, logits, torch.float32, "top_p")
        m = _per_row(min_p, logits, torch.float32, "min_p")
        tempered = reference.filter_logits(tempered, k, p, m)
    noise = reference.gumbel_noise(_per_row(seeds, logits, torch.int64, "seeds"), logits.shape[1])
    return torch.where(greedy, logits.argmax(-1), (tempered.double() + noise).argmax(-1))


def _per_row(value: float | Tensor, logits: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rows = logits.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((rows,), value, dtype=dtype, device=logits.device)
    check(
        value.dim() == 0 or value.shape == (rows,),
        lambda: f"sample: {name} {tuple(value.shape)} is not one for each of {rows} rows",
    )
    check(value.device == logits.device, lambda: f"sample: {name} on {value.device}, logits on {logits.device}")
    return value.to(dtype).expand(rows)
