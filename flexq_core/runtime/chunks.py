"""Repacked weights read back: the inverse of kernels/cuda/repack.cu, in torch on any device.

A GPU keeps a layer's weights once, in the chunks that its kernel reads (kernels/cuda/layout.cuh). Whoever wants them as they
are stored (a state dict, another device, another backend) gets them from here, bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flexq_core.quant.packing import pack_codes, packed_bytes
from flexq_core.quant.spec import GROUP_SIZE
from flexq_core.runtime.cuda import CHUNK_ROWS, weight_bits_of

_CHUNK_CODES = CHUNK_ROWS * GROUP_SIZE
_SCALE_BYTES = 2 * CHUNK_ROWS  # between the halves
_PART_CODES = 1 << 26  # read at once: their places and fields pass through memory


def unpack_chunks(chunks: Tensor, outputs: int, *, planes: bool = False) -> tuple[Tensor, Tensor]:
    """Canonical packed weights and scales from chunks; how many bits a weight has, their size tells.

    chunks: [ceil(outputs / 32), G, bytes] uint8, for 6 bits 3136.  planes: whether they are in `bmma`'s order, bit planes.
    Returns weight [outputs, G * 16 * bits] uint8 and weight_scale [outputs, G] float16, as `cuda.repack` was given them.
    """
    rows, groups = chunks.shape[0] * CHUNK_ROWS, chunks.shape[1]
    bits = weight_bits_of(chunks)
    weight = chunks.new_empty(rows, packed_bytes(groups * GROUP_SIZE, bits))
    step = max(1, _PART_CODES // max(1, groups * _CHUNK_CODES))
    for first in range(0, chunks.shape[0], step):
        part = chunks[first : first + step]
        fields = _plane_fields(part, bits) if planes else _byte_fields(part)
        codes = (fields << 8 - bits).view(torch.int8) >> 8 - bits  # the sign comes along
        codes = codes.view(-1, groups, CHUNK_ROWS, GROUP_SIZE).transpose(1, 2).reshape(-1, groups * GROUP_SIZE)
        weight[first * CHUNK_ROWS : first * CHUNK_ROWS + len(codes)] = pack_codes(codes, bits)
    scales_at = _half_bytes(bits)
    scales = chunks[..., scales_at : scales_at + _SCALE_BYTES].contiguous()
    stored = scales.view(torch.float16)  # place 4 (row % 8) + row / 8
    scale = stored.unflatten(-1, (8, 4)).transpose(-1, -2).reshape(-1, groups, CHUNK_ROWS)
    scale = scale.transpose(1, 2).reshape(rows, groups)
    return weight[:outputs].clone() if outputs < rows else weight, scale[:outputs].contiguous()


def _half_bytes(bits: int) -> int:
    """Of the codes of half a chunk."""
    return _CHUNK_CODES // 2 * bits // 8


def _byte_fields(chunks: Tensor) -> Tensor:
    """Codes [..., 4096] uint8 as fields of 6 bits in two's complement: the upper bits of a byte, or two bits of each of three."""
    words, places = (table.to(chunks.device) for table in _byte_places())
    first, middle, last = (chunks[..., word] for word in words)
    fields = torch.where(places == 0, first, torch.where(places == 1, middle, last)) >> 2
    spread = (first & 3) << 4 | (middle & 3) << 2 | last & 3
    return torch.where(places == 3, spread, fields)


def _plane_fields(chunks: Tensor, bits: int) -> Tensor:
    """Codes [..., 4096] uint8 as fields of so many bits in two's complement, from planes in offset binary."""
    places, shift = (table.to(chunks.device) for table in _plane_places(bits))
    fields = torch.zeros_like(chunks[..., places[0]])
    for plane, place in enumerate(places):
        fields |= (chunks[..., place] >> shift & 1) << plane
    return fields ^ 1 << bits - 1


def _rows_and_ks() -> tuple[Tensor, Tensor]:
    """Row and k of every code of a chunk, [4096] each: rows first, k along them."""
    code = torch.arange(_CHUNK_CODES)
    return code // GROUP_SIZE, code % GROUP_SIZE


def _byte_of(row: Tensor, q: Tensor, word: Tensor, byte: Tensor, bits: int) -> Tensor:
    """Where a byte of one of the 2 * bits words lies that lane 4 (row % 8) + q has of the row's half.

    Vectors of four words a lane; where bits is odd the last has two.
    """
    lane, vector = 4 * (row % 8) + q, word // 4
    vector_bytes = torch.where(vector < bits // 2, 16, 8)
    return row // 16 * (_half_bytes(bits) + _SCALE_BYTES) + vector * 512 + lane * vector_bytes + word % 4 * 4 + byte


@cache
def _byte_places() -> tuple[Tensor, Tensor]:
    """Of every code the bytes of the three words of its k-step, [3, 4096], and which of four registers it comes to, [4096]."""
    row, k = _rows_and_ks()
    i, q, byte = 4 * (k // 64) + k % 16 // 4, k % 64 // 16, k % 4
    words = [_byte_of(row, q, 3 * (i // 2) + third, byte, 6) for third in range(3)]
    return torch.stack(words), 2 * (i % 2) + row // 8 % 2


@cache
def _plane_places(bits: int) -> tuple[Tensor, Tensor]:
    row, k = _rows_and_ks()
    words = [2 * plane + row // 8 % 2 for plane in range(bits)]
    places = torch.stack([_byte_of(row, k // 32, word, k % 32 // 8, bits) for word in words])
    return places, (k % 8).to(torch.uint8)
