"""The compiled CUDA kernels behind checked, tensor-level functions.

A layer's weights are repacked once, from the canonical rows to the chunks of kernels/cuda/layout.cuh; a call then
quantises its activations and multiplies, two launches on the current stream, or one where `takes_row`. What comes before
the layer in a transformer block (RMSNorm, LayerNorm, SiLU times up, ReLU) can be fused into the first of them:
`*_quantize`. Nothing waits for the GPU, so that calls can be captured in CUDA graphs. For the same reason a token that is
not finite raises nothing: all its outputs are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from flexq_core.quant.spec import GROUP_SIZE, WEIGHT_BITS, group_count, require_bits
from flexq_core.runtime import auto, build

ORDERS = {"imma": 0, "bmma": 1, "wgmma": 2}
"""Backend → the order of bits that its kernel reads (`Order` in layout.cuh). Weights of `imma` and `wgmma` are the same."""

BACKENDS = ("auto", *ORDERS)
"""What repacked weights may be for: a kernel, or those that `auto` chooses from."""

CHUNK_ROWS = 32
"""Outputs of a chunk of repacked weights."""

MOST_NORM_FEATURES = 16384
"""That a block keeps in registers (norm_quantize.cu)."""

MOST_ROW_GROUPS, MOST_NORM_ROW_GROUPS = 224, 64
"""Of one token, that a product quantises itself, without a norm and with one (w6ax_imma_row.cu)."""

_BEFORE = {"numbers": 1, "rms_norm": 2, "layer_norm": 3}
"""What a product of one token can begin with (`Before` in layout.cuh)."""
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TOKEN_TILES = {"imma": (1, 2, 4, 8), "bmma": (1, 2), "wgmma": (2, 4, 8, 16)}
"""Of 8 tokens, that a record of activations can hold for a backend's kernel. A block's tile is the tokens of one record; that of
`wgmma` for many tokens, 256, takes two."""
_BUILT_TOGETHER = {(6, 6), (6, 8)}
"""Bits of weights and activations that `bmma` has in the build of all kernels; others have builds of their own."""


def obstacle(device: torch.device, weight_bits: int, group_size: int, backend: str = "imma") -> str | None:
    """Why a backend's kernel cannot take such a layer, or None. Nothing is compiled."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if weight_bits != 6 and backend != "bmma":
        return f"they read 6-bit weights, not {weight_bits}-bit ones"
    if group_size != GROUP_SIZE:
        return f"they take groups of {GROUP_SIZE}, not {group_size}"
    reason = build.cuda_kernels_obstacle(device)
    if reason is None and backend == "wgmma" and torch.cuda.get_device_capability(device)[0] != 9:
        reason = f"wgmma is an instruction of Hopper cards; {torch.cuda.get_device_name(device)} is none"
    return reason


