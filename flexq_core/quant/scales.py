"""Which scale a group takes, and its codes under a scale.

    absmax   s = max|group| / (2^(b-1) - 1): nothing is clipped
    mse      the s = c * absmax, c in FACTORS, with the least squared error  sum_k (x_k - s q_k)^2
    output   the same with the least error of the layer's output,  sum_k h_k (x_k - s q_k)^2, h_k the mean square of the layer's
             input channel k on a calibration text: what rounding errors do that are independent from channel to channel

A scale is rounded to the type it is stored in before codes are computed from it, also in the search: the error that is compared
is the error that will be. The format does not change: a reader of codes and scales need not know how they were chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexq_core.quant.spec import code_limits

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_LARGEST = 65504.0
FACTORS = tuple(hundredths / 100 for hundredths in range(105, 69, -1) if hundredths != 100)
"""Scales tried beside absmax, as factors of it: below one a group's largest values are clipped; a little above one its codes may
happen to fall better."""
_CHUNK_ELEMENTS = 1 << 20
"""Weights searched at once: what the search holds besides the weights is a few times this, whatever the layer's size."""


def absmax_scales(groups: Tensor, bits: int) -> Tensor:
    """Scale of each group under which nothing is clipped: [..., G, group_size] float32 → [..., G] float32."""
    absmax = groups.abs().amax(-1)
    # A divisor on the device: torch turns division by a Python number into a multiplication on CUDA, one bit off.
    return absmax / absmax.new_full((), code_limits(bits)[1])


def as_stored(scales: Tensor) -> Tensor:
    """The scales as float16 in its normal range; zero, the scale of an all-zero group, stays zero."""
    return torch.where(scales > 0, scales.clamp(FP16_SMALLEST_NORMAL, FP16_LARGEST), scales).to(torch.float16)


def rounded(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes of groups [..., G, group_size] under float32 scales [..., G], as floating-point numbers."""
    # A zero scale means an all-zero group: dividing by one instead gives its codes, zero, and never 0/0.
    divisor = torch.where(scales > 0, scales, 1.0)[..., None]
    return (groups / divisor).round_().clamp_(*code_limits(bits))


def least_error_scales(groups: Tensor, absmax: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The scale of each group, of absmax and FACTORS times it, whose error is least: [N, G] float16.

    groups: [N, G, group_size] float32.  absmax: [N, G] float32, their `absmax_scales`.
    importance: [G, group_size] float32, a weight of each squared error, 0 to 1; None for one everywhere.
    No group's error is larger than under absmax: a factor counts as better only by more than what float32 may err by.
    """
    margin = 1 + (groups.shape[-1] + 8) * torch.finfo(torch.float32).eps
    best = as_stored(absmax)
    rows = max(1, _CHUNK_ELEMENTS // groups[0].numel()) if len(groups) else 1
    for chunk, scale, chosen in zip(groups.split(rows), absmax.split(rows), best.split(rows), strict=True):
        least = _errors(chunk, chosen.float(), bits, importance)
        for factor in FACTORS:
            tried = as_stored(scale * factor)
            error = _errors(chunk, tried.float(), bits, importance)
            better = error * margin < least
            least = torch.where(better, error, least)
            chosen.copy_(torch.where(better, tried, chosen))
    return best


def _errors(groups: Tensor, scales: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    error = rounded(groups, scales, bits).mul_(scales[..., None]).sub_(groups).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)
