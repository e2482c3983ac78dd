"""Choosing the next token.

The hard part is randomness that a batch cannot disturb. A random generator is a stream: what a row draws depends on how
many rows drew before it. Here the noise of vocabulary entry j is a hash of (seed, j), made in integer arithmetic, so a
row's choice is a function of its own logits, parameters and seed, whatever its neighbours are, on the CPU and the GPU
alike (up to the last bits of the logarithm). With Gumbel noise g_j = -log(-log(u_j)),

    argmax over j of (logit_j / temperature + g_j)

is a draw from the softmax: sampling becomes an argmax, and needs no sum over the vocabulary.

The filters keep a prefix of the logits in descending order, lower ids first among equals, and min_p cuts by value. A
prefix is its last value and, among the entries equal to it, its last id, so the kernel does not sort. It searches the
value over the ordered bit patterns of the logits' dtype, and, only where equals must be divided, counts to the id. Each
step of the search would be a walk over the row. So it begins in registers: the first walk leaves each lane with the
largest of its entries, and a bisection among these, which are fewer than all, finds a value that is not too high. Where
no two of the likeliest entries share a lane that is the value sought, and the next one tried is too high.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .dispatch import Kernel, check, floating, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 4096  # lanes, each of which takes the entries that lie so far apart
MANY = 3  # entries that a lane keeps: that many walks over the row cost less than noise for all of it
EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # of a logit in fp32: always zero


@Kernel
def _sample_kernel(
    logits, temperature, top_k, top_p, min_p, seeds, ids, row_stride, vocab,
    SHIFT: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_at = logits + row * row_stride
    offset = tl.arange(0, BLOCK)
    t = tl.load(temperature + row)
    greedy = t == 0.0
    rate = tl.clamp(tl.div_rn(1.0, tl.where(greedy, 1.0, t)), 1e-30, 1e30)  # neither 0, since 0 * -inf is NaN, nor inf

    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + offset
        largest = tl.maximum(largest, tl.load(x_at + at, mask=at < vocab, other=-float("inf")).to(tl.float32))
    top = tl.max(largest, axis=0)

    # What is kept: x > cut, and x == cut up to last_id.
    cut = -float("inf")
    last_id = vocab
    for phase in tl.static_range(2):
        if phase == 0:  # the k likeliest: every entry weighs 1
            k = tl.minimum(tl.load(top_k + row), vocab).to(tl.int32)
            active = (k > 0) & (k < vocab)
        else:  # the likeliest p of the mass: an entry weighs exp((x - top) / temperature)
            p = tl.load(top_p + row)
            active = p < 1.0
        if active & (greedy == 0):
            if phase == 0:
                goal = k.to(tl.float32)
            else:
                total = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, vocab, BLOCK):
                    at = start + offset
                    x = tl.load(x_at + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
                    kept = (x > cut) | ((x == cut) & (at <= last_id))
                    total += tl.where(kept, tl.exp((x - top) * rate), 0.0)
                goal = p * tl.sum(total, axis=0)
            # The largest value with at least `goal` at and above it. Bit patterns in the order of the values; above
            # the cut of the first phase everything is kept, so that need not be asked.
            low = tl.cast(cut, tl.float32).to(tl.int32, bitcast=True)
            low = (low ^ ((low >> 31) & 0x7FFFFFFF)) >> SHIFT
            high = top.to(tl.int32, bitcast=True)
            high = (high ^ ((high >> 31) & 0x7FFFFFFF)) >> SHIFT
            if phase == 0:
                weight = tl.full((BLOCK,), 1.0, tl.float32)
                reach = goal
            else:
                weight = tl.exp((largest - top) * rate)
                reach = goal * 1.00001  # their sum is rounded otherwise than that of all
            too_high = high + 1
            while low + 1 < too_high:
                middle = low + ((too_high.to(tl.int64) - low) >> 1).to(tl.int32)
                value = ((middle ^ ((middle >> 31) & (0x7FFFFFFF >> SHIFT))) << SHIFT).to(tl.float32, bitcast=True)
                enough = tl.sum(tl.where(largest >= value, weight, 0.0), axis=0) >= reach
                low = tl.where(enough, middle, low)
                too_high = tl.where(enough, too_high, middle)
            step = tl.full((), 1, tl.int64)
            while low < high:
                middle = low + tl.minimum(step, (high.to(tl.int64) - low + 1) >> 1).to(tl.int32)
                value = ((middle ^ ((middle >> 31) & (0x7FFFFFFF >> SHIFT))) << SHIFT).to(tl.float32, bitcast=True)
                mass = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, vocab, BLOCK):
                    at = start + offset
                    x = tl.load(x_at + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
                    if phase == 0:
                        each = 1.0
                    else:
                        each = tl.exp((x - top) * rate)
                    mass += tl.where(x >= value, each, 0.0)
                enough = tl.sum(mass, axis=0) >= goal
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
                step *= 2
            value = ((low ^ ((low >> 31) & (0x7FFFFFFF >> SHIFT))) << SHIFT).to(tl.float32, bitcast=True)
            above = tl.zeros((BLOCK,), tl.float32)
            ties = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, vocab, BLOCK):
                at = start + offset
                x = tl.load(x_at + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
                if phase == 0:
                    each = 1.0
                else:
                    each = tl.exp((x - top) * rate)
                above += tl.where(x > value, each, 0.0)
                ties += ((x == value) & (at < vocab) & ((x > cut) | (at <= last_id))).to(tl.int32)
            each = 1.0
            if phase == 1:
                each = tl.exp((value - top) * rate)
            count = tl.sum(ties, axis=0)
            need = tl.ceil((goal - tl.sum(above, axis=0)) / tl.maximum(each, 1e-30))
            need = tl.maximum(tl.minimum(need, count.to(tl.float32)), 1.0).to(tl.int32)
            if need < count:  # the id of the last of these equals: its block, and its place there
                start = tl.cast(-BLOCK, tl.int32)
                found = tl.cast(0, tl.int32)
                while need > found:
                    need -= found
                    start += BLOCK
                    at = start + offset
                    x = tl.load(x_at + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
                    found = tl.sum(((x == value) & (at < vocab)).to(tl.int32), axis=0)
                at = start + offset
                x = tl.load(x_at + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
                equal = (x == value) & (at < vocab)
                place = tl.cumsum(equal.to(tl.int32), axis=0)
                last_id = tl.min(tl.where(equal & (place == need), at, vocab), axis=0)
            elif value > cut:
                last_id = vocab
            cut = value

    threshold = tl.load(min_p + row)
    state = tl.load(seeds + row)
    state = (state ^ ((state >> 33) & 0x7FFFFFFF)) * -49064778989728563
    state = (state ^ ((state >> 33) & 0x7FFFFFFF)) * -4265267296055464877
    state = state ^ ((state >> 33) & 0x7FFFFFFF)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_id = offset
    # Noise is dear, and few entries are kept as a rule: each lane makes it for the next of its entries that is kept,
    # until none has any. Where nothing is left out, or a lane turns out to keep many, for all entries in turn.
    filtered = (greedy == 0) & ((cut > -float("inf")) | (threshold > 0.0))
    in_turn = filtered == 0
    done = tl.full((BLOCK,), -1, tl.int32)  # the last entry of each lane
    start = tl.cast(0, tl.int32)
    more = start < vocab
    while more:
        if in_turn:
            at = start + offset
            x = tl.load(x_at + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
            if filtered:
                kept = (x > cut) | ((x == cut) & (at <= last_id))
                x = tl.where(kept & ((tl.exp((x - top) * rate) >= threshold) | (x == top)), x, -float("inf"))
            start += BLOCK
            more = start < vocab
        else:
            at = tl.full((BLOCK,), 0, tl.int32) + vocab
            x = tl.full((BLOCK,), -float("inf"), tl.float32)
            left = tl.zeros((BLOCK,), tl.int32)
            for first in range(0, vocab, BLOCK):
                each_at = first + offset
                each = tl.load(x_at + each_at, mask=each_at < vocab, other=-float("inf")).to(tl.float32)
                kept = (each > cut) | ((each == cut) & (each_at <= last_id))
                kept = kept & ((tl.exp((each - top) * rate) >= threshold) | (each == top))
                kept = kept & (each_at > done) & (each_at < vocab)
                x = tl.where(kept & (left == 0), each, x)
                at = tl.where(kept & (left == 0), each_at, at)
                left += kept.to(tl.int32)
            done = at
            fullest = tl.max(left, axis=0)
            in_turn = fullest > MANY
            more = fullest > 1
        score = x
        if greedy == 0:
            bits = state + (at + 1).to(tl.int64) * -7046029254386353131
            bits = (bits ^ ((bits >> 33) & 0x7FFFFFFF)) * -49064778989728563
            bits = (bits ^ ((bits >> 33) & 0x7FFFFFFF)) * -4265267296055464877
            bits = ((bits ^ ((bits >> 33) & 0x7FFFFFFF)) >> 12) & 0xFFFFFFFFFFFFF
            # -log u, exponentially distributed, of u = (bits + 1/2) / 2^52. Near 1, u has no digits left in fp32: there
            # it is -log(1 - v), with the error of 1 - v taken out again (Kahan).
            near_one = bits >= 0x8000000000000
            v = (tl.where(near_one, 0xFFFFFFFFFFFFF - bits, bits).to(tl.float32) + 0.5) * 2.220446049250313e-16
            u = tl.where(near_one, 1.0 - v, v)
            exponential = -tl.log(u)
            corrected = tl.where(u == 1.0, v, exponential * (v / tl.where(u == 1.0, 1.0, 1.0 - u)))
            exponential = tl.where(near_one, corrected, exponential)
            score = x * rate - tl.log(exponential)
        better = score > best
        best = tl.where(better, score, best)
        best_id = tl.where(better, at, best_id)
    winner = tl.max(best, axis=0)
    found = tl.min(tl.where(best == winner, best_id, vocab - 1), axis=0)
    tl.store(ids + row, found.to(tl.int64))


@torch.library.custom_op("deepseek_coder::sample", mutates_args=())
def _sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor) -> Tensor:
    """-> ids (rows,) int64; every parameter (rows,): fp32, but int64 top_k and seeds."""
    rows, vocab = logits.shape
    unsupported = "the Triton kernels do not compute in float64" if logits.dtype == torch.float64 else None
    if not use_triton(logits, unsupported):
        return reference.sample(logits, temperature, top_k, top_p, min_p, seeds)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _sample_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, seeds, ids, logits.stride(0), vocab,
            SHIFT=EMPTY_BITS[logits.dtype], MANY=MANY, BLOCK=min(BLOCK, next_power_of_2(vocab)), num_warps=16,
        )  # fmt: skip
    return ids


@_sample.register_fake
def _(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


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
    check(logits.dim() == 2 and floating(logits), lambda: f"sample: logits {tuple(logits.shape)} {logits.dtype}")
    ranges = {
        "temperature": (temperature, 0.0, float("inf")),
        "top_k": (top_k, 0, 2**63 - 1),
        "top_p": (top_p, 0.0, 1.0),
        "min_p": (min_p, 0.0, 1.0),
        "seeds": (seeds, -(2**63), 2**63 - 1),
    }
    for name, (value, low, high) in ranges.items():
        if not isinstance(value, Tensor) and not low <= value <= high:
            raise ValueError(f"sample: {name} {value} is outside [{low}, {high}]")
    check(logits.shape[1] > 0, lambda: "sample: no logits to choose from")
    if not isinstance(temperature, Tensor) and temperature == 0:
        return logits.argmax(-1)
    return _sample(
        logits,
        _per_row(temperature, logits, torch.float32, "temperature"),
        _per_row(top_k, logits, torch.int64, "top_k"),
        _per_row(top_p, logits, torch.float32, "top_p"),
        _per_row(min_p, logits, torch.float32, "min_p"),
        _per_row(seeds, logits, torch.int64, "seeds"),
    )


def _per_row(value: float | Tensor, logits: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rows = logits.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((rows,), value, dtype=dtype, device=logits.device)
    check(
        value.dim() == 0 or value.shape == (rows,),
        lambda: f"sample: {name} {tuple(value.shape)} is not one for each of {rows} rows",
    )
    check(value.device == logits.device, lambda: f"sample: {name} on {value.device}, logits on {logits.device}")
    return value.to(dtype).expand(rows).contiguous()
