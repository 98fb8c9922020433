"""The kernel of `one_token_attention`, in Triton, which comes with torch for GPUs: imported where there is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS_AT_ONCE, _WARPS = 64, 2  # the fastest on an H200, 40 heads, 160 to 1150 keys: 0.95 of 128 and 4, replayed
_MOST_PARTS = 32
_LOG2_E = 1.4426950408889634
_NO_SCORE = tl.constexpr(-1e30)  # of a part without keys: finite, so that differences are


@triton.jit
def attention_kernel(
    query, key, value, mask, found,
    sums, peaks, weights, finished,  # sums [heads, parts, D], peaks and weights [heads, parts], float32; finished [heads], int32
    scale, places, heads, group,  # scale with log2 e; heads of a sequence; of them those of a key's head
    query_b, query_h, key_b, key_h, key_n, value_b, value_h, value_n, mask_b, mask_n,  # strides
    parts: tl.constexpr, parts_at_once: tl.constexpr, steps: tl.constexpr, keys_at_once: tl.constexpr,
    features: tl.constexpr, features_at_once: tl.constexpr, masked: tl.constexpr, lets_begin: tl.constexpr,
):  # fmt: skip
    """Of one head `steps` times `keys_at_once` keys: their weighted values, their weights' sum, and the largest score.

    The block that finishes last of a head's adds up all parts, in their order, and leaves `finished` at zero again.
    """
    if lets_begin:  # the next kernel fetches weights while this one runs, and waits for what is found here
        tl.extra.cuda.gdc_launch_dependents()
    head, part = tl.program_id(0), tl.program_id(1)
    b, h = (head // heads).to(tl.int64), head % heads  # a cache may have more than 2^31 numbers
    d = tl.arange(0, features_at_once)
    real = d < features
    q = tl.load(query + b * query_b + h * query_h + d, mask=real, other=0.0).to(tl.float32) * scale
    key += b * key_b + h // group * key_h
    value += b * value_b + h // group * value_h
    peak, weight = tl.full([], _NO_SCORE, tl.float32), tl.full([], 0.0, tl.float32)
    total = tl.zeros([features_at_once], tl.float32)
    for step in range(steps):
        n = (part * steps + step) * keys_at_once + tl.arange(0, keys_at_once)
        read = n < places
        if masked:
            read = tl.load(mask + b * mask_b + n * mask_n, mask=read, other=0) != 0
        both = read[:, None] & real[None, :]
        k = tl.load(key + n[:, None] * key_n + d[None, :], mask=both, other=0.0).to(tl.float32)
        v = tl.load(value + n[:, None] * value_n + d[None, :], mask=both, other=0.0).to(tl.float32)
        score = tl.where(read, tl.sum(k * q[None, :], 1), _NO_SCORE)
        higher = tl.maximum(peak, tl.max(score, 0))
        p = tl.where(read, tl.exp2(score - higher), 0.0)
        kept = tl.exp2(peak - higher)
        weight = weight * kept + tl.sum(p, 0)
        total = total * kept + tl.sum(p[:, None] * v, 0)
        peak = higher
    at = head * parts + part
    tl.store(sums + at * features + d, total, mask=real)
    tl.store(peaks + at, peak)
    tl.store(weights + at, weight)
    tl.debug_barrier()  # what all threads of this block have written is seen by whoever sees it counted
    if tl.atomic_add(finished + head, 1, sem="acq_rel") == parts - 1:
        i = tl.arange(0, parts_at_once)
        there = i < parts
        at_all = head * parts + i
        peak_of = tl.load(peaks + at_all, mask=there, other=_NO_SCORE)
        factor = tl.where(there, tl.exp2(peak_of - tl.max(peak_of, 0)), 0.0)
        weight = tl.sum(factor * tl.load(weights + at_all, mask=there, other=0.0), 0)
        both = there[:, None] & real[None, :]
        part_sums = tl.load(sums + at_all[:, None] * features + d[None, :], mask=both, other=0.0)
        total = tl.sum(factor[:, None] * part_sums, 0)
        tl.store(found + head * features + d, tl.where(weight == 0, 0.0, total / weight), mask=real)
        tl.store(finished + head, 0)


_zeros: dict[tuple[torch.device, int], Tensor] = {}
"""What kernels count in: zeros, and zeros again when a kernel ends, so that nothing need be launched to make them. Attention's
kernels of a device run one after the other: nobody here has two streams."""


def _finished(device: torch.device, count: int) -> Tensor:
    if (device, count) not in _zeros:
        made = torch.zeros(count, dtype=torch.int32, device=device)
        if torch.cuda.is_current_stream_capturing():  # memory of the graph's own, which another may not have
            return made
        _zeros[device, count] = made
    return _zeros[device, count]


def one_token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See attention.py."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}; accepted: torch.bool")
    batch, heads, _, features = query.shape
    places = key.shape[2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    steps = triton.cdiv(places, _KEYS_AT_ONCE * _MOST_PARTS)
    parts = triton.cdiv(places, _KEYS_AT_ONCE * steps)
    sums = query.new_empty(batch * heads, parts, features, dtype=torch.float32)
    peaks, weights = sums.new_empty(batch * heads, parts), sums.new_empty(batch * heads, parts)
    found = query.new_empty(batch, 1, heads, features)
    shown = query if mask is None else mask.expand(batch, 1, 1, places).view(torch.uint8)
    with torch.cuda.device_of(query):  # Triton launches on the current one
        attention_kernel[batch * heads, parts](
            query, key, value, shown, found,
            sums, peaks, weights, _finished(query.device, batch * heads),
            scale * _LOG2_E, places, heads, heads // key.shape[1],
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], shown.stride(0), shown.stride(-1),
            parts=parts, parts_at_once=triton.next_power_of_2(parts), steps=steps, keys_at_once=_KEYS_AT_ONCE,
            features=features, features_at_once=triton.next_power_of_2(features), masked=mask is not None,
            lets_begin=torch.cuda.get_device_capability(query.device) >= (9, 0), num_warps=_WARPS,
        )  # fmt: skip
    return found
