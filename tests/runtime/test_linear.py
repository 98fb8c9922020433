"""`FlexQLinear`: made from a linear layer, casts and moves without losing its scales, saved as a plain state dict."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flexq_core.quant import LayerPrecision, dequantize, quantize_weight
from flexq_core.runtime import cuda, ops
from flexq_core.runtime.linear import FlexQLinear


def test_equals_a_linear_layer_with_the_dequantised_weight():
    linear = nn.Linear(200, 30)
    layer = FlexQLinear.from_linear(linear, precision=LayerPrecision(6, 8), backend="reference")
    weight = dequantize(quantize_weight(linear.weight.detach(), bits=6))
    x = torch.randn(4, 5, 200)
    expected = nn.functional.linear(x, weight, linear.bias)
    error = (layer(x) - expected).norm() / expected.norm()
    assert error < 0.01  # what 8-bit activations cost
    assert error > 0  # they are quantised indeed


def test_shapes_types_and_trainability_of_the_parameters():
    layer = FlexQLinear.from_linear(nn.Linear(200, 30))
    found = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
    assert found == {
        "weight": ((30, 192), torch.uint8, False),
        "weight_scale": ((30, 2), torch.float16, False),
        "weight_exponent": ((30,), torch.int8, False),
        "bias": ((30,), torch.float32, False),
    }
    assert layer.weight_bytes() == 30 * (192 + 2 * 2 + 1)
    assert "W6A6, group_size=128" in repr(layer)


def test_eight_bit_weights():
    linear = nn.Linear(256, 16, bias=False)
    layer = FlexQLinear.from_linear(linear, precision=LayerPrecision(8, 8))
    x = torch.randn(3, 256)
    assert layer.weight.shape == (16, 256)
    assert (layer(x) - linear(x)).norm() / linear(x).norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casting_keeps_codes_and_scales_and_follows_the_input(dtype):
    layer = FlexQLinear.from_linear(nn.Linear(256, 16))
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer.to(dtype)
    assert torch.equal(layer.weight, before["weight"]) and torch.equal(layer.weight_scale, before["weight_scale"])
    assert layer.weight_scale.dtype == torch.float16 and layer.bias.dtype == dtype
    y = layer(torch.randn(2, 256).to(dtype))
    assert y.dtype == dtype and torch.isfinite(y).all()


def test_state_dict_round_trip_is_bit_equal():
    layer = FlexQLinear.from_linear(nn.Linear(300, 20))
    other = FlexQLinear(300, 20)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(7, 300)
    assert torch.equal(layer(x), other(x))


def test_the_linear_layer_is_left_alone():
    linear = nn.Linear(128, 8)
    before = linear.weight.clone(), linear.bias.clone()
    layer = FlexQLinear.from_linear(linear)
    with torch.no_grad():
        layer.bias.add_(1)
    assert torch.equal(linear.weight, before[0]) and torch.equal(linear.bias, before[1])


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="on the meta device"):
        FlexQLinear.from_linear(nn.Linear(128, 8, device="meta"))
    linear = nn.Linear(128, 8)
    with torch.no_grad():
        linear.weight[3, 5] = float("inf")
    with pytest.raises(ValueError, match=r"inf at index \(3, 5\)"):
        FlexQLinear.from_linear(linear)


@pytest.mark.parametrize("features", [129, 199, 201, 256, 300])
def test_inputs_of_another_width_are_refused_though_they_have_as_many_groups(features):
    layer = FlexQLinear.from_linear(nn.Linear(200, 8))
    with pytest.raises(ValueError, match=rf"x has shape \(2, {features}\); accepted: \[..., 200\]"):
        layer(torch.randn(2, features))
    with pytest.raises(ValueError, match=r"x has shape \(\); accepted: \[..., 200\]"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"accepted: \[..., 200\]"):
        layer.forward_norm(torch.randn(1, features), cuda.Norm(torch.ones(features), None, 1e-5, False))


def test_a_layer_that_processes_share_takes_its_parts_width(on_a_gpu):
    whole = FlexQLinear.from_linear(nn.Linear(512, 64))
    for name in ("weight", "weight_scale"):
        parameter = getattr(whole, name)
        setattr(whole, name, nn.Parameter(parameter[:, : parameter.shape[1] // 2].clone(), requires_grad=False))
    for repacked in (False, True):
        if repacked:
            whole.prepare()
        whole._require_width(torch.zeros(1, 256))
        with pytest.raises(ValueError, match=r"x has shape \(1, 255\); accepted: \[..., 256\]"):
            whole._require_width(torch.zeros(1, 255))


def test_compiled_without_a_graph_break():
    layer = FlexQLinear.from_linear(nn.Linear(200, 8), backend="reference")
    x = torch.randn(3, 200)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)(x), layer(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_with_gradients_on_it_runs_and_backward_says_that_there_are_none(compiled):
    layers = nn.Sequential(nn.Linear(16, 200), FlexQLinear.from_linear(nn.Linear(200, 8), backend="reference"))
    x = torch.randn(3, 16)
    y = (torch.compile(layers, fullgraph=True, backend="aot_eager") if compiled else layers)(x)
    with torch.no_grad():
        assert torch.equal(y, layers(x))
    with pytest.raises(RuntimeError, match=r"for inference and have no gradients: .*torch.no_grad\(\)"):
        y.sum().backward()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`prepare` as on a GPU, with chunks that say nothing."""
    monkeypatch.setattr(ops, "resolve_backend", lambda *_: "imma")
    monkeypatch.setattr(cuda, "repack", lambda *_: torch.zeros(2, 2, 3136, dtype=torch.uint8))


