"""The constants of the format: everything that another file would otherwise decide again."""

from __future__ import annotations

GROUP_SIZE = 128
"""Consecutive elements along K that share one scale (FlexQ §3.1)."""

WEIGHT_BITS = ACTIVATION_BITS = tuple(range(2, 9))
"""What the format can hold; the paper's are 6-bit weights with 6- or 8-bit activations. What reads others: runtime/ops.py."""
SCALES = ("absmax", "mse", "output")
"""Ways to choose the scale of a group of weights (quant/scales.py)."""


def code_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest two's complement code of `bits` bits: 6 → (-32, 31)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def require_bits(bits: int, *, accepted: tuple[int, ...] = WEIGHT_BITS, what: str = "bits") -> None:
    """Raise ValueError unless `bits` is one of `accepted`."""
    if bits not in accepted or isinstance(bits, bool):
        raise ValueError(f"{what} is {bits!r}; accepted: {', '.join(map(str, accepted))}")


def group_count(features: int, group_size: int = GROUP_SIZE) -> int:
    """Groups that cover `features` elements; the last one may be padded with zeros."""
    return -(-features // group_size)
