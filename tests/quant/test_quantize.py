"""Quantisation: the numerics equal an independent NumPy implementation, and nothing is lost or accepted silently."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexq_core.quant import dequantize, quantize_groups, quantize_weight
from flexq_core.quant.quantize import fake_quantize
from tests import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@settings(max_examples=120)
@given(
    rows=st.integers(0, 5),
    features=st.integers(1, 300),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(DTYPES),
    spread=st.floats(-6, 4),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_equal_the_oracle(rows, features, bits, dtype, spread, seed):
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) * 10**spread
    x = x.to(dtype)
    codes, scales = reference.quantize(x.float().numpy(), bits)
    quantized = quantize_groups(x, bits=bits)
    assert np.array_equal(quantized.codes.numpy(), codes)
    assert np.array_equal(quantized.scales.numpy(), scales)


def test_halves_round_to_even():
    x = torch.tensor([[31.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 30.5]])  # scale exactly 1
    assert quantize_groups(x, bits=6).codes[0, :8].tolist() == [31, 0, 2, 2, 0, -2, -2, 30]


def test_error_is_at_most_half_a_step():
    x = torch.randn(64, 512)
    for bits in range(2, 9):
        quantized = quantize_groups(x, bits=bits)
        step = quantized.scales.repeat_interleave(128, -1)
        assert ((dequantize(quantized) - x).abs() <= step * (0.5 + 1e-5)).all()


def test_padding_is_zero_and_does_not_change_the_answer():
    x = torch.randn(3, 200)
    quantized = quantize_groups(x, bits=6)
    assert quantized.codes.shape == (3, 256) and quantized.scales.shape == (3, 2)
    assert (quantized.codes[:, 200:] == 0).all()
    assert dequantize(quantized).shape == x.shape
    assert torch.equal(quantize_groups(torch.nn.functional.pad(x, (0, 56)), bits=6).codes, quantized.codes)


def test_all_zero_group_has_zero_scale_and_codes():
    x = torch.cat([torch.zeros(2, 128), torch.ones(2, 128)], -1)
    quantized = quantize_groups(x, bits=6)
    assert quantized.scales[:, 0].eq(0).all() and quantized.codes[:, :128].eq(0).all()
    assert torch.equal(dequantize(quantized), x)
    weight = quantize_weight(x, bits=6)
    assert weight.scales[:, 0].eq(0).all() and torch.isfinite(dequantize(weight)).all()


def test_a_leading_shape_of_any_kind():
    for shape in [(128,), (2, 3, 128), (0, 128), (2, 0, 128)]:
        assert quantize_groups(torch.randn(shape), bits=8).codes.shape == shape


def test_weight_codes_belong_to_the_stored_half_scale():
    weight = torch.randn(16, 256) * 0.02
    for bits in range(2, 9):
        quantized = quantize_weight(weight, bits=bits)
        assert quantized.scales.dtype == torch.float16 and not quantized.exponents.any()
        stored = quantized.scales.float().repeat_interleave(128, -1)
        expected = torch.round(weight / stored).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(quantized.codes.float(), expected)


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-9, 1e-6, 1e-4, 1.0, 1e5, 1e8, 1e30, 1e38])
def test_a_weight_scale_outside_half_range_is_not_lost(magnitude):
    weight = torch.randn(4, 256).clamp(-3, 3)
    weight[1] *= magnitude
    quantized = quantize_weight(weight, bits=6)
    assert torch.isfinite(quantized.scales).all()
    assert (quantized.scales.float()[1] >= 2.0**-14).all()
    values = dequantize(quantized)
    error = (values.double() - weight.double()).norm(dim=-1) / weight.double().norm(dim=-1)
    # 31 levels each side of a clamped normal: 3% relative error; fp32 itself has fewer bits at 1e-40.
    assert (error < 0.04).all(), error
    assert quantized.exponents[[0, 2, 3]].eq(0).all()


def test_a_tiny_group_beside_a_large_one_is_not_lost():
    weight = torch.cat([torch.randn(2, 128), torch.randn(2, 128) * 1e-7], -1)
    values = dequantize(quantize_weight(weight, bits=6))
    small = (values - weight)[:, 128:].norm() / weight[:, 128:].norm()
    assert small < 0.04


def test_fake_quantisation_is_quantise_then_dequantise():
    x = torch.randn(5, 130).half()
    y = fake_quantize(x, bits=6)
    assert y.dtype == x.dtype and torch.equal(y, dequantize(quantize_groups(x, bits=6), x.dtype))


def test_the_argument_is_left_alone():
    x = torch.randn(4, 256)
    before = x.clone()
    quantize_groups(x, bits=6)
    quantize_weight(x, bits=6)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: quantize_groups(torch.randn(2, 8), bits=9), ValueError, "bits is 9; accepted: 2, 3, 4, 5, 6, 7, 8"),
        (lambda: quantize_groups(torch.randn(2, 8), bits=True), ValueError, "bits is True"),
        (lambda: quantize_groups(torch.randn(2, 8), bits=6, group_size=0), ValueError, "group_size is 0"),
        (lambda: quantize_groups(torch.randn(2, 0), bits=6), ValueError, r"shape \(2, 0\)"),
        (lambda: quantize_groups(torch.tensor(1.0), bits=6), ValueError, r"shape \(\)"),
        (lambda: quantize_groups(torch.arange(8), bits=6), TypeError, "torch.int64; accepted: float16"),
        (lambda: quantize_groups(torch.ones(2, 8).double(), bits=6), TypeError, "torch.float64"),
        (lambda: quantize_weight(torch.randn(8), bits=6), ValueError, r"shape \(8,\); accepted: \[N, K\]"),
        (lambda: quantize_weight(torch.randn(2, 8), bits=1), ValueError, "weight bits is 1"),
    ],
)
def test_bad_input_names_what_is_accepted(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_names_the_first_bad_index(value):
    x = torch.zeros(3, 200)
    x[1, 150] = x[2, 3] = value
    with pytest.raises(ValueError, match=rf"{value} at index \(1, 150\)"):
        quantize_groups(x, bits=6)
    with pytest.raises(ValueError, match=r"at index \(1, 150\)"):
        quantize_weight(x, bits=6)
