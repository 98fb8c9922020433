"""Symmetric quantisation of groups along the last axis, and back (FlexQ §3.1; the numerics of this project).

    s = max|group| / (2^(b-1) - 1)          computed in float32, then rounded to the type it is stored in
    q = clamp(round_half_even(x / s), -2^(b-1), 2^(b-1) - 1)          an all-zero group has s = 0, q = 0

Codes are computed from the *stored* scale, so that a code and its scale belong together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexq_core.quant.spec import GROUP_SIZE, code_limits, group_count, require_bits

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_LARGEST = 65504.0
_EXPONENT_LIMITS = (-126, 127)  # 2^e must itself be a normal float32


@dataclass(frozen=True)
class Quantized:
    """Integer codes with the scales that turn them back into numbers.

    codes: [..., Kp] int8, Kp = K rounded up to a multiple of group_size; the padding is zero.
    scales: [..., Kp // group_size], float32 for activations, float16 for weights.
    bits: bits a code uses.  group_size: codes per scale.  features: K before padding.
    exponents: [N] int8 for weights, None for activations: row n is multiplied by 2**exponents[n] (see `quantize_weight`).
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    features: int
    exponents: Tensor | None = None


def quantize_groups(x: Tensor, *, bits: int, group_size: int = GROUP_SIZE) -> Quantized:
    """Symmetric round-to-nearest quantisation of each group of `group_size` along the last axis (FlexQ §3.1).

    x: [..., K] float16, bfloat16 or float32; any leading shape, also empty.  bits: 2 to 8.
    Returns codes [..., Kp] int8 in [-2**(bits-1), 2**(bits-1) - 1] and scales [..., Kp // group_size] float32,
    Kp = K rounded up to group_size, so that x ≈ (codes * scales)[..., :K].
    Raises ValueError for other bits, group_size < 1, K = 0, or a non-finite x (names the first bad index);
    TypeError for other dtypes.
    """
    require_bits(bits)
    groups = _groups(x, group_size)
    scales = _finite(_absmax_scales(groups, bits), x)
    codes = _round_to_codes(groups, scales, bits)
    return Quantized(codes.flatten(-2), scales, bits, group_size, x.shape[-1])


def quantize_weight(weight: Tensor, *, bits: int = 6, group_size: int = GROUP_SIZE) -> Quantized:
    """Quantise a weight matrix once, with scales stored as float16 (FlexQ §3.1).

    weight: [N, K] float16, bfloat16 or float32.  bits: 2 to 8.
    Returns codes [N, Kp] int8, scales [N, Kp // group_size] float16 and exponents [N] int8, so that
    weight ≈ codes * scales * 2**exponents[:, None].

    A float16 scale below 2**-14 is subnormal (it loses bits, and some hardware flushes it) and one above 65504
    overflows. A row that has such a scale is first multiplied by a power of two that brings its largest scale
    to [2**14, 2**15), and exponents[n] records it; every other row, nearly all in ordinary models, has
    exponent 0. Only a group 2**28 times smaller than the largest of its own row then still falls below: it
    takes the smallest normal scale, an error that float32 accumulation of that row cannot resolve anyway.
    Raises as `quantize_groups`, and ValueError unless weight is two-dimensional.
    """
    require_bits(bits, what="weight bits")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: [N, K]")
    groups = _groups(weight, group_size)
    exponents = _row_exponents(_finite(_absmax_scales(groups, bits), weight))
    # Two exact steps: 2**-e itself may overflow float32 for the smallest rows.
    half = exponents // 2
    groups = torch.ldexp(torch.ldexp(groups, -half[:, None, None]), (half - exponents)[:, None, None])
    scales = _absmax_scales(groups, bits)
    scales = torch.where(scales > 0, scales.clamp(min=FP16_SMALLEST_NORMAL), scales).to(torch.float16)
    codes = _round_to_codes(groups, scales.float(), bits)
    return Quantized(codes.flatten(-2), scales, bits, group_size, weight.shape[-1], exponents.to(torch.int8))


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that the codes stand for: [..., K] in `dtype`, without the padding."""
    groups = quantized.codes.unflatten(-1, (-1, quantized.group_size)).float()
    values = (groups * quantized.scales.float()[..., None]).flatten(-2)
    if quantized.exponents is not None:
        values = torch.ldexp(values, quantized.exponents.int()[:, None])
    return values[..., : quantized.features].to(dtype)


def fake_quantize(x: Tensor, *, bits: int, group_size: int = GROUP_SIZE) -> Tensor:
    """Quantise and dequantise in one step: [..., K] in x's dtype, as accuracy is simulated in the literature.

    Equal to `dequantize(quantize_groups(x))`; codes stay floating point and in place, which halves the time.
    """
    require_bits(bits)
    groups = _groups(x, group_size)
    scales = _finite(_absmax_scales(groups, bits), x)
    values = _round(groups, scales, bits).mul_(scales[..., None]).flatten(-2)
    return values[..., : x.shape[-1]].to(x.dtype)


def _groups(x: Tensor, group_size: int) -> Tensor:
    """x as float32 [..., G, group_size], zero-padded where need be; raises on what cannot be cut so."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"cannot quantise {x.dtype}; accepted: float16, bfloat16, float32")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size is {group_size!r}; accepted: an integer of at least 1")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"cannot quantise shape {tuple(x.shape)}; the last axis must hold at least one element")
    groups = group_count(x.shape[-1], group_size)
    padding = groups * group_size - x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, padding)) if padding else x.float()
    return padded.unflatten(-1, (groups, group_size))


def _finite(scales: Tensor, x: Tensor) -> Tensor:
    """The scales of x's groups, where x is finite: a NaN or an infinity is its group's largest magnitude. Raises if not."""
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(scales).all()):
        index = tuple((~torch.isfinite(x)).nonzero()[0].tolist())
        raise ValueError(f"cannot quantise non-finite values: the first is {x[index].item()} at index {index}")
    return scales


def _absmax_scales(groups: Tensor, bits: int) -> Tensor:
    absmax = groups.abs().amax(-1)
    # A divisor on the device: torch turns division by a Python number into a multiplication on CUDA, one bit off.
    return absmax / absmax.new_full((), code_limits(bits)[1])


def _round_to_codes(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    return _round(groups, scales, bits).to(torch.int8)


def _round(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes as floating-point numbers."""
    # A zero scale means an all-zero group: dividing by one instead gives its codes, zero, and never 0/0.
    divisor = torch.where(scales > 0, scales, 1.0)[..., None]
    return (groups / divisor).round_().clamp_(*code_limits(bits))


def _row_exponents(scales: Tensor) -> Tensor:
    """[N] int32: 0, or the power of two that takes a row's scales into float16's normal range."""
    largest = scales.amax(-1)
    smallest = torch.where(scales > 0, scales, torch.inf).amin(-1)
    fits = (largest == 0) | ((smallest >= FP16_SMALLEST_NORMAL) & (largest <= FP16_LARGEST))
    exponent = torch.frexp(largest).exponent - 15  # largest = m * 2^(exponent + 15) with m in [0.5, 1)
    return torch.where(fits, 0, exponent.clamp(*_EXPONENT_LIMITS)).to(torch.int32)
