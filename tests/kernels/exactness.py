"""What every kernel must show. `linear` takes x, packed, scales, exponents, bias and activation bits, and returns float32."""

import numpy as np
import torch

from flexq_core.quant import pack_bit_planes, pack_codes, quantize_weight, unpack_bit_planes
from tests import reference


def equals_the_float64_oracle(linear, generator, tokens, outputs, features, activation_bits):
    weight = quantize_weight(torch.randn(outputs, features, generator=generator))
    exponents = torch.randint(-3, 4, (outputs,), generator=generator, dtype=torch.int8)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(tokens, features, generator=generator) * 3
    y = linear(x, pack_codes(weight.codes, 6), weight.scales, exponents, bias, activation_bits)
    truth = reference.linear_oracle(
        x.numpy(), weight.codes.numpy(), weight.scales.numpy(), exponents.numpy(), bias.numpy(), activation_bits
    )
    # One rounding a group and partial sum, relative to the sum of magnitudes: far below what one wrong code would do.
    bound = 4e-7 * np.sqrt(features) * np.abs(truth).max() + 1e-6
    assert np.abs(y.numpy() - truth).max() <= bound


def exact_layer(outputs, features, seed=0):
    """Random codes with power-of-two scales: every product and sum is exact in float32."""
    padded = -(-features // 128) * 128
    codes = torch.randint(-32, 32, (outputs, padded), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    scales = torch.full((outputs, padded // 128), 0.25, dtype=torch.float16)
    return codes, scales, torch.zeros(outputs, dtype=torch.int8)


def returns_every_code_bit_for_bit(linear, tokens, activation_bits):
    """One-hot activations read the weights back."""
    codes, scales, exponents = exact_layer(45, 300)
    top = 2.0 ** (activation_bits - 1) - 1
    for first in range(0, 300, tokens):
        x = torch.eye(300)[first : first + tokens] * top
        y = linear(x, pack_codes(codes, 6), scales, exponents, None, activation_bits)
        assert torch.equal(y, codes[:, first : first + len(x)].T * top / 4)


def gives_integers_for_integers(linear, tokens):
    codes, scales, exponents = exact_layer(70, 512)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (tokens, 512), generator=generator).float()
    x[:, ::128] = 127  # so that every group's scale is one
    y = linear(x, pack_codes(codes, 6), scales, exponents, None, 8)
    assert torch.equal(y.double(), x.double() @ codes.double().T / 4)


def misses_a_dropped_bit_plane(linear, tokens, plane):
    codes, scales, exponents = exact_layer(20, 256)
    planes = pack_bit_planes(codes, 6)
    planes[plane] = 0
    x = torch.eye(256)[:tokens] * 31
    y = linear(x, pack_codes(unpack_bit_planes(planes), 6), scales, exponents, None, 6)
    assert not torch.equal(y, codes[:, :tokens].T * 31.0 / 4)


def holds_the_largest_sums(linear, tokens, sign):
    codes = torch.full((17, 256), -32, dtype=torch.int8)
    scales = torch.ones(17, 2, dtype=torch.float16)
    x = torch.full((tokens, 256), 127.0 * sign)
    y = linear(x, pack_codes(codes, 6), scales, torch.zeros(17, dtype=torch.int8), None, 8)
    assert torch.equal(y, torch.full((tokens, 17), -127.0 * sign * 32 * 256))


def quantises_as_defined_at_rounding_edges(linear):
    """Halves, the largest magnitudes and subnormals: read back through an identity of unit weights."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 128, generator=generator)
    x[0] = torch.arange(-64, 64).float() / 2
    x[1] *= 1e-41
    x[2] *= 1e37
    x[3] = 0
    codes = torch.eye(128, dtype=torch.int8)
    scales = torch.ones(128, 1, dtype=torch.float16)
    for bits in (6, 8):
        y = linear(x, pack_codes(codes, 6), scales, torch.zeros(128, dtype=torch.int8), None, bits)
        q, s = reference.quantize(x.numpy(), bits)
        assert np.array_equal(y.numpy(), q.astype(np.float32) * s)
