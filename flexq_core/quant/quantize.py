"""Symmetric quantisation of groups along the last axis, and back (FlexQ §3.1; the numerics of this project).

    s = max|group| / (2^(b-1) - 1)          computed in float32, then rounded to the type it is stored in (or see quant/scales.py)
    q = clamp(round_half_even(x / s), -2^(b-1), 2^(b-1) - 1)          an all-zero group has s = 0, q = 0

Codes are computed from the *stored* scale, so that a code and its scale belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from flexq_core.quant.scales import (
    FP16_LARGEST,
    FP16_SMALLEST_NORMAL,
    absmax_scales,
    as_stored,
    least_error_scales,
    rounded,
)
from flexq_core.quant.spec import GROUP_SIZE, SCALES, TEXTLESS_SCALES, group_count, require_bits

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
    scales = _finite(absmax_scales(groups, bits), x)
    codes = rounded(groups, scales, bits).to(torch.int8)
    return Quantized(codes.flatten(-2), scales, bits, group_size, x.shape[-1])


def quantize_weight(
    weight: Tensor,
    *,
    bits: int = 6,
    group_size: int = GROUP_SIZE,
    scales: str = "absmax",
    moments: Tensor | None = None,
) -> Quantized:
    """Quantise a weight matrix once, with scales stored as float16 (FlexQ §3.1).

    weight: [N, K] float16, bfloat16 or float32.  bits: 2 to 8.
    scales: how a group's scale is chosen, `absmax`, `mse` or `output` (quant/scales.py).
    moments: [K], the mean square of every input channel of the layer, for `output` (`runtime.calibration.input_moments`).
    Returns codes [N, Kp] int8, scales [N, Kp // group_size] float16 and exponents [N] int8, so that
    weight ≈ codes * scales * 2**exponents[:, None].

    A float16 scale below 2**-14 is subnormal (it loses bits, and some hardware flushes it) and one above 65504
    overflows. A row that has such a scale is first multiplied by a power of two that brings its largest scale
    to [2**14, 2**15), and exponents[n] records it; every other row, nearly all in ordinary models, has
    exponent 0. Only a group 2**28 times smaller than the largest of its own row then still falls below: it
    takes the smallest normal scale, an error that float32 accumulation of that row cannot resolve anyway.
    Raises as `quantize_groups`, and ValueError unless weight is two-dimensional, for another way to choose scales, and for
    moments that `output` lacks, that the others do not take, or that are not [K] finite numbers of 0 or more.
    """
    require_bits(bits, what="weight bits")
    require_scales(scales)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: [N, K]")
    importance = _importance(scales, moments, weight, group_size)
    groups = _groups(weight, group_size)
    exponents = _row_exponents(_finite(absmax_scales(groups, bits), weight))
    # Two exact steps: 2**-e itself may overflow float32 for the smallest rows.
    half = exponents // 2
    groups = torch.ldexp(torch.ldexp(groups, -half[:, None, None]), (half - exponents)[:, None, None])
    absmax = absmax_scales(groups, bits)
    stored = as_stored(absmax) if scales == "absmax" else least_error_scales(groups, absmax, bits, importance)
    codes = rounded(groups, stored.float(), bits).to(torch.int8)
    return Quantized(codes.flatten(-2), stored, bits, group_size, weight.shape[-1], exponents.to(torch.int8))


def require_scales(scales: str, accepted: tuple[str, ...] = SCALES) -> None:
    """Raise ValueError, naming the nearest, unless `scales` is an accepted way to choose scales."""
    if scales not in accepted:
        nearest = get_close_matches(str(scales), accepted, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        where = " where weights are quantised as they are read" if accepted == TEXTLESS_SCALES else ""
        raise ValueError(f"scales is {scales!r}{hint}; accepted{where}: {', '.join(accepted)}")


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
    scales = _finite(absmax_scales(groups, bits), x)
    values = rounded(groups, scales, bits).mul_(scales[..., None]).flatten(-2)
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


def _importance(scales: str, moments: Tensor | None, weight: Tensor, group_size: int) -> Tensor | None:
    """[G, group_size] float32: how much a channel's squared error counts, 1 for the most important channel of its group."""
    if (moments is None) == (scales == "output"):
        given = "no moments" if moments is None else "moments"
        raise ValueError(f"scales is {scales!r} with {given}; accepted: moments for 'output' and for no other")
    if moments is None:
        return None
    moments = moments.to(weight.device, torch.float32)
    if moments.shape != weight.shape[1:] or not bool((torch.isfinite(moments) & (moments >= 0)).all()):
        raise ValueError(
            f"moments have shape {tuple(moments.shape)}; accepted: [{weight.shape[1]}], one finite number of 0 or more for "
            "every input channel"
        )
    groups = _groups(moments, group_size)
    return groups / groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _finite(scales: Tensor, x: Tensor) -> Tensor:
    """The scales of x's groups, where x is finite: a NaN or an infinity is its group's largest magnitude. Raises if not."""
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(scales).all()):
        index = tuple((~torch.isfinite(x)).nonzero()[0].tolist())
        raise ValueError(f"cannot quantise non-finite values: the first is {x[index].item()} at index {index}")
    return scales


def _row_exponents(scales: Tensor) -> Tensor:
    """[N] int32: 0, or the power of two that takes a row's scales into float16's normal range."""
    largest = scales.amax(-1)
    smallest = torch.where(scales > 0, scales, torch.inf).amin(-1)
    fits = (largest == 0) | ((smallest >= FP16_SMALLEST_NORMAL) & (largest <= FP16_LARGEST))
    exponent = torch.frexp(largest).exponent - 15  # largest = m * 2^(exponent + 15) with m in [0.5, 1)
    return torch.where(fits, 0, exponent.clamp(*_EXPONENT_LIMITS)).to(torch.int32)
