"""The compiled CUDA kernels behind checked, tensor-level functions.

A layer's weights are repacked once, from the canonical rows to the chunks of kernels/cuda/layout.cuh; a call then
quantises its activations and multiplies, two launches on the current stream. Nothing waits for the GPU, so that calls
can be captured in CUDA graphs. For the same reason a token that is not finite raises nothing: all its outputs are NaN.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from flexq_core.quant.spec import GROUP_SIZE
from flexq_core.runtime import auto, build

ORDERS = {"imma": 0, "bmma": 1, "wgmma": 2}
"""Backend → the order of bits that its kernel reads (`Order` in layout.cuh). Weights of `imma` and `wgmma` are the same."""

CHUNK_ROWS, CHUNK_BYTES = 32, 32 * GROUP_SIZE * 6 // 8 + 32 * 2
"""Outputs of a chunk of repacked weights, and its bytes: codes of one group, then float16 scales."""

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TOKEN_TILES = {"imma": (1, 2, 4, 8), "bmma": (1, 2), "wgmma": (2, 4, 8, 16)}
"""Of 8 tokens, that a block of a backend's kernel can compute at once."""


def obstacle(device: torch.device, weight_bits: int, group_size: int, backend: str = "imma") -> str | None:
    """Why a backend's kernel cannot take such a layer, or None. Nothing is compiled."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if weight_bits != 6:
        return f"they read 6-bit weights, not {weight_bits}-bit ones"
    if group_size != GROUP_SIZE:
        return f"they take groups of {GROUP_SIZE}, not {group_size}"
    if backend == "wgmma" and torch.cuda.get_device_capability(device)[0] != 9:
        return f"wgmma is an instruction of Hopper cards; {torch.cuda.get_device_name(device)} is none"
    return build.cuda_kernels_obstacle(device)


def repack(weight: Tensor, weight_scale: Tensor, backend: str) -> Tensor:
    """Canonical packed weights and their scales in the order that a backend's kernel reads.

    weight: [N, G * 96] uint8 on a GPU.  weight_scale: [N, G] float16.  backend: one of ORDERS, or `auto`.
    Returns [ceil(N / 32), G, 3136] uint8: 6.125 bits a weight, as before, but for the padding of N.
    """
    outputs, groups = weight_scale.shape
    kernels = _kernels(weight)
    chunks = weight.new_empty(-(-outputs // CHUNK_ROWS), groups, CHUNK_BYTES)
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    if chunks.numel():
        with torch.cuda.device(weight.device):
            order, stream = ORDERS["bmma" if backend == "bmma" else "imma"], _stream(weight)
            kernels.repack(
                weight.data_ptr(), weight_scale.data_ptr(), chunks.data_ptr(), outputs, groups, order, stream
            )
    return chunks


def quantize_activation(x: Tensor, activation_bits: int, backend: str) -> Tensor:
    """Codes and scales of every token and group, as records in the order that a backend's kernel reads.

    x: [M, K] float32, float16 or bfloat16 on a GPU.  Returns [bytes] uint8; see kernels/cuda/layout.cuh.
    """
    kernels = _kernels(x)
    tokens, features = x.shape
    groups, tiles = -(-features // GROUP_SIZE), token_tiles(tokens, backend)
    record = kernels.record_bytes(ORDERS[backend], activation_bits, tiles)
    records = torch.empty(-(-tokens // (8 * tiles)) * groups * record, dtype=torch.uint8, device=x.device)
    x = x.contiguous()
    with torch.cuda.device(x.device):
        kernels.quantize_activation(
            x.data_ptr(),
            _FLOATS[x.dtype],
            records.data_ptr(),
            tokens,
            features,
            groups,
            activation_bits,
            tiles,
            ORDERS[backend],
            _stream(x),
        )
    return records


def linear(
    records: Tensor,
    tokens: int,
    chunks: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    activation_bits: int,
    backend: str,
    out: Tensor,
) -> Tensor:
    """The product alone: quantised activations times repacked weights, into `out`.

    records: `quantize_activation` of [tokens, K].  chunks: `repack` for the same backend.  weight_exponent: [N] int8.
    bias: [N] or None.  out: [tokens, N] float32, float16 or bfloat16, contiguous; returned.
    """
    weight_exponent = weight_exponent.contiguous()
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device(out.device):
        _kernels(out).linear(
            chunks.data_ptr(),
            weight_exponent.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else _FLOATS[bias.dtype],
            records.data_ptr(),
            out.data_ptr(),
            _FLOATS[out.dtype],
            tokens,
            out.shape[1],
            chunks.shape[1],
            token_tiles(tokens, backend),
            activation_bits,
            ORDERS[backend],
            _stream(out),
        )
    return out


def w6ax_linear(
    x: Tensor, chunks: Tensor, weight_exponent: Tensor, bias: Tensor | None, activation_bits: int, backend: str
) -> Tensor:
    """[M, K] times repacked weights → [M, N] in x's dtype, on operands that `ops` has checked; `auto` is `backend_for`."""
    out = x.new_empty(x.shape[0], weight_exponent.shape[0])
    if out.numel():
        if backend == "auto":
            backend = backend_for(*x.shape, out.shape[1], x.device)
        records = quantize_activation(x, activation_bits, backend)
        linear(records, x.shape[0], chunks, weight_exponent, bias, activation_bits, backend, out)
    return out


@lru_cache(maxsize=4096)
def backend_for(tokens: int, features: int, outputs: int, device: torch.device) -> str:
    """The faster of the two kernels that read the same repacked weights, `imma` and `wgmma`; see auto.py."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "imma"
    return "wgmma" if tokens >= auto.wgmma_from(torch.cuda.get_device_name(device), outputs, features) else "imma"


def token_tiles(tokens: int, backend: str) -> int:
    """How many tiles of 8 tokens a block of a backend's kernel computes at once, for so many tokens."""
    available = _TOKEN_TILES[backend]
    return next((tiles for tiles in available if tokens <= 8 * tiles), available[-1])


def _kernels(tensor: Tensor) -> ModuleType:
    return build.cuda_kernels(tensor.device)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
