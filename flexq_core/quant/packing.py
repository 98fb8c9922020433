"""Packed forms of integer codes: dense along K (the canonical, stored form) and bit planes.

The canonical form knows nothing of any kernel. Six-bit codes, two's complement, four in three bytes along K,
little-endian bit order:

    byte      0                 1                 2
    bit       7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
    code      1 1 0 0 0 0 0 0   2 2 2 2 1 1 1 1   3 3 3 3 3 3 2 2

Eight-bit codes are stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexq_core.quant.spec import WEIGHT_BITS, code_limits, require_bits

_WORD_BITS = 32


def packed_bytes(padded_features: int, bits: int) -> int:
    """Bytes that a row of `padded_features` codes takes in canonical form."""
    return padded_features * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Canonical dense packing along the last axis.

    codes: [..., Kp] int8 in the range of `bits` (6 or 8); Kp a multiple of 4 for 6 bits.
    Returns [..., Kp * bits // 8] uint8.
    Raises TypeError for another dtype, ValueError for other bits, another Kp, or a code out of range.
    """
    require_bits(bits, accepted=WEIGHT_BITS)
    _require_codes(codes, bits)
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    if codes.shape[-1] % 4:
        raise ValueError(f"cannot pack {codes.shape[-1]} codes of 6 bits; accepted: a multiple of 4")
    c0, c1, c2, c3 = (codes & 0x3F).view(torch.uint8).unflatten(-1, (-1, 4)).unbind(-1)
    packed = torch.stack((c0 | c1 << 6, c1 >> 2 | c2 << 4, c2 >> 4 | c3 << 2), dim=-1)
    return packed.flatten(-2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`.

    packed: [..., B] uint8; B a multiple of 3 for 6 bits.  Returns [..., B * 8 // bits] int8.
    Raises TypeError for another dtype, ValueError for other bits or another B.
    """
    require_bits(bits, accepted=WEIGHT_BITS)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are {packed.dtype}; accepted: uint8")
    if bits == 8:
        return packed.contiguous().view(torch.int8)
    if packed.shape[-1] % 3:
        raise ValueError(f"cannot unpack {packed.shape[-1]} bytes of 6-bit codes; accepted: a multiple of 3")
    b0, b1, b2 = packed.unflatten(-1, (-1, 3)).unbind(-1)
    fields = torch.stack((b0, b0 >> 6 | b1 << 2, b1 >> 4 | b2 << 4, b2 >> 2), dim=-1)
    # The field moves to the top of the byte; the arithmetic shift back down carries its sign along.
    return ((fields << 2).view(torch.int8) >> 2).flatten(-2)


def pack_bit_planes(codes: Tensor, bits: int) -> Tensor:
    """Bit planes along the last axis, as binary tensor cores read them (FlexQ §3.2, bit-level packing).

    codes: [..., Kp] int8 in the range of `bits` (2 to 8), Kp a multiple of 32.
    Returns [bits, ..., Kp // 32] int32: bit j of word w of plane i is bit i of code 32 * w + j. Plane i weighs
    2**i, the last one -2**(bits - 1).
    Raises TypeError for another dtype, ValueError for other bits, another Kp, or a code out of range.
    """
    require_bits(bits, accepted=tuple(range(2, 9)))
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
    require_bits(bits, accepted=tuple(range(2, 9)))
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
