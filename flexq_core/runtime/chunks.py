"""Repacked weights read back: the inverse of kernels/cuda/repack.cu, in torch on any device.

A GPU keeps a layer's weights once, in the chunks that its kernel reads (kernels/cuda/layout.cuh). Whoever wants them as they
are stored (a state dict, another device, another backend) gets them from here, bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flexq_core.quant.packing import pack_codes
from flexq_core.quant.spec import GROUP_SIZE

CHUNK_ROWS = 32
"""Outputs of a chunk of repacked weights."""
_CODE_BYTES = CHUNK_ROWS * GROUP_SIZE * 6 // 8
CHUNK_BYTES = _CODE_BYTES + CHUNK_ROWS * 2
"""Of a chunk: codes of one group, then float16 scales."""

_PART_CODES = 1 << 26  # read at once: their indices and fields pass through memory


def unpack_chunks(chunks: Tensor, outputs: int, *, planes: bool = False) -> tuple[Tensor, Tensor]:
    """Canonical packed weights and scales from chunks.

    chunks: [ceil(outputs / 32), G, 3136] uint8.  planes: whether they are in `bmma`'s order, bit planes in offset binary.
    Returns weight [outputs, G * 96] uint8 and weight_scale [outputs, G] float16, as `cuda.repack` was given them.
    """
    rows, groups = chunks.shape[0] * CHUNK_ROWS, chunks.shape[1]
    weight = chunks.new_empty(rows, groups * GROUP_SIZE * 6 // 8)
    step = max(1, _PART_CODES // max(1, CHUNK_ROWS * groups * GROUP_SIZE))
    for first in range(0, chunks.shape[0], step):
        part = chunks[first : first + step]
        fields = _plane_fields(part) if planes else _byte_fields(part)
        codes = ((fields << 2).view(torch.int8) >> 2).view(-1, groups, CHUNK_ROWS, GROUP_SIZE)  # the sign comes along
        codes = codes.transpose(1, 2).reshape(-1, groups * GROUP_SIZE)
        weight[first * CHUNK_ROWS : first * CHUNK_ROWS + len(codes)] = pack_codes(codes, 6)
    stored = chunks[..., _CODE_BYTES:].contiguous().view(torch.float16)  # place 4 (row % 8) + row / 8
    scale = (
        stored.unflatten(-1, (8, 4))
        .transpose(-1, -2)
        .reshape(-1, groups, CHUNK_ROWS)
        .transpose(1, 2)
        .reshape(rows, groups)
    )
    return weight[:outputs].clone() if outputs < rows else weight, scale[:outputs].contiguous()


def _byte_fields(chunks: Tensor) -> Tensor:
    """Codes [..., 4096] uint8 as fields of 6 bits in two's complement: upper four and lower two lie apart."""
    upper, upper_shift, lower, lower_shift = (table.to(chunks.device) for table in _byte_places())
    return (chunks[..., upper] >> upper_shift & 15) << 2 | (chunks[..., lower] >> lower_shift & 3)


def _plane_fields(chunks: Tensor) -> Tensor:
    """As `_byte_fields`, from bit planes."""
    places, shift = (table.to(chunks.device) for table in _plane_places())
    fields = torch.zeros_like(chunks[..., places[0]])
    for plane, place in enumerate(places):
        fields |= (chunks[..., place] >> shift & 1) << plane
    return fields ^ 32


def _rows_and_ks() -> tuple[Tensor, Tensor]:
    """Row and k of every code of a chunk, [4096] each: rows first, k along them."""
    code = torch.arange(CHUNK_ROWS * GROUP_SIZE)
    return code // GROUP_SIZE, code % GROUP_SIZE


def _byte_of(row: Tensor, q: Tensor, word: Tensor, byte: Tensor) -> Tensor:
    """Where a byte of one of the twelve words lies that lane 4 (row % 8) + q has of the row's half."""
    lane = 4 * (row % 8) + q
    return (3 * (row // 16) + word // 4) * 512 + lane * 16 + word % 4 * 4 + byte


@cache
def _byte_places() -> tuple[Tensor, ...]:
    row, k = _rows_and_ks()
    i, q, byte = 4 * (k // 64) + k % 16 // 4, k % 64 // 16, k % 4
    register = 4 * (i // 2) + 2 * (i % 2) + row // 8 % 2
    upper, lower = _byte_of(row, q, register // 2, byte), _byte_of(row, q, 8 + register // 4, byte)
    return upper, (4 * (1 - register % 2)).to(torch.uint8), lower, (2 * (register % 4)).to(torch.uint8)


@cache
def _plane_places() -> tuple[Tensor, Tensor]:
    row, k = _rows_and_ks()
    words = [2 * plane + row // 8 % 2 for plane in range(6)]
    places = torch.stack([_byte_of(row, k // 32, word, k % 32 // 8) for word in words])
    return places, (k % 8).to(torch.uint8)
