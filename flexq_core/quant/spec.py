"""The constants of the format: everything that another file would otherwise decide again."""

from __future__ import annotations

GROUP_SIZE = 128
"""Consecutive elements along K that share one scale (FlexQ §3.1)."""

WEIGHT_BITS = ACTIVATION_BITS = tuple(range(2, 9))
"""What the format can hold; the paper's are 6-bit weights with 6- or 8-bit activations. What reads others: runtime/ops.py."""
SCALES = ("absmax", "mse", "output")
"""Ways to choose the scale of a group of weights (quant/scales.py)."""
TEXTLESS_SCALES = ("absmax", "mse")
"""Those of them that need no text, for weights that are quantised as they are read."""


def code_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest two's complement code of `bits` bits: 6 → (-32, 31)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def require_bits(bits: int, *, accepted: tuple[int, ...] = WEIGHT_BITS, what: str = "bits") -> None:
    """Raise ValueError unless `bits` is one of `accepted`."""
    if bits not in accepted or isinstance(bits, bool):
        raise ValueError(f"{what} is {bits!r}; accepted: {', '.join(map(str, accepted))}")


def group_count(features: int, group_size: int = GROUP_SIZE) -> int:
    """Groups that cover `features` elements; the last one may be padded with zeros. Raises ValueError for groups of none."""
    if group_size < 1:
        raise ValueError(f"group_size is {group_size!r}; accepted: an integer of at least 1")
    return -(-features // group_size)


def divisors(number: int) -> list[int]:
    """Those of a positive number, from 1 up."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def require_whole_groups(layer: str, features: int, group_size: int, processes: int) -> None:
    """Raise ValueError, naming the layer, unless so many processes can share its inputs and each hold whole groups."""
    groups, padded = group_count(features, group_size), features % group_size
    accepted = [1] if padded else divisors(groups)
    if processes not in accepted:
        raise ValueError(
            f"layer {layer!r} has {features} inputs in {groups} groups of {group_size}, which {processes} processes cannot "
            f"share; accepted: {', '.join(map(str, accepted))}"
        )
