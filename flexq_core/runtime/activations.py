"""Activations quantised ahead of the layer that reads them, alone or fused with the operation before it, as torch ops.

In a transformer block what feeds a linear layer is a norm, an activation function or an attention output. Quantised there,
its result goes from one kernel to the next as codes and scales and never as floating-point numbers. Each op equals the
operation followed by `quantize_groups`; `w6ax_linear_quantized` is the layer's product.

Codes and scales travel as one opaque tensor of bytes, *records*, in the order that the layer's backend reads:

    reference     [M, G * (group_size + 4)] uint8, any device: a token's codes, then its float32 scales
    a CUDA kernel [bytes] uint8: see kernels/cuda/layout.cuh; `auto` is the kernel that `cuda.backend_for` names

The other backends quantise for themselves. The ops work under torch.compile without a graph break, and wait for nothing on a
GPU, so that a CUDA graph can capture them; there they are compiled anew for each number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flexq_core.quant.quantize import quantize_groups
from flexq_core.quant.spec import group_count
from flexq_core.runtime import cuda, ops

BACKENDS = ("reference", *cuda.BACKENDS)
"""Those that read records."""


class Reader(NamedTuple):
    """The layer for which activations are quantised, as far as their records depend on it.

    activation_bits: 2 to 8.  backend: one of BACKENDS.  outputs: N, by which `auto` chooses.  group_size: codes a scale.
    """

    activation_bits: int
    backend: str
    outputs: int
    group_size: int


def quantize_activation(x: Tensor, reader: Reader) -> Tensor:
    """Records of x [M, K] float32, float16 or bfloat16.

    Raises TypeError or ValueError for what does not fit, and, on the `reference` backend, for an x that is not finite.
    """
    _require_rows(x)
    return _quantize_activation(x, *reader)


def relu_quantize(x: Tensor, reader: Reader) -> Tensor:
    """Records of `torch.relu(x)`: x [M, K]; as `quantize_activation`."""
    _require_rows(x)
    return _relu_quantize(x, *reader)


def silu_mul_quantize(gate: Tensor, up: Tensor, reader: Reader) -> Tensor:
    """Records of `F.silu(gate) * up`: both [M, K] of one type, rows may lie apart; as `quantize_activation`."""
    _require_rows(gate, up=up)
    return _silu_mul_quantize(gate, up, *reader)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, reader: Reader, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Records of LLaMA's RMSNorm of h = x + residual, and h.

    x: [M, K].  weight: [K] and residual: [M, K] or None, of x's type.  h is x itself where there is no residual.
    Raises as `quantize_activation`.
    """
    _require_rows(x, weight, residual=residual)
    records, total = _norm_quantize(x, residual, weight, None, eps, False, *reader)
    return records, x if residual is None else total


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, reader: Reader, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_quantize`, of `F.layer_norm`; bias: [K] or None."""
    _require_rows(x, weight, bias, residual=residual)
    records, total = _norm_quantize(x, residual, weight, bias, eps, True, *reader)
    return records, x if residual is None else total


def w6ax_linear_quantized(
    records: Tensor,
    tokens: int,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_exponent: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    dtype: torch.dtype,
    reader: Reader,
) -> Tensor:
    """A layer's product with activations that are quantised already.

    records: of [tokens, K], for this very reader.  weight: canonical, with weight_scale, for `reference`; for a kernel its
    chunks, with None.  The rest as for `ops.w6ax_linear`.  Returns [tokens, N] in dtype.
    Raises ValueError for records of other sizes.
    """
    operands = (weight, weight_scale, weight_exponent, bias, weight_bits, dtype)
    return _w6ax_linear_quantized(records, tokens, *operands, *reader)


def norm_linear(
    x: Tensor,
    norm: cuda.Norm,
    chunks: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    activation_bits: int,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A layer's product with the norm of h = x + residual, and h, of one token: for `imma` nothing is quantised ahead.

    x: [1, K] float16 or bfloat16.  residual: [1, K], or None, then h is x itself.  The rest as for `cuda.linear_of_row`.
    Returns [1, N] and [1, K] of x's type.
    """
    y, total = _norm_linear(x, residual, *norm, chunks, weight_exponent, bias, activation_bits)
    return y, x if residual is None else total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers computes it: [..., K] normalised in float32, rounded to x's type, times weight."""
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return weight * values.to(x.dtype)


def _require_rows(x: Tensor, *parameters: Tensor | None, **alike: Tensor | None) -> None:
    """Raise ValueError unless x is [M, K], a norm's parameters are [K], and what goes with x has its shape."""
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: [M, K]")
    for name, tensor in zip(("weight", "bias"), parameters, strict=False):
        if tensor is not None and tensor.shape != x.shape[1:]:
            raise ValueError(f"the norm's {name} has shape {tuple(tensor.shape)}; accepted: {tuple(x.shape[1:])}")
    for name, tensor in alike.items():
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: {tuple(x.shape)}, as x has")


def _quantize(x: Tensor, activation_bits: int, group_size: int) -> Tensor:
    """Records for `reference`."""
    quantized = quantize_groups(x, bits=activation_bits, group_size=group_size)
    return torch.cat((quantized.codes.view(torch.uint8), quantized.scales.view(torch.uint8)), dim=1)


def _kernel(backend: str, tokens: int, features: int, outputs: int, device: torch.device) -> str:
    """The kernel that reads the records; the same for the quantiser and the product, which knows only whole groups."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; accepted for records: {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if device.type != "cuda":
        raise ValueError(f"backend is 'auto' for records on {device}; accepted there: reference")
    return cuda.backend_for(int(tokens), int(group_count(features) * cuda.GROUP_SIZE), int(outputs), device)


def _records_shape(tokens, features, device, activation_bits, backend, outputs, group_size) -> tuple[int, ...]:
    kernel = _kernel(backend, tokens, features, outputs, device)
    if kernel == "reference":
        return tokens, group_count(features, group_size) * (group_size + 4)
    return (cuda.record_bytes(int(tokens), int(features), int(activation_bits), kernel, device),)


def _empty_records(x: Tensor, *reader) -> Tensor:
    return x.new_empty(_records_shape(*x.shape, x.device, *reader), dtype=torch.uint8)


def _operator(fake: Callable) -> Callable[[Callable], Callable]:
    """Make a function the op of its name. Where nobody traces it is called as it is; see `ops.direct`."""

    def define(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        declared = torch.library.custom_op(f"flexq::{name}", function, mutates_args=())
        declared.register_fake(fake)
        ops.for_inference(declared)
        operator = getattr(torch.ops.flexq, name)

        def run(first: Tensor, *operands):
            return (function if ops.direct(first, *operands) else operator)(first, *operands)

        return run

    return define


def _same_records(x, *rest):
    return _empty_records(x, *rest[-4:])


@_operator(fake=_same_records)
def _quantize_activation(x: Tensor, activation_bits: int, backend: str, outputs: int, group_size: int) -> Tensor:
    kernel = _kernel(backend, *x.shape, outputs, x.device)
    if kernel == "reference":
        return _quantize(x, activation_bits, group_size)
    return cuda.quantize_activation(x, activation_bits, kernel)


@_operator(fake=_same_records)
def _relu_quantize(x: Tensor, activation_bits: int, backend: str, outputs: int, group_size: int) -> Tensor:
    kernel = _kernel(backend, *x.shape, outputs, x.device)
    if kernel == "reference":
        return _quantize(torch.relu(x), activation_bits, group_size)
    return cuda.relu_quantize(x, activation_bits, kernel)


@_operator(fake=_same_records)
def _silu_mul_quantize(
    gate: Tensor, up: Tensor, activation_bits: int, backend: str, outputs: int, group_size: int
) -> Tensor:
    kernel = _kernel(backend, *gate.shape, outputs, gate.device)
    if kernel == "reference":
        # A processor's SiLU of rows that lie apart is scalar, and may differ in the last bit.
        return _quantize(F.silu(gate.contiguous()) * up, activation_bits, group_size)
    return cuda.silu_mul_quantize(gate, up, activation_bits, kernel)


def _norm_records(x, residual, weight, bias, eps, centred, *reader):
    return _empty_records(x, *reader), x.new_empty(0) if residual is None else x.new_empty(x.shape)


@_operator(fake=_norm_records)
def _norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    activation_bits: int,
    backend: str,
    outputs: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    kernel = _kernel(backend, *x.shape, outputs, x.device)
    nothing = x.new_empty(0)  # an op may not return what it was given
    if kernel != "reference":
        parameters = (weight, bias, eps) if centred else (weight, eps)
        fused = cuda.layer_norm_quantize if centred else cuda.rms_norm_quantize
        found = fused(x, *parameters, activation_bits, kernel, residual=residual)
        return (found, nothing) if residual is None else found
    h = x if residual is None else residual + x
    normal = F.layer_norm(h, h.shape[-1:], weight, bias, eps) if centred else rms_norm(h, weight, eps)
    return _quantize(normal, activation_bits, group_size), nothing if residual is None else h


def _product(records, tokens, weight, weight_scale, weight_exponent, bias, weight_bits, dtype, *reader):
    return records.new_empty(tokens, weight_exponent.shape[0], dtype=dtype)


@_operator(fake=_product)
def _w6ax_linear_quantized(
    records: Tensor,
    tokens: int,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_exponent: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    dtype: torch.dtype,
    activation_bits: int,
    backend: str,
    outputs: int,
    group_size: int,
) -> Tensor:
    groups = weight.shape[1] if weight_scale is None else weight_scale.shape[1]
    reader = (activation_bits, backend, outputs, group_size)
    shape = _records_shape(tokens, groups * group_size, records.device, *reader)
    if tuple(records.shape) != shape:
        raise ValueError(
            f"records have shape {tuple(records.shape)}; accepted: {shape} for {tokens} tokens of {groups} groups, "
            f"quantised to {activation_bits} bits for backend {backend!r}"
        )
    kernel = _kernel(backend, tokens, groups * group_size, outputs, records.device)
    if kernel == "reference":
        codes, scales = records.split((groups * group_size, groups * 4), dim=1)
        codes, scales = codes.view(torch.int8), scales.contiguous().view(torch.float32)
        return ops.reference_product(codes, scales, weight, weight_scale, weight_exponent, bias, weight_bits).to(dtype)
    out = records.new_empty(tokens, outputs, dtype=dtype)
    if tokens:
        cuda.linear(records, tokens, weight, weight_exponent, bias, activation_bits, kernel, out)
    return out


def _product_and_sum(x, residual, weight, norm_bias, eps, centred, chunks, weight_exponent, bias, activation_bits):
    return x.new_empty(1, weight_exponent.shape[0]), x.new_empty(0) if residual is None else x.new_empty(x.shape)


@_operator(fake=_product_and_sum)
def _norm_linear(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    centred: bool,
    chunks: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    activation_bits: int,
) -> tuple[Tensor, Tensor]:
    norm = cuda.Norm(weight, norm_bias, eps, centred)
    y, total = cuda.linear_of_row(x, chunks, weight_exponent, bias, activation_bits, norm, residual)
    return y, x.new_empty(0) if total is None else total
