"""The CPU kernel on every instruction set of this machine: exact, complete, and awake to a wrong bit."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from flexq_core.quant import pack_codes, quantize_weight
from flexq_core.runtime import build, cpu
from flexq_core.workbook import paths
from tests.kernels import exactness

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
    exactness.equals_the_float64_oracle(partial(linear, isa=isa), generator, tokens, outputs, features, activation_bits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation_bits", [2, 6, 8])
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 40])
def test_one_hot_activations_return_every_code_bit_for_bit(isa, activation_bits, tokens):
    exactness.returns_every_code_bit_for_bit(partial(linear, isa=isa), tokens, activation_bits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [8, 48])
def test_integer_inputs_give_integer_results_bit_for_bit(isa, tokens):
    exactness.gives_integers_for_integers(partial(linear, isa=isa), tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("plane", range(6))
def test_dropping_a_bit_plane_is_caught(isa, tokens, plane):
    exactness.misses_a_dropped_bit_plane(partial(linear, isa=isa), tokens, plane)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [8, 32])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_sums_at_their_extremes_do_not_saturate(isa, tokens, sign):
    exactness.holds_the_largest_sums(partial(linear, isa=isa), tokens, sign)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_the_least_codes_of_both_sides_multiply_exactly(isa, tokens):
    """Only a subnormal scale, rounded down, gives codes of -128; eight products with -32 then come to 2 ** 15."""
    least = 2.0**-149
    x = torch.full((tokens, 256), -190 * least)  # 190 / 127 rounds to a scale of one least subnormal
    packed = pack_codes(torch.full((17, 256), -32, dtype=torch.int8), 6)
    scales, exponents = torch.ones(17, 2, dtype=torch.float16), torch.zeros(17, dtype=torch.int8)
    y = linear(x, packed, scales, exponents, None, 8, isa)
    assert torch.equal(y, torch.full((tokens, 17), 128 * 32 * 256 * least))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_every_scale_and_exponent_counts_as_the_numbers_that_they_are(isa, tokens):
    """Codes and activations of one: an output is its scale times 256 times a power of two, exact but for the last ones."""
    scales = torch.tensor(
        [1.0, -1.0, 0.0, -0.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 2.0**-14, 65504.0], dtype=torch.float16
    )
    for exponent in (0, 3, -126, -127, -128):
        exponents = torch.full((len(scales),), exponent, dtype=torch.int8)
        packed = pack_codes(torch.ones(len(scales), 256, dtype=torch.int8), 6)
        y = linear(torch.ones(tokens, 256), packed, scales[:, None].repeat(1, 2), exponents, None, 2, isa)
        right = (scales.double() * 256 * 2.0**exponent).float()
        assert torch.equal(y, right.expand(tokens, -1)), exponent


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_shows(isa, tokens, scale):
    scales = torch.tensor([[1.0], [scale]], dtype=torch.float16)
    packed, exponents = pack_codes(torch.ones(2, 128, dtype=torch.int8), 6), torch.zeros(2, dtype=torch.int8)
    y = cpu.w6ax_linear(torch.ones(tokens, 128), packed, scales, exponents, None, 8, isa=isa)
    assert y[:, 0].isfinite().all() and all(str(value) == str(scale) for value in y[:, 1].tolist())


def test_too_little_memory_is_an_error_and_not_the_end():
    """In another process: it takes all memory but some."""
    run = """
import resource, torch
from flexq_core.quant import pack_codes
from flexq_core.runtime import cpu
codes, scales, exponents = torch.ones(64, 8192, dtype=torch.int8), torch.ones(64, 64).half(), torch.zeros(64, dtype=torch.int8)
operands = (pack_codes(codes, 6), scales, exponents, None, 8)
x, out = torch.ones(8192, 8192), torch.empty(8192, 64)
cpu.w6ax_linear(x[:64], *operands, out=out[:64])
pages = int(open("/proc/self/statm").read().split()[0])
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, before[1]))
try:
    cpu.w6ax_linear(x, *operands, out=out)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert torch.equal(cpu.w6ax_linear(x, *operands, out=out), torch.full((8192, 64), 8192.0))
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", run], cwd=paths.ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_activation_codes_equal_the_definition_at_rounding_edges(isa):
    exactness.quantises_as_defined_at_rounding_edges(partial(linear, isa=isa), range(2, 9))


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
