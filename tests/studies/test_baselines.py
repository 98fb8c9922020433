"""Baselines: SmoothQuant's formula, and what each method costs on a model with outliers."""

import pytest
import torch
from torch import nn

from flexq_core.quant import dequantize, quantize_groups
from flexq_core.sources.outliers import inject_outliers
from flexq_core.studies.baselines import RowwiseLinear, round_to_nearest, smooth_quant
from tests.models import logits, tiny_model

CALIBRATION = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(5))


def relative_error(model, expected):
    return ((logits(model) - expected).norm() / expected.norm()).item()


def test_rowwise_linear_is_per_channel_and_per_token():
    linear = nn.Linear(300, 20)
    x = torch.randn(4, 300)
    weight = dequantize(quantize_groups(linear.weight.detach(), bits=6, group_size=300))
    activation = dequantize(quantize_groups(x, bits=8, group_size=300))
    layer = RowwiseLinear(linear, 6, 8)
    assert torch.equal(layer(x), nn.functional.linear(activation, weight, linear.bias))
    assert (weight / weight.abs().amax(1, True) * 31).round().abs().amax(1).eq(31).all()


@pytest.mark.parametrize("architecture", ["llama-3", "opt"])
def test_more_bits_cost_less(architecture):
    model = tiny_model(architecture)
    expected = logits(model)
    errors = [
        relative_error(round_to_nearest(model, weight_bits=bits, activation_bits=bits), expected) for bits in (6, 8)
    ]
    assert 0 < errors[1] < errors[0] < 0.2


@pytest.mark.parametrize("architecture", ["llama-3", "opt"])
def test_smoothing_helps_where_there_are_outliers(architecture):
    model = inject_outliers(tiny_model(architecture), 64.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    plain = relative_error(round_to_nearest(model, weight_bits=8, activation_bits=8), expected)
    smooth = relative_error(smooth_quant(model, CALIBRATION, weight_bits=8, activation_bits=8), expected)
    assert smooth < plain
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("architecture", "strength"), [("llama", 0.85), ("opt", 0.5)])
def test_the_smoothing_is_the_authors_for_a_family(architecture, strength):
    model, text = tiny_model(architecture), torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    usual, given, other = (
        logits(smooth_quant(model, text, weight_bits=6, activation_bits=6, **options))
        for options in ({}, {"smoothing": strength}, {"smoothing": 0.7})
    )
    assert torch.equal(usual, given) and not torch.equal(usual, other)


def test_smoothing_alone_does_not_change_the_model():
    model = tiny_model("opt")
    expected = logits(model)
    eight = smooth_quant(model, CALIBRATION, weight_bits=8, activation_bits=8)
    assert relative_error(eight, expected) < 0.03
