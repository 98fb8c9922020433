"""The independent oracle: FlexQ's arithmetic in NumPy, written from the definition and sharing no code with flexq_core.

Integer sums are Python/NumPy int64 and the outer sum is float64, so that its own error is negligible.
"""

from __future__ import annotations

import numpy as np


def quantize(x: np.ndarray, bits: int, group_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """float32 [M, K] → codes int64 [M, Kp], scales float32 [M, G]."""
    rows, features = x.shape
    groups = -(-features // group_size)
    padded = np.zeros((rows, groups * group_size), np.float32)
    padded[:, :features] = x
    blocks = padded.reshape(rows, groups, group_size)
    top = 2 ** (bits - 1) - 1
    scales = (np.abs(blocks).max(-1) / np.float32(top)).astype(np.float32)
    codes = np.zeros(blocks.shape, np.int64)
    alive = scales > 0
    codes[alive] = np.clip(np.rint(blocks[alive] / scales[alive][:, None]), -top - 1, top)
    return codes.reshape(rows, groups * group_size), scales


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int [N, Kp] → uint8 [N, Kp * bits / 8]: every bit placed one by one, little-endian along the row."""
    rows, features = codes.shape
    ones = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(ones.astype(np.uint8).reshape(rows, features * bits), axis=1, bitorder="little")


def linear_oracle(x, codes, scales, exponents, bias, activation_bits: int, group_size: int = 128) -> np.ndarray:
    """Y = 2^e[n] * sum_g sx[m,g] * sw[n,g] * sum_{k in g} qx[m,k] * qw[n,k] + bias[n] in float64.

    x: [M, K] float32.  codes: int [N, Kp], unpacked.  scales: [N, G].  exponents: int [N].  bias: [N] or None.
    """
    qx, sx = quantize(np.asarray(x, np.float32), activation_bits, group_size)
    groups = sx.shape[1]
    a = qx.reshape(len(qx), groups, group_size)
    w = np.asarray(codes, np.int64).reshape(len(codes), groups, group_size)
    inner = np.einsum("mgk,ngk->mng", a, w)
    outer = inner * sx.astype(np.float64)[:, None, :] * np.asarray(scales, np.float64)[None, :, :]
    y = outer.sum(-1) * np.exp2(np.asarray(exponents, np.float64))[None, :]
    return y if bias is None else y + np.asarray(bias, np.float64)[None, :]
