"""What each op computes, in plain PyTorch: the CPU path, and the oracle of every kernel's tests.

Forward and backward are written out by hand, because a custom op's body is invisible to autograd. Statistics and
products of fp16 and bf16 inputs are made in fp32 (of fp64 inputs in fp64), and rounded once, where the kernels round.
Nothing here imports triton.
"""

import torch
from torch import Tensor

ROWS = 256  # queries per chunk: bounds the scores of one document at heads * ROWS * keys


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


# ---- attention ------------------------------------------------------------------------------------------------------
# Query heads are grouped under their key head, (heads, ...) -> (kv_heads, group * rows, ...): one batched product per
# chunk serves MHA, GQA and MQA, and keys are never repeated. A query row i sees key j when j <= i + keys - queries.


def _grouped(x: Tensor, kv_heads: int) -> Tensor:  # (rows, heads, head_dim) -> (kv_heads, group * rows, head_dim)
    x = x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    return x.flatten(1, 2).to(wide(x.dtype))


def _ungrouped(x: Tensor, rows: int) -> Tensor:  # (kv_heads, group * rows, head_dim) -> (rows, heads, head_dim)
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float, first: int, rows: int, offset: int | None) -> Tensor:
    """Masked scores (kv_heads, group * rows, keys) of the queries first ... first + rows; offset None: no mask."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    if offset is not None:
        seen = max(0, first + offset + 1)  # keys that every row of the chunk sees
        hidden = torch.ones(rows, max(0, k.shape[1] - seen), dtype=torch.bool, device=q.device)
        hidden = hidden.triu_(first + offset + 1 - seen)
        scores.unflatten(1, (-1, rows))[..., seen:].masked_fill_(hidden, float("-inf"))
    return scores


def _chunks(queries: int, keys: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first row, end row, keys that some row sees), for each chunk of queries."""
    ends = [(first, min(first + ROWS, queries)) for first in range(0, queries, ROWS)]
    return [(first, end, min(keys, max(0, end + keys - queries)) if causal else keys) for first, end in ends]


def attention_document(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One document: q (queries, heads, head_dim), k and v (keys, kv_heads, head_dim) -> out, lse (heads, queries)."""
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide(q.dtype))
    keys, values = (x.transpose(0, 1).to(wide(x.dtype)) for x in (k, v))  # (kv_heads, keys, head_dim)
    offset = k.shape[0] - q.shape[0] if causal else None
    for first, end, visible in _chunks(q.shape[0], k.shape[0], causal):
        if visible == 0:
            continue  # these rows see nothing: zeros
        rows = end - first
        scores = _scores(_grouped(q[first:end], k.shape[1]), keys[:, :visible], scale, first, rows, offset)
        total = torch.logsumexp(scores, -1)
        lse[:, first:end] = total.view(-1, rows)
        p = scores.sub_(total.masked_fill(total == float("-inf"), 0.0)[..., None]).exp_()
        out[first:end] = _ungrouped(torch.bmm(p, values[:, :visible]), rows)
    return out, lse


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Packed attention: (total, heads, head_dim) -> out like q, lse (heads, total). Reads the lengths on the host."""
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide(q.dtype))
    for a, b, c, d in _documents(cu_seqlens_q, cu_seqlens_k):
        out[a:b], lse[:, a:b] = attention_document(q[a:b], k[c:d], v[c:d], scale, causal)
    return out, lse