def test_auto_means_the_kernel_for_so_many_tokens_of_what_this_process_holds(on_a_gpu, monkeypatch):
    layer = FlexQLinear.from_linear(nn.Linear(500, 64))
    asked = []
    monkeypatch.setattr(cuda, "backend_for", lambda *layer: asked.append(layer) or "wgmma")
    assert layer.backend_for(7) == "imma" and not asked  # a kernel is what it is
    layer = FlexQLinear.from_linear(nn.Linear(500, 64))
    layer.weight_exponent = nn.Parameter(layer.weight_exponent[:32], requires_grad=False)
    monkeypatch.setattr(ops, "resolve_backend", lambda *_: "auto")
    assert layer.backend_for(7) == "wgmma"
    # Two groups of chunks, however many features there were; and of one token, whose product may begin with its norm.
    assert asked == [(tokens, 2 * 128, 32, torch.device("cpu")) for tokens in (1, 7)]


def test_one_token_is_normalised_by_the_kernel_that_it_runs_on(on_a_gpu, monkeypatch):
    monkeypatch.setattr(ops, "resolve_backend", lambda backend, *_: backend)
    for backend, auto, takes in [
        ("imma", "", True),
        ("auto", "imma", True),
        ("auto", "wgmma", False),
        ("bmma", "", False),
    ]:
        monkeypatch.setattr(cuda, "backend_for", lambda *_, auto=auto: auto)
        layer = FlexQLinear.from_linear(nn.Linear(500, 64), backend=backend)
        assert layer.takes_norm(torch.zeros(1, 500).half()) == takes
        assert not layer.takes_norm(torch.zeros(2, 500).half())
        assert not layer.takes_norm(torch.zeros(1, 500))
        assert not layer.takes_norm(torch.zeros(1, 498).half())
    layer.backend = "imma"
    assert layer.takes_norm(torch.zeros(1, 500).half())
    assert not FlexQLinear.from_linear(nn.Linear(128, 8), backend="reference").takes_norm(torch.zeros(1, 128).half())


def test_parts_of_parameters_that_processes_share_are_not_emptied(on_a_gpu):
    layer = FlexQLinear.from_linear(nn.Linear(256, 64))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parameters = dict(layer._parameters)
    parts = {name: parameter.detach() for name, parameter in parameters.items()}
    layer._parameters.update(parts)  # as transformers does for a call: what a distributed parameter holds of itself
    assert layer.prepare()[1] is layer.chunks is not None
    assert parts["weight"].shape == (64, 192) and parts["weight_scale"].shape == (64, 2)
    layer._parameters.update(parameters)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer.prepare()
    layer.to(torch.float16)
    assert layer.chunks is None and torch.equal(layer.weight, before["weight"])


def test_weights_that_come_for_a_call_alone_are_not_kept(on_a_gpu):
    layer = FlexQLinear.from_linear(nn.Linear(256, 64))
    layer._hf_hook = SimpleNamespace(offload=True)  # accelerate's
    assert layer.prepare()[1] is not None
    assert layer.chunks is None and layer.weight.shape == (64, 192)