def chunk_bytes(weight_bits: int) -> int:
    """Bytes of a chunk of repacked weights: codes of one group, then float16 scales."""
    return CHUNK_ROWS * (GROUP_SIZE * weight_bits // 8 + 2)


def weight_bits_of(chunks: Tensor) -> int:
    """Bits of a weight in repacked weights, which their size tells."""
    return (chunks.shape[-1] // CHUNK_ROWS - 2) * 8 // GROUP_SIZE


def prepare(device: torch.device, backend: str, weight_bits: int, activation_bits: int) -> None:
    """Compile what a backend needs for such a layer and has not been compiled. Raises build.BuildError."""
    build.cuda_kernels(device)
    _product(device, backend, weight_bits, activation_bits)


def repack(weight: Tensor, weight_scale: Tensor, backend: str) -> Tensor:
    """Canonical packed weights and their scales in the order that a backend's kernel reads.

    weight: [N, G * 16 * weight bits] uint8 on a GPU.  weight_scale: [N, G] float16.  backend: one of BACKENDS.
    Returns [ceil(N / 32), G, chunk_bytes(weight bits)] uint8: 6.125 bits a 6-bit weight, as before, but for the padding of N.
    Raises TypeError or ValueError, before anything is launched, for weights and scales that do not fit each other or the backend.
    """
    bits = _require_repackable(weight, weight_scale, backend)
    outputs, groups = weight_scale.shape
    kernels = _kernels(weight)
    chunks = weight.new_empty(-(-outputs // CHUNK_ROWS), groups, chunk_bytes(bits))
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    if chunks.numel():
        with torch.cuda.device(weight.device):
            order, stream = ORDERS["bmma" if backend == "bmma" else "imma"], _stream(weight)
            kernels.repack(
                weight.data_ptr(), weight_scale.data_ptr(), chunks.data_ptr(), outputs, groups, bits, order, stream
            )
    return chunks


def _require_repackable(weight: Tensor, weight_scale: Tensor, backend: str) -> int:
    """Bits of a weight, which the shapes of both tell."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; accepted for repacked weights: {', '.join(BACKENDS)}")
    for name, tensor, dtype in (("weight", weight, torch.uint8), ("weight_scale", weight_scale, torch.float16)):
        if tensor.dtype != dtype or tensor.dim() != 2:
            raise TypeError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; accepted: {dtype} of 2 dimensions"
            )
    (outputs, row_bytes), (scale_rows, groups) = weight.shape, weight_scale.shape
    accepted = WEIGHT_BITS if backend == "bmma" else (6,)
    bits = next((bits for bits in accepted if row_bytes == groups * GROUP_SIZE * bits // 8), None)
    if scale_rows != outputs or groups == 0 or bits is None:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, weight_scale {tuple(weight_scale.shape)}; accepted for {backend!r}: "
            f"[N, G * 16 * bits] and [N, G] with weights of {', '.join(map(str, accepted))} bits; "
            "a layer that holds repacked weights only gives them as `canonical()`"
        )
    if weight.device.type != "cuda" or weight_scale.device != weight.device:
        raise ValueError(
            f"weight is on {weight.device}, weight_scale on {weight_scale.device}; accepted: one CUDA device"
        )
    return bits


def quantize_activation(x: Tensor, activation_bits: int, backend: str, out: Tensor | None = None) -> Tensor:
    """Codes and scales of every token and group, as records in the order that a backend's kernel reads.

    x: [M, K] float32, float16 or bfloat16 on a GPU; rows may lie apart.  activation_bits: 2 to 8.
    backend: one of ORDERS.  out: records of an earlier call of the same kind, to be overwritten, or None.
    Returns [bytes] uint8 for `linear`; see kernels/cuda/layout.cuh. A group that is not finite gets the scale NaN.
    Raises TypeError or ValueError for what does not fit, before anything is launched; says what is accepted.
    """
    _require_quantizable({"x": x}, activation_bits, backend)
    return _quantize("quantize_activation", x, (_rows(x),), activation_bits, backend, out)


def relu_quantize(x: Tensor, activation_bits: int, backend: str, out: Tensor | None = None) -> Tensor:
    """`quantize_activation(torch.relu(x))` in one launch, bit for bit (OPT's fc1 → fc2).

    x: [M, K] float32, float16 or bfloat16 on a GPU.  The rest, and what is raised, as for `quantize_activation`.
    """
    _require_quantizable({"x": x}, activation_bits, backend)
    return _quantize("relu_quantize", x, (_rows(x),), activation_bits, backend, out)


def silu_mul_quantize(
    gate: Tensor, up: Tensor, activation_bits: int, backend: str, out: Tensor | None = None
) -> Tensor:
    """`quantize_activation(F.silu(gate) * up)` in one launch (LLaMA's gate and up → down).

    gate, up: [M, K] float32, float16 or bfloat16 on a GPU, of one type; both may be views of one tensor, such as
    `gate_up.chunk(2, dim=-1)`, without a copy.  The rest, and what is raised, as for `quantize_activation`.

    SiLU is x / (1 + exp(-x)) in float32, rounded to x's type, and so is the product: torch's own definition. The
    float32 exponential may differ from torch's in its last bit where they are compiled by different CUDA releases.
    """
    _require_quantizable({"gate": gate, "up": up}, activation_bits, backend)
    return _quantize("silu_mul_quantize", gate, (_rows(gate), _rows(up)), activation_bits, backend, out)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    activation_bits: int,
    backend: str,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LLaMA's RMSNorm and `quantize_activation` of its result in one launch, with the residual addition before it.

    x: [M, K] float32, float16 or bfloat16 on a GPU, K at most 16384.  weight: [K] and residual: [M, K], of x's type.
    eps: finite, at least 0.  activation_bits, backend and out as for `quantize_activation`.
    Returns the records; with a residual (records, x + residual), the sum [M, K] rounded to x's type: it is what is
    normalised, and the residual of what follows.
    Raises TypeError or ValueError for what does not fit, before anything is launched; says what is accepted.

    As transformers rounds: h * rsqrt(mean(h^2) + eps) in float32, rounded to x's type, times weight, rounded. The mean
    is summed in another order than torch's, so that a result may be on the other side of a rounding.
    """
    return _norm_quantize("rms_norm_quantize", x, weight, None, eps, activation_bits, backend, residual, out)


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation_bits: int,
    backend: str,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.layer_norm` and `quantize_activation` of its result in one launch, with the residual addition before it (OPT).

    bias: [K] of x's type, or None.  All else as for `rms_norm_quantize`, but the result is rounded once, as torch's:
    (h - mean) * rsqrt(variance + eps) * weight + bias in float32, then x's type.
    """
    return _norm_quantize("layer_norm_quantize", x, weight, bias, eps, activation_bits, backend, residual, out)


def _norm_quantize(operation, x, weight, bias, eps, activation_bits, backend, residual, out):
    rows = {"x": x} if residual is None else {"x": x, "residual": residual}
    vectors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    _require_quantizable(rows, activation_bits, backend, vectors)
    if not 0 < x.shape[1] <= MOST_NORM_FEATURES:
        raise ValueError(f"x has {x.shape[1]} features; accepted by a fused norm: 1 to {MOST_NORM_FEATURES}")
    _require_eps(eps)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    total = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    operands = (
        _rows(x),
        None if residual is None else _rows(residual),
        total,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
    )
    records = _quantize(operation, x, operands, activation_bits, backend, out)
    return records if total is None else (records, total)


def _require_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}; accepted: a finite number, at least 0")


def _quantize(
    operation: str, x: Tensor, operands: tuple, activation_bits: int, backend: str, out: Tensor | None
) -> Tensor:
    """Run one of the kernels that end in records of x's shape, on operands in the order of its binding."""
    kernels, order = _kernels(x), ORDERS[backend]
    tokens, features = x.shape
    groups, tiles = group_count(features), token_tiles(tokens, backend)
    size = record_bytes(tokens, features, activation_bits, backend, x.device)
    if out is None:
        out = torch.empty(size, dtype=torch.uint8, device=x.device)
    else:
        _require_records(out, size, x)
    if size:
        addresses = tuple(_address(each) if each is None or isinstance(each, Tensor) else each for each in operands)
        records = (out.data_ptr(), tokens, features, groups, tiles, activation_bits, order)
        with torch.cuda.device(x.device):
            getattr(kernels, operation)(*addresses, _FLOATS[x.dtype], records, _stream(x))
    return out


def record_bytes(tokens: int, features: int, activation_bits: int, backend: str, device: torch.device) -> int:
    """Bytes of the records of [tokens, features]; nothing is launched."""
    tiles = token_tiles(tokens, backend)
    record = build.cuda_kernels(device).record_bytes(ORDERS[backend], activation_bits, tiles)
    return -(-tokens // (8 * tiles)) * group_count(features) * record


def _rows(x: Tensor) -> Tensor:
    """x with each row's numbers side by side; the rows stay where they are."""
    return x if x.stride(1) == 1 else x.contiguous()


def _address(rows: Tensor | None) -> tuple[int, int]:
    """Of the first row, and how many numbers lie from one row to the next."""
    return (0, 0) if rows is None else (rows.data_ptr(), rows.stride(0))


def _require_quantizable(
    rows: dict[str, Tensor], activation_bits: int, backend: str, vectors: dict[str, Tensor] | None = None
) -> None:
    """Check what a kernel that quantises is given: the first of `rows` says what all others must match."""
    if backend not in ORDERS:
        raise ValueError(f"backend is {backend!r}; accepted for records: {', '.join(ORDERS)}")
    require_bits(activation_bits, what="activation bits")
    first, x = next(iter(rows.items()))
    if x.dtype not in _FLOATS or x.dim() != 2:
        raise TypeError(
            f"{first} is {x.dtype} of shape {tuple(x.shape)}; accepted: [M, K] float32, float16 or bfloat16"
        )
    for name, tensor in {**rows, **(vectors or {})}.items():
        shape = tuple(x.shape) if name in rows else (x.shape[1],)
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, {first} {x.dtype}; accepted: one type")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; accepted: {shape} for {first} of {tuple(x.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {x.device}; accepted: one device")
    if x.device.type != "cuda":
        raise ValueError(f"{first} is on {x.device}; accepted: a CUDA device")


def _require_records(out: Tensor, size: int, x: Tensor) -> None:
    if out.dtype != torch.uint8 or tuple(out.shape) != (size,) or not out.is_contiguous():
        contiguous = "" if out.is_contiguous() else ", not contiguous"
        raise ValueError(f"out is {out.dtype} of shape {tuple(out.shape)}{contiguous}; accepted: [{size}] torch.uint8")
    if out.device != x.device:
        raise ValueError(f"out is on {out.device}, x on {x.device}; accepted: one device")
    _require_aligned("out", out)


def _require_aligned(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % 16:
        raise ValueError(
            f"{name} starts at an address of {tensor.data_ptr() % 16} modulo 16; accepted: a multiple of 16"
        )


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

    records: `quantize_activation` of [tokens, K], or what a fused `*_quantize` returns.  chunks: `repack` for the same
    backend.  weight_exponent: [N] int8.  bias: [N] or None.  out: [tokens, N] float32, float16 or bfloat16, contiguous; returned.
    Raises ValueError for weights of no group, and for records, chunks or an `out` that do not begin at a multiple of 16 bytes,
    as new tensors do: they are read and written in vectors.
    """
    if not chunks.shape[1]:
        raise ValueError(f"chunks have shape {tuple(chunks.shape)}; accepted: weights of at least one group")
    for name, tensor in (("records", records), ("chunks", chunks), ("out", out)):
        _require_aligned(name, tensor)
    weight_exponent = weight_exponent.contiguous()
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device(out.device):
        _product(out.device, backend, weight_bits_of(chunks), activation_bits).linear(
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


def takes_row(tokens: int, features: int, dtype: torch.dtype, *, norm: bool = False) -> bool:
    """Whether `imma`'s product can begin with the quantisation of such activations, or with their norm; see `linear_of_row`."""
    return (
        tokens == 1
        and dtype in (torch.float16, torch.bfloat16)
        and features % 4 == 0
        and 0 < group_count(features) <= (MOST_NORM_ROW_GROUPS if norm else MOST_ROW_GROUPS)
    )


class Norm(NamedTuple):
    """RMSNorm as LLaMA has it, or LayerNorm.

    weight: [K].  bias: [K] or None, as it is of RMSNorm.  eps: finite, at least 0.  centred: LayerNorm.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


def linear_of_row(
    x: Tensor,
    chunks: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    activation_bits: int,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One token's norm, quantisation and product in one launch, where `takes_row`; chunks for `imma`.

    x, and residual or None: [1, K] float16 or bfloat16 on a GPU.  norm: of x's type, or None.  The rest as for `linear`.
    Returns y [1, N] in x's type, and x + residual, rounded to it, or None. The norm's sum is in another order than
    `rms_norm_quantize`'s and `layer_norm_quantize`'s, all else is as theirs.
    Raises TypeError or ValueError for what does not fit, before anything is launched; says what is accepted.
    """
    rows = {"x": x} if residual is None else {"x": x, "residual": residual}
    vectors = {} if norm is None else {"weight": norm.weight} | ({} if norm.bias is None else {"bias": norm.bias})
    _require_quantizable(rows, activation_bits, "imma", vectors)
    outputs, groups = len(weight_exponent), chunks.shape[1]
    if not takes_row(*x.shape, x.dtype, norm=norm is not None) or groups != group_count(x.shape[1]):
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, for weights of {groups} groups; accepted: one token in half "
            f"precision, of a multiple of 4 features in up to {MOST_ROW_GROUPS} groups, with a norm {MOST_NORM_ROW_GROUPS}"
        )
    _require_aligned("chunks", chunks)
    if norm is None and residual is not None:
        raise ValueError("a residual is added before a norm; accepted without one: None")
    if norm is not None:
        _require_eps(norm.eps)
        if norm.bias is not None and not norm.centred:
            raise ValueError("the norm has a bias and is not centred; accepted for RMSNorm: None")
    x, residual, weight, shift = (
        None if each is None else _vectors(each)
        for each in (x, residual, *((None, None) if norm is None else norm[:2]))
    )
    weight_exponent, bias = weight_exponent.contiguous(), None if bias is None else bias.contiguous()
    out, total = x.new_empty(1, outputs), None if residual is None else torch.empty_like(x)
    with torch.cuda.device(x.device):
        _kernels(x).linear_of_row(
            chunks.data_ptr(),
            weight_exponent.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else _FLOATS[bias.dtype],
            out.data_ptr(),
            outputs,
            groups,
            _BEFORE["numbers" if norm is None else "layer_norm" if norm.centred else "rms_norm"],
            _address(x),
            _address(residual),
            _address(total),
            0 if weight is None else weight.data_ptr(),
            0 if shift is None else shift.data_ptr(),
            0.0 if norm is None else norm.eps,
            _FLOATS[x.dtype],
            x.shape[1],
            activation_bits,
            _stream(x),
        )
    return out, total


def _vectors(x: Tensor) -> Tensor:
    """x, or a copy, of which each four neighbouring numbers lie in one aligned vector."""
    x = x.contiguous()
    return x if x.data_ptr() % (4 * x.itemsize) == 0 else x.clone()


def w6ax_linear(
    x: Tensor, chunks: Tensor, weight_exponent: Tensor, bias: Tensor | None, activation_bits: int, backend: str
) -> Tensor:
    """[M, K] times repacked weights → [M, N] in x's dtype, on operands that `ops` has checked; `auto` is `backend_for`."""
    tokens, outputs = x.shape[0], weight_exponent.shape[0]
    if not (tokens and outputs):
        return x.new_empty(tokens, outputs)
    if backend == "auto":
        backend = backend_for(*x.shape, outputs, x.device)
    if backend == "imma" and takes_row(*x.shape, x.dtype):
        return linear_of_row(x, chunks, weight_exponent, bias, activation_bits)[0]
    records, out = quantize_activation(x, activation_bits, backend), x.new_empty(tokens, outputs)
    linear(records, tokens, chunks, weight_exponent, bias, activation_bits, backend, out)
    return out


@lru_cache(maxsize=4096)
def backend_for(tokens: int, features: int, outputs: int, device: torch.device) -> str:
    """The faster of the two kernels that read the same repacked weights, `imma` and `wgmma`; see auto.py."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "imma"
    return auto.choice(torch.cuda.get_device_name(device), tokens, outputs, features)


def token_tiles(tokens: int, backend: str) -> int:
    """How many tiles of 8 tokens a record of activations holds for a backend's kernel, of so many tokens."""
    available = _TOKEN_TILES[backend]
    return next((tiles for tiles in available if tokens <= 8 * tiles), available[-1])


def _kernels(tensor: Tensor) -> ModuleType:
    return build.cuda_kernels(tensor.device)


def _product(device: torch.device, backend: str, weight_bits: int, activation_bits: int) -> ModuleType:
    """The module whose `linear` multiplies such operands, compiled if need be."""
    if backend == "bmma" and (weight_bits, activation_bits) not in _BUILT_TOGETHER:
        return build.bit_plane_kernel(device, weight_bits)
    return build.cuda_kernels(device)


def build_ahead(bits: Iterable[tuple[int, int]], device: torch.device) -> None:
    """Compile side by side what `bmma` needs and is not in the cache: one by one it takes a minute or two.

    bits: of weights and activations.
    """
    apart = {weight_bits for weight_bits, activation_bits in set(bits) - _BUILT_TOGETHER}
    build.build_bit_plane_kernels(device, tuple(sorted(apart)))


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