def attention_backward(
    dout: Tensor,  # (total, heads, head_dim)
    dlse: Tensor | None,  # (heads, total); None: zeros
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
    deterministic: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fills dq, dk, dv, the same bits each time.

    With P = exp(S - lse): dS = P * (dO V^T - rowsum(dO * O) + dlse), dQ = scale dS K, ...
    """
    dtype, kv_heads = wide(q.dtype), k.shape[1]
    for gradient in (dq, dk, dv):
        gradient.zero_()
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).t()  # (heads, total)
    if dlse is not None:
        delta = delta - dlse
    for a, b, c, d in _documents(cu_seqlens_q, cu_seqlens_k):
        keys, values = (x[c:d].transpose(0, 1).to(dtype) for x in (k, v))  # (kv_heads, keys, head_dim)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        offset = (d - c) - (b - a) if causal else None
        for first, end, visible in _chunks(b - a, d - c, causal):
            if visible == 0:
                continue
            rows, at = end - first, slice(a + first, a + end)
            queries, douts = _grouped(q[at], kv_heads), _grouped(dout[at], kv_heads)
            p = _scores(queries, keys[:, :visible], scale, first, rows, offset)
            total = lse[:, at].reshape(kv_heads, -1, 1)
            p = p.sub_(total.masked_fill(total == float("-inf"), 0.0)).exp_()
            dvalues[:, :visible].baddbmm_(p.transpose(1, 2), douts)
            ds = torch.bmm(douts, values[:, :visible].transpose(1, 2))
            ds = ds.sub_(delta[:, at].reshape(kv_heads, -1, 1)).mul_(p)
            dkeys[:, :visible].baddbmm_(ds.transpose(1, 2), queries, alpha=scale)
            dq[at] = _ungrouped(torch.bmm(ds, keys[:, :visible]).mul_(scale), rows)
        dk[c:d], dv[c:d] = dkeys.transpose(0, 1), dvalues.transpose(0, 1)


def _documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[int, int, int, int]]:
    """(query start, query end, key start, key end) of each document that holds anything."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(q[i], q[i + 1], k[i], k[i + 1]) for i in range(len(q) - 1) if q[i + 1] > q[i] or k[i + 1] > k[i]]


def cached_attention_by_sequence(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: list[int],
    block_table: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache whose lengths the host knows: only used keys are touched.

    -> out like q (batch, queries, heads, head_dim), lse (batch, heads, queries).
    """
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide(q.dtype))
    for row, length in enumerate(lengths):
        if block_table is None:
            k, v = k_cache[row, :length], v_cache[row, :length]
        else:
            pages = block_table[row, : -(-length // k_cache.shape[1])].long()
            k, v = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out[row], lse[row] = attention_document(q[row], k, v, scale, causal)
    return out, lse


def cached_attention_masked(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The same without asking the device for a length: every slot is scored, unused ones are masked."""
    batch, queries, heads, _ = q.shape
    kv_heads, dtype = k_cache.shape[2], wide(q.dtype)
    if block_table is not None:
        pages = block_table.long().clamp(min=0)  # unused entries may hold anything negative
        k_cache, v_cache = (cache[pages].flatten(1, 2) for cache in (k_cache, v_cache))
    slots = torch.arange(k_cache.shape[1], device=q.device)
    used = slots < lengths[:, None]  # (batch, slots)
    keys = k_cache.permute(0, 2, 3, 1).to(dtype)  # (batch, kv_heads, head_dim, slots)
    # Unused slots may hold NaN, and 0 * NaN is NaN: masking the scores is not enough.
    values = v_cache.masked_fill(~used[:, :, None, None], 0.0).permute(0, 2, 1, 3).to(dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, queries), dtype=dtype)
    for first in range(0, queries, ROWS):
        rows = torch.arange(first, min(first + ROWS, queries), device=q.device)
        visible = used[:, None, :]
        if causal:
            visible = visible & (slots <= rows[:, None] + lengths[:, None, None] - queries)
        part = q[:, first : first + ROWS].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).to(dtype)
        group = part.shape[2]
        scores = torch.matmul(part.flatten(2, 3), keys).mul_(scale).unflatten(2, (group, -1))
        scores = scores.masked_fill_(~visible[:, None, None], float("-inf"))  # (batch, kv_heads, group, rows, slots)
        total = torch.logsumexp(scores, -1)
        lse[:, :, first : first + ROWS] = total.flatten(1, 2)
        p = scores.sub_(total.masked_fill(total == float("-inf"), 0.0)[..., None]).exp_()
        result = torch.matmul(p.flatten(2, 3), values).unflatten(2, (group, -1))
        out[:, first : first + ROWS] = result.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out, lse


