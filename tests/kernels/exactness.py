"""What every kernel must show. `linear` takes x, packed, scales, exponents, bias and activation bits, and returns float32.

Weights have six bits where none are given.
"""

import numpy as np
import torch

from flexq_core.quant import pack_bit_planes, pack_codes, quantize_weight, unpack_bit_planes
from tests import reference


def equals_the_float64_oracle(linear, generator, tokens, outputs, features, activation_bits, weight_bits=6):
    weight = quantize_weight(torch.randn(outputs, features, generator=generator), bits=weight_bits)
    exponents = torch.randint(-3, 4, (outputs,), generator=generator, dtype=torch.int8)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(tokens, features, generator=generator) * 3
    y = linear(x, pack_codes(weight.codes, weight_bits), weight.scales, exponents, bias, activation_bits)
    truth = reference.linear_oracle(
        x.numpy(), weight.codes.numpy(), weight.scales.numpy(), exponents.numpy(), bias.numpy(), activation_bits
    )
    # One rounding a group and partial sum, relative to the sum of magnitudes: far below what one wrong code would do.
    bound = 4e-7 * np.sqrt(features) * np.abs(truth).max() + 1e-6
    assert np.abs(y.numpy() - truth).max() <= bound


def exact_layer(outputs, features, bits=6, seed=0, device="cpu"):
    """Random codes with power-of-two scales: every product and sum is exact in float32."""
    padded = -(-features // 128) * 128
    most, generator = 2 ** (bits - 1), torch.Generator(device).manual_seed(seed)
    codes = torch.randint(-most, most, (outputs, padded), dtype=torch.int8, generator=generator, device=device)
    scales = torch.full((outputs, padded // 128), 0.25, dtype=torch.float16, device=device)
    return codes, scales, torch.zeros(outputs, dtype=torch.int8, device=device)


def returns_every_code_bit_for_bit(linear, tokens, activation_bits, weight_bits=6):
    """One-hot activations read the weights back."""
    codes, scales, exponents = exact_layer(45, 300, weight_bits)
    top = 2.0 ** (activation_bits - 1) - 1
    for first in range(0, 300, tokens):
        x = torch.eye(300)[first : first + tokens] * top
        y = linear(x, pack_codes(codes, weight_bits), scales, exponents, None, activation_bits)
        assert torch.equal(y, codes[:, first : first + len(x)].T * top / 4)


def gives_integers_for_integers(linear, tokens, activation_bits=8, weight_bits=6):
    codes, scales, exponents = exact_layer(70, 512, weight_bits)
    x = integers(tokens, 512, activation_bits)
    y = linear(x, pack_codes(codes, weight_bits), scales, exponents, None, activation_bits)
    assert torch.equal(y.double(), x.double() @ codes.double().T / 4)


def integers(tokens, features, activation_bits, device="cpu"):
    """[tokens, features] float32, their own codes: every group has the largest of them, so that its scale is one."""
    generator, top = torch.Generator(device).manual_seed(1), 2 ** (activation_bits - 1) - 1
    x = torch.randint(-top, top + 1, (tokens, features), generator=generator, device=device).float()
    x[:, ::128] = top
    return x


def integers_and_bias(tokens, features, outputs, device="cpu"):
    """(x, packed, scales, exponents), sums and bias on a device, the latter two float32: for activations of 8 bits.

    Sums are integers times powers of two, exact in float32: adding the bias, of whatever type, rounds once. All of it is made
    on the device: a processor takes seconds for the largest.
    """
    codes, scales, _ = exact_layer(outputs, features, device=device)
    x, generator = integers(tokens, features, 8, device), torch.Generator(device).manual_seed(2)
    exponents = torch.randint(-6, 1, (outputs,), generator=generator, dtype=torch.int8, device=device)
    bias = torch.randn(outputs, generator=generator, device=device) * 100
    sums = x.double() @ codes[:, :features].double().T * torch.exp2(exponents.double() - 2)
    return (x, pack_codes(codes, 6), scales, exponents), sums.float(), bias


def misses_a_dropped_bit_plane(linear, tokens, plane, activation_bits=6, weight_bits=6):
    codes, scales, exponents = exact_layer(20, 256, weight_bits)
    planes = pack_bit_planes(codes, weight_bits)
    planes[plane] = 0
    top = 2.0 ** (activation_bits - 1) - 1
    x = torch.eye(256)[:tokens] * top
    y = linear(x, pack_codes(unpack_bit_planes(planes), weight_bits), scales, exponents, None, activation_bits)
    assert not torch.equal(y, codes[:, :tokens].T * top / 4)


def holds_the_largest_sums(linear, tokens, sign, activation_bits=8, weight_bits=6):
    least, top = -(2 ** (weight_bits - 1)), 2.0 ** (activation_bits - 1) - 1
    codes = torch.full((17, 256), least, dtype=torch.int8)
    scales = torch.ones(17, 2, dtype=torch.float16)
    x = torch.full((tokens, 256), top * sign)
    exponents = torch.zeros(17, dtype=torch.int8)
    y = linear(x, pack_codes(codes, weight_bits), scales, exponents, None, activation_bits)
    assert torch.equal(y, torch.full((tokens, 17), top * sign * least * 256))


def quantises_as_defined_at_rounding_edges(linear, activation_bits=(6, 8)):
    """Halves, the largest magnitudes and subnormals: read back through an identity of unit weights."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 128, generator=generator)
    x[0] = torch.arange(-64, 64).float() / 2
    x[1] *= 1e-41
    x[2] *= 1e37
    x[3] = 0
    codes = torch.eye(128, dtype=torch.int8)
    scales = torch.ones(128, 1, dtype=torch.float16)
    for bits in activation_bits:
        y = linear(x, pack_codes(codes, 6), scales, torch.zeros(128, dtype=torch.int8), None, bits)
        q, s = reference.quantize(x.numpy(), bits)
        assert np.array_equal(y.numpy(), q.astype(np.float32) * s)
