"""Packed forms of integer codes: dense along K (the canonical, stored form) and bit planes.

The canonical form knows nothing of any kernel. Codes of two's complement lie side by side along K in little-endian bit
order, of six bits four in three bytes:

    byte      0                 1                 2
    bit       7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
    code      1 1 0 0 0 0 0 0   2 2 2 2 1 1 1 1   3 3 3 3 3 3 2 2

Eight-bit codes are stored as they are.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from flexq_core.quant.spec import code_limits, require_bits

_WORD_BITS = 32


def packed_bytes(padded_features: int, bits: int) -> int:
    """Bytes that a row of `padded_features` codes takes in canonical form."""
    return padded_features * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Canonical dense packing along the last axis.

    codes: [..., Kp] int8 in the range of `bits` (2 to 8); Kp so that they fill whole bytes: for 6 bits a multiple of 4.
    Returns [..., Kp * bits // 8] uint8.
    Raises TypeError for another dtype, ValueError for other bits, another Kp, or a code out of range.
    """
    require_bits(bits)
    _require_codes(codes, bits)
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    together = math.lcm(bits, 8) // bits
    if codes.shape[-1] % together:
        raise ValueError(f"cannot pack {codes.shape[-1]} codes of {bits} bits; accepted: a multiple of {together}")
    return _cut((codes & (1 << bits) - 1).view(torch.uint8), bits, 8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`.

    packed: [..., B] uint8; B so that they hold whole codes: for 6 bits a multiple of 3.  Returns [..., B * 8 // bits] int8.
    Raises TypeError for another dtype, ValueError for other bits or another B.
    """
    require_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are {packed.dtype}; accepted: uint8")
    if bits == 8:
        return packed.contiguous().view(torch.int8)
    together = math.lcm(bits, 8) // 8
    if packed.shape[-1] % together:
        raise ValueError(
            f"cannot unpack {packed.shape[-1]} bytes of {bits}-bit codes; accepted: a multiple of {together}"
        )
    # The field moves to the top of the byte; the arithmetic shift back down carries its sign along.
    return (_cut(packed, 8, bits) << 8 - bits).view(torch.int8) >> 8 - bits


def _cut(fields: Tensor, bits: int, into: int) -> Tensor:
    """Fields of `bits` bits, side by side in little-endian order, cut anew into fields of `into` bits; one of the two is 8.

    fields: [..., F] uint8.  Returns [..., F * bits // into] uint8; bits above the lowest `into` are left as they fall.
    """
    period = math.lcm(bits, into)
    parts = fields.unflatten(-1, (-1, period // bits)).unbind(-1)
    anew = []
    for place in range(0, period, into):
        offsets = {index * bits - place: part for index, part in enumerate(parts)}
        overlapping = [
            part << offset if offset >= 0 else part >> -offset
            for offset, part in offsets.items()
            if -bits < offset < into
        ]
        anew.append(functools.reduce(torch.bitwise_or, overlapping))
    return torch.stack(anew, dim=-1).flatten(-2)


def pack_bit_planes(codes: Tensor, bits: int) -> Tensor:
    """Bit planes along the last axis, as binary tensor cores read them (FlexQ §3.2, bit-level packing).

    codes: [..., Kp] int8 in the range of `bits` (2 to 8), Kp a multiple of 32.
    Returns [bits, ..., Kp // 32] int32: bit j of word w of plane i is bit i of code 32 * w + j. Plane i weighs
    2**i, the last one -2**(bits - 1).
    Raises TypeError for another dtype, ValueError for other bits, another Kp, or a code out of range.
    """
    require_bits(bits)
    _require_codes(codes, bits)
    if codes.shape[-1] % _WORD_BITS:
        raise ValueError(f"cannot pack planes of {codes.shape[-1]} codes; accepted: a multiple of {_WORD_BITS}")
    words = codes.to(torch.int32).unflatten(-1, (-1, _WORD_BITS))
    places = torch.arange(_WORD_BITS, dtype=torch.int32, device=codes.device)
    # Distinct powers of two: the sum is their union, and bit 31 makes the word negative, as int32 stores it.
    planes = [((words >> plane & 1) << places).sum(-1, dtype=torch.int32) for plane in range(bits)]
    return torch.stack(planes)


def unpack_bit_planes(planes: Tensor) -> Tensor:
    """Inverse of `pack_bit_planes`.

    planes: [bits, ..., W] int32, 2 ≤ bits ≤ 8.  Returns [..., 32 * W] int8.
    Raises TypeError for another dtype, ValueError for other bits.
    """
    if planes.dtype != torch.int32:
        raise TypeError(f"bit planes are {planes.dtype}; accepted: int32")
    bits = planes.shape[0]
    require_bits(bits)
    places = torch.arange(_WORD_BITS, dtype=torch.int32, device=planes.device)
    ones = (planes[..., None] >> places & 1).flatten(-2)
    weights = [1 << plane for plane in range(bits - 1)] + [-(1 << bits - 1)]
    codes = sum(plane * weight for plane, weight in zip(ones, weights, strict=True))
    return codes.to(torch.int8)


def _require_codes(codes: Tensor, bits: int) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(f"codes are {codes.dtype}; accepted: int8")
    lowest, highest = code_limits(bits)
    outside = (codes < lowest) | (codes > highest)
    if bool(outside.any()):
        value = codes[outside][0].item()
        raise ValueError(f"code {value} does not fit {bits} bits; accepted: {lowest} to {highest}")
