"""The CPU kernel on every instruction set of this machine: exact, complete, and awake to a wrong bit."""

import numpy as np
import pytest
import torch

from flexq_core.quant import pack_bit_planes, pack_codes, quantize_weight, unpack_bit_planes
from flexq_core.runtime import build, cpu
from tests import reference

AVAILABLE, REASON = build.cpu_kernel_available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"the kernel cannot be built: {REASON}")
ISAS = cpu.available_isas() if AVAILABLE else []
TOKENS = [1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 131]


def linear(x, packed, scales, exponents, bias, activation_bits, isa):
    """Run into an output full of NaN, so that what is not written shows."""
    out = torch.full((len(x), len(packed)), torch.nan)
    y = cpu.w6ax_linear(x, packed, scales, exponents, bias, activation_bits, isa=isa, out=out)
    assert not torch.isnan(y).any()
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("outputs", "features"), [(1, 1), (37, 200), (64, 384), (33, 1030), (130, 2176)])
@pytest.mark.parametrize("activation_bits", [6, 8])
def test_equals_the_float64_oracle(isa, tokens, outputs, features, activation_bits):
    generator = torch.Generator().manual_seed(tokens * outputs)
    weight = quantize_weight(torch.randn(outputs, features, generator=generator))
    exponents = torch.randint(-3, 4, (outputs,), generator=generator, dtype=torch.int8)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(tokens, features, generator=generator) * 3
    y = linear(x, pack_codes(weight.codes, 6), weight.scales, exponents, bias, activation_bits, isa)
    truth = reference.linear_oracle(
        x.numpy(), weight.codes.numpy(), weight.scales.numpy(), exponents.numpy(), bias.numpy(), activation_bits
    )
    # One rounding a group and lane, relative to the sum of magnitudes: far below what one wrong code would do.
    bound = 4e-7 * np.sqrt(features) * np.abs(truth).max() + 1e-6
    assert np.abs(y.numpy() - truth).max() <= bound


def exact_layer(outputs, features, seed=0):
    """Random codes with power-of-two scales: every product and sum is exact in float32."""
    padded = -(-features // 128) * 128
    codes = torch.randint(-32, 32, (outputs, padded), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    scales = torch.full((outputs, padded // 128), 0.25, dtype=torch.float16)
    return codes, scales, torch.zeros(outputs, dtype=torch.int8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation_bits", [6, 8])
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 40])
def test_one_hot_activations_return_every_code_bit_for_bit(isa, activation_bits, tokens):
    codes, scales, exponents = exact_layer(45, 300)
    top = 2.0 ** (activation_bits - 1) - 1
    for first in range(0, 300, tokens):
        x = torch.eye(300)[first : first + tokens] * top
        y = linear(x, pack_codes(codes, 6), scales, exponents, None, activation_bits, isa)
        assert torch.equal(y, codes[:, first : first + len(x)].T * top / 4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [8, 48])
def test_integer_inputs_give_integer_results_bit_for_bit(isa, tokens):
    codes, scales, exponents = exact_layer(70, 512)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (tokens, 512), generator=generator).float()
    x[:, ::128] = 127  # so that every group's scale is one
    y = linear(x, pack_codes(codes, 6), scales, exponents, None, 8, isa)
    assert torch.equal(y.double(), x.double() @ codes.double().T / 4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("plane", range(6))
def test_dropping_a_bit_plane_is_caught(isa, tokens, plane):
    codes, scales, exponents = exact_layer(20, 256)
    planes = pack_bit_planes(codes, 6)
    planes[plane] = 0
    x = torch.eye(256)[:tokens] * 31
    y = linear(x, pack_codes(unpack_bit_planes(planes), 6), scales, exponents, None, 6, isa)
    assert not torch.equal(y, codes[:, :tokens].T * 31.0 / 4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [8, 32])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_sums_at_their_extremes_do_not_saturate(isa, tokens, sign):
    codes = torch.full((17, 256), -32, dtype=torch.int8)
    scales = torch.ones(17, 2, dtype=torch.float16)
    x = torch.full((tokens, 256), 127.0 * sign)
    y = linear(x, pack_codes(codes, 6), scales, torch.zeros(17, dtype=torch.int8), None, 8, isa)
    assert torch.equal(y, torch.full((tokens, 17), -127.0 * sign * 32 * 256))


@pytest.mark.parametrize("isa", ISAS)
def test_activation_codes_equal_the_definition_at_rounding_edges(isa):
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
        y = linear(x, pack_codes(codes, 6), scales, torch.zeros(128, dtype=torch.int8), None, bits, isa)
        q, s = reference.quantize(x.numpy(), bits)
        assert np.array_equal(y.numpy(), q.astype(np.float32) * s)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [3, 21])
def test_threads_do_not_change_the_result(isa, tokens):
    weight = quantize_weight(torch.randn(515, 640))
    arguments = (pack_codes(weight.codes, 6), weight.scales, weight.exponents, None, 6, isa)
    x = torch.randn(tokens, 640)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear(x, *arguments)
        torch.set_num_threads(3)
        assert torch.equal(linear(x, *arguments), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [4, 40])
def test_non_finite_activations_name_the_first_index(isa, value, tokens):
    weight = quantize_weight(torch.randn(8, 200))
    x = torch.randn(tokens, 200)
    x[3, 150] = x[2, 199] = value
    with pytest.raises(ValueError, match=r"at index \(2, 199\)"):
        linear(x, pack_codes(weight.codes, 6), weight.scales, weight.exponents, None, 6, isa)


def test_an_unknown_instruction_set_is_refused():
    weight = quantize_weight(torch.randn(8, 128))
    with pytest.raises(ValueError, match="instruction set 'sse9' is not available"):
        cpu.w6ax_linear(
            torch.randn(1, 128), pack_codes(weight.codes, 6), weight.scales, weight.exponents, None, 6, isa="sse9"
        )


def test_no_tokens_and_no_outputs():
    weight = quantize_weight(torch.randn(8, 128))
    packed = pack_codes(weight.codes, 6)
    assert cpu.w6ax_linear(torch.randn(0, 128), packed, weight.scales, weight.exponents, None, 6).shape == (0, 8)