# ---- small ops ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> weight * round(x * rstd), rstd (rows,): Llama's order of rounding, before the product with weight."""
    x_wide = x.to(wide(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return weight * (x_wide * rstd).to(x.dtype), rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """-> dx (plus dsum, the gradient that reaches x by the residual stream), dweight."""
    dtype = wide(x.dtype)
    normed = x.to(dtype) * rstd[:, None]
    dweight = (dy.to(dtype) * normed.to(x.dtype).to(dtype)).sum(0)
    g = dy.to(dtype) * weight.to(dtype)
    dx = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum.to(dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def rope_(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, heads: int, inverse: bool) -> None:
    """Rotates the first `heads` heads of x (total, columns) in place; half-split pairs (i, i + head_dim / 2)."""
    half, dtype = inverse_frequencies.shape[0], wide(x.dtype)
    angle = positions.to(dtype)[:, None] * inverse_frequencies.to(dtype)  # (total, half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    if inverse:
        sin = -sin
    pairs = x[:, : heads * 2 * half].unflatten(1, (heads, 2, half))
    a, b = (pairs[:, :, i].to(dtype) for i in (0, 1))  # (total, heads, half)
    rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin  # before a write: in fp32 a and b are views of x
    pairs[:, :, 0], pairs[:, :, 1] = rotated_a, rotated_b


def swiglu(gate_up: Tensor) -> Tensor:
    """(total, 2 F) -> silu(gate) * up, (total, F)."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """With s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s."""
    dtype = wide(gate_up.dtype)
    gate, up = gate_up.to(dtype).chunk(2, -1)
    s, dy = torch.sigmoid(gate), dy.to(dtype)
    return torch.cat([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], -1).to(gate_up.dtype)


def cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, z_loss: float, gradient: bool
) -> None:
    """Fills losses (rows,) with lse - logit[target] + z_loss * lse^2, zero where ignored; gradient: overwrites logits
    (rows, vocab) with softmax * (1 + 2 z_loss lse) - onehot(target)."""
    valid = targets != ignore_index
    target = torch.where(valid, targets, 0)[:, None]
    x = logits.to(wide(logits.dtype))
    lse = torch.logsumexp(x, -1, keepdim=True)
    row_losses = (lse - x.gather(1, target) + z_loss * lse.square()).squeeze(1)
    losses.copy_(torch.where(valid, row_losses, 0.0))
    if gradient:
        p = torch.exp(x - lse).mul_(1 + 2 * z_loss * lse)
        p.scatter_add_(1, target, torch.full_like(lse, -1.0))
        logits.copy_(p.masked_fill_(~valid[:, None], 0.0))


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None,
) -> None:  # fmt: skip
    """cache[slot // n, slot % n] = row, for caches (m, n, kv_heads, head_dim) of any strides; negative slots skipped.

    With a descale (kv_heads,), round(row / descale) in fp8, what is beyond its range clamped to it. Dropping rows would
    need their count on the host. A skipped row repeats the write of the first row that is not skipped instead; when all
    are skipped, slot 0 is written with what it holds.
    """
    if slots.numel() == 0:
        return
    rows = torch.arange(slots.shape[0], device=slots.device)
    valid = slots >= 0
    source = torch.where(valid, rows, valid.int().argmax())
    slot = slots[source].long().clamp(min=0)
    some = valid.any()
    for new, cache, descale in ((k, k_cache, k_descale), (v, v_cache, v_descale)):
        at = (slot // cache.shape[1], slot % cache.shape[1])
        new = new[source]
        if descale is not None:
            largest = torch.finfo(cache.dtype).max
            new = (new.to(wide(new.dtype)) / descale[:, None]).clamp(-largest, largest)
            new, cache = new.to(cache.dtype).view(torch.uint8), cache.view(torch.uint8)  # fp8 cannot be indexed
        cache[at] = torch.where(some, new.to(cache.dtype), cache[at])


# ---- sampling -------------------------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3's 64-bit form: every input bit reaches every output bit. int64 products wrap."""
    for factor in (0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64):
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor  # the mask makes the shift a logical one
    return x ^ ((x >> 33) & 0x7FFFFFFF)


def gumbel_noise(seeds: Tensor, columns: int) -> Tensor:
    """fp64 (rows, columns); a function of (seed, column) and nothing else. seeds (rows,) int64."""
    column = torch.arange(1, columns + 1, dtype=torch.int64, device=seeds.device)
    bits = _mix(_mix(seeds)[:, None] + column * (0x9E3779B97F4A7C15 - 2**64))
    uniform = (((bits >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52  # strictly inside (0, 1)
    return -torch.log(-torch.log(uniform))


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits (rows, vocab) with what the filters forbid at -inf; parameters (rows,). Among equals, lower ids win.

    top_k keeps the k likeliest (0: all); top_p the fewest likeliest of those whose probabilities, scaled to sum 1,
    reach p; min_p those at least min_p times as likely as the likeliest. The likeliest always stays.
    """
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    ordered = ordered.masked_fill(rank >= limit, float("-inf"))
    p = torch.softmax(ordered, -1)
    before = p.cumsum(-1) - p  # the mass of everything likelier
    keep = ((before < top_p[:, None]) | (top_p[:, None] >= 1)) & (p >= min_p[:, None] * p[:, :1]) | (rank == 0)
    return logits.new_empty(logits.shape).scatter_(1, order, ordered.masked_fill(~keep, float("-inf")))


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor) -> Tensor:
    """Ids (rows,) of logits (rows, vocab): the argmax of what the filters keep, plus noise; at temperature 0 of all."""
    greedy = temperature == 0
    rate = (1 / torch.where(greedy, 1.0, temperature)).clamp(1e-30, 1e30)  # neither 0, since 0 * -inf is NaN, nor inf
    tempered = logits.float() * rate[:, None]
    off = (top_k == 0) & (top_p >= 1) & (min_p == 0)
    if logits.device.type != "cpu" or not off.all():  # elsewhere nobody waits to learn it
        tempered = filter_logits(tempered, top_k, top_p, min_p)
    noisy = tempered.double() + gumbel_noise(seeds, logits.shape[1])
    return torch.where(greedy, logits.argmax(-1), noisy.argmax(-1))
