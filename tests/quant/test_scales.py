"""Scales by least error: never worse than absmax in any group, in exact arithmetic; the format and its rules stay the same."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexq_core.quant import dequantize, pack_codes, quantize_weight, unpack_codes
from flexq_core.quant import scales as module
from flexq_core.quant.spec import code_limits


def random_weight(rows, features, seed, *, outlier=1.0, spread=0.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, features, generator=generator) * 10**spread
    weight[:, ::97] *= outlier
    return weight


def exact_errors(weight, quantized, importance=None):
    """Squared error of every group in exact arithmetic: a Fraction a group, row by row."""
    weight = torch.nn.functional.pad(weight.float(), (0, quantized.codes.shape[1] - weight.shape[1]))
    errors = []
    for n, row in enumerate(weight.tolist()):
        row_scale = Fraction(2) ** quantized.exponents[n].item()
        for g, scale in enumerate(quantized.scales[n].tolist()):
            at = slice(g * quantized.group_size, (g + 1) * quantized.group_size)
            codes = quantized.codes[n, at].tolist()
            h = [1.0] * len(codes) if importance is None else (importance.tolist() + [0.0] * 128)[at]
            step = Fraction(scale) * row_scale
            errors.append(
                sum(Fraction(i) * (Fraction(x) - step * q) ** 2 for x, q, i in zip(row[at], codes, h, strict=True))
            )
    return errors


@settings(max_examples=40)
@given(
    rows=st.integers(1, 3),
    features=st.integers(1, 300),
    bits=st.sampled_from([6, 8]),
    outlier=st.sampled_from([1.0, 8.0, 1e4]),
    spread=st.floats(-12, 12),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_no_groups_error_is_larger_than_under_absmax(rows, features, bits, outlier, spread, dtype, seed):
    weight = random_weight(rows, features, seed, outlier=outlier, spread=spread).clamp(-6e4, 6e4).to(dtype)
    moments = torch.rand(features, generator=torch.Generator().manual_seed(seed)) ** 4
    absmax = quantize_weight(weight, bits=bits)
    for scales, importance in (("mse", None), ("output", moments)):
        chosen = quantize_weight(weight, bits=bits, scales=scales, moments=importance)
        before, after = exact_errors(weight, absmax, importance), exact_errors(weight, chosen, importance)
        assert all(new <= old for new, old in zip(after, before, strict=True))
        # Still the format: a normal scale or zero, codes from the stored scale, nothing lost by packing.
        normal = (chosen.scales == 0) | ((chosen.scales >= 2.0**-14) & torch.isfinite(chosen.scales))
        assert normal.all() and torch.equal(chosen.exponents, absmax.exponents)
        assert torch.equal(unpack_codes(pack_codes(chosen.codes, bits), bits), chosen.codes)


@pytest.mark.parametrize("outlier", [1.0, 4.0])
def test_the_error_falls_and_less_is_not_to_be_had_from_the_factors(outlier):
    weight = random_weight(64, 1024, 1, outlier=outlier)
    absmax, chosen = quantize_weight(weight), quantize_weight(weight, scales="mse")
    error = lambda quantized: (dequantize(quantized) - weight).unflatten(-1, (-1, 128)).square().sum(-1)  # noqa: E731
    assert 0 < error(chosen).sum() < 0.95 * error(absmax).sum()
    base = weight.unflatten(-1, (-1, 128)).abs().amax(-1) / 31
    for factor in module.FACTORS:
        stored = (base * factor).half().float()[..., None]
        codes = (weight.unflatten(-1, (-1, 128)) / stored).round().clamp(-32, 31)
        tried = (codes * stored - weight.unflatten(-1, (-1, 128))).square().sum(-1)
        assert (error(chosen) <= tried * (1 + 1e-4)).all()


def test_codes_belong_to_the_stored_scale():
    weight = random_weight(16, 256, 2) * 0.02
    chosen = quantize_weight(weight, scales="mse")
    stored = chosen.scales.float().repeat_interleave(128, -1)
    assert torch.equal(chosen.codes.float(), torch.round(weight / stored).clamp(*code_limits(6)))


def test_channels_count_by_their_moments():
    weight = random_weight(32, 256, 3)
    moments = torch.ones(256)
    moments[::2] = 1e-6
    plain, weighted = quantize_weight(weight, scales="mse"), quantize_weight(weight, scales="output", moments=moments)
    error = lambda quantized: (dequantize(quantized) - weight).square()  # noqa: E731
    assert error(weighted)[:, 1::2].sum() < error(plain)[:, 1::2].sum()
    assert error(plain).sum() < error(weighted).sum()
    same = quantize_weight(weight, scales="output", moments=torch.full((256,), 7.0))
    assert torch.equal(same.codes, plain.codes) and torch.equal(same.scales, plain.scales)


def test_only_the_ratio_of_moments_within_a_group_counts():
    weight, moments = random_weight(8, 200, 4), torch.rand(200)
    expected = quantize_weight(weight, scales="output", moments=moments)
    for factor in (2.0**-60, 2.0**60):
        scaled = quantize_weight(weight, scales="output", moments=moments * factor)
        assert torch.equal(scaled.scales, expected.scales)


@pytest.mark.parametrize("scales", ["mse", "output"])
def test_zeros_stay_zero_and_dead_channels_change_nothing(scales):
    weight = torch.cat([torch.zeros(3, 128), random_weight(3, 100, 5)], -1)
    moments = torch.zeros(228) if scales == "output" else None
    chosen = quantize_weight(weight, scales=scales, moments=moments)
    assert chosen.scales[:, 0].eq(0).all() and chosen.codes[:, :128].eq(0).all() and chosen.codes[:, 228:].eq(0).all()
    assert torch.isfinite(dequantize(chosen)).all()
    if scales == "output":  # no channel matters: nothing is better than absmax
        assert torch.equal(chosen.scales, quantize_weight(weight).scales)
    assert quantize_weight(torch.zeros(2, 5), scales="mse").codes.eq(0).all()
    assert quantize_weight(torch.zeros(0, 128), scales="mse").codes.shape == (0, 128)


def test_the_same_weight_gives_the_same_codes_whatever_the_chunks(monkeypatch):
    weight = random_weight(9, 384, 6)
    expected = quantize_weight(weight, scales="mse")
    for elements in (1, 1000, 1 << 30):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        found = quantize_weight(weight, scales="mse")
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


def test_a_scale_at_the_edge_of_half_range_stays_in_it():
    edge = torch.tensor([31 * 2.0**-14, 31 * 65504.0])[:, None] * torch.linspace(-1, 1, 128)
    chosen = quantize_weight(edge, scales="mse")
    assert (chosen.scales >= 2.0**-14).all() and torch.isfinite(chosen.scales).all() and not chosen.exponents.any()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scales": "mze"}, r"scales is 'mze' \(did you mean 'mse'\?\); accepted: absmax, mse, output"),
        ({"scales": "output"}, "scales is 'output' with no moments; accepted: moments for 'output' and for no other"),
        ({"scales": "mse", "moments": torch.ones(8)}, "scales is 'mse' with moments"),
        ({"scales": "output", "moments": torch.ones(7)}, r"moments have shape \(7,\); accepted: \[8\]"),
        ({"scales": "output", "moments": -torch.ones(8)}, "finite number of 0 or more"),
        ({"scales": "output", "moments": torch.full((8,), float("nan"))}, "finite number of 0 or more"),
    ],
    ids=str,
)
def test_bad_input_names_what_is_accepted(options, text):
    with pytest.raises(ValueError, match=text):
        quantize_weight(torch.ones(2, 8), **options)


@pytest.mark.parametrize("scales", ["mse", "output"])
def test_a_non_finite_weight_names_the_first_bad_index(scales):
    weight = torch.zeros(3, 200)
    weight[1, 150] = float("nan")
    with pytest.raises(ValueError, match=r"nan at index \(1, 150\)"):
        quantize_weight(weight, scales=scales, moments=torch.ones(200) if scales == "output" else None)
