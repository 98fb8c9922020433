"""What layers are given on a text: equal to a plain computation, and what scales by output error are made from."""

import pytest
import torch

from flexq_core.quant.layers import linear_layers
from flexq_core.runtime.calibration import input_moments
from flexq_core.runtime.convert import quantize_model
from tests.models import CONFIGS, logits, skeleton_of, tiny_model

ROWS = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_moments_are_the_mean_squares_of_every_input_channel(architecture):
    model = tiny_model(architecture)
    seen = {name: [] for name in linear_layers(model)}
    for name, layer in linear_layers(model).items():
        layer.register_forward_hook(
            lambda module, arguments, output, name=name: seen[name].append(arguments[0].double())
        )
    moments = input_moments(model, ROWS)
    assert moments.keys() == seen.keys()
    for name, inputs in seen.items():
        expected = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).square().mean(0)
        assert moments[name].dtype == torch.float32
        torch.testing.assert_close(moments[name].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_block_by_block_the_moments_are_the_same_bit_for_bit(architecture):
    model = tiny_model(architecture)
    skeleton, blocks = skeleton_of(model)
    moments, expected = input_moments(skeleton, ROWS, load_block=blocks.get), input_moments(model, ROWS)
    assert moments.keys() == expected.keys()
    assert all(torch.equal(moments[name], value) for name, value in expected.items())


def test_watching_leaves_no_hook_behind_also_after_an_error():
    model = tiny_model("llama")
    with pytest.raises(IndexError):
        input_moments(model, ROWS + 96)
    assert not any(layer._forward_pre_hooks for layer in linear_layers(model).values())


@pytest.mark.parametrize("scales", ["mse", "output"])
def test_a_model_takes_better_scales_and_keeps_its_format(scales):
    model = tiny_model("llama")
    calibration = ROWS if scales == "output" else None
    chosen = quantize_model(model, "w6a8", backend="reference", scales=scales, calibration=calibration)
    plain = quantize_model(model, "w6a8", backend="reference")
    assert {n: (p.shape, p.dtype) for n, p in chosen.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in plain.named_parameters()
    }
    error = lambda quantised: (logits(quantised) - logits(model)).norm()  # noqa: E731
    assert error(chosen) < error(plain)


def test_a_layer_that_no_token_of_the_text_reaches_is_named(monkeypatch):
    moments = input_moments(tiny_model("llama"), ROWS)
    missed, _ = moments.popitem()  # as an expert to which none was routed
    monkeypatch.setattr("flexq_core.runtime.convert.input_moments", lambda *_: moments)
    with pytest.raises(ValueError, match=f"{missed}.*no token of the calibration text reaches it; accepted: a longer"):
        quantize_model(tiny_model("llama"), "w6a6", scales="output", calibration=ROWS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scales": "outputs"}, r"scales is 'outputs' \(did you mean 'output'\?\)"),
        ({"scales": "output"}, "scales is 'output' with no calibration text; accepted: a text for 'output'"),
        ({"calibration": ROWS}, "scales is 'absmax' with a calibration text"),
    ],
    ids=str,
)
def test_wrong_scales_are_refused_before_anything_runs(options, text):
    with pytest.raises(ValueError, match=text):
        quantize_model(tiny_model("llama"), "w6a6", **options)
