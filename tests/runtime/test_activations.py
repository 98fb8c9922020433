"""Activations quantised ahead: each op is its operation and then quantisation, bit for bit, and the product is the layer's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flexq_core.quant import LayerPrecision, quantize_groups
from flexq_core.runtime import activations
from flexq_core.runtime.activations import Reader
from flexq_core.runtime.linear import FlexQLinear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
bits_6_8 = pytest.mark.parametrize("bits", [6, 8])
FEATURES = 200


def reader(bits: int = 6, outputs: int = 8) -> Reader:
    return Reader(bits, "reference", outputs, 128)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def require_records_of(records: torch.Tensor, y: torch.Tensor, bits: int) -> None:
    """That records hold y's codes and scales."""
    expected = quantize_groups(y, bits=bits)
    codes = records[:, : expected.codes.shape[1]].view(torch.int8)
    scales = records[:, expected.codes.shape[1] :].contiguous().view(torch.float32)
    assert torch.equal(codes, expected.codes) and torch.equal(scales, expected.scales)


@dtypes
@bits_6_8
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_elementwise_operations_then_quantisation(dtype, bits, tokens):
    x, wide = tensors((tokens, FEATURES), (tokens, 2 * FEATURES), dtype=dtype)
    gate, up = wide.chunk(2, dim=-1)
    require_records_of(activations.quantize_activation(x, reader(bits)), x, bits)
    require_records_of(activations.relu_quantize(x, reader(bits)), torch.relu(x), bits)
    require_records_of(activations.silu_mul_quantize(gate, up, reader(bits)), F.silu(gate.contiguous()) * up, bits)


@dtypes
@bits_6_8
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms_then_quantisation(dtype, bits, with_residual):
    x, residual, weight, bias = tensors((5, FEATURES), (5, FEATURES), (FEATURES,), (FEATURES,), dtype=dtype)
    residual = residual if with_residual else None
    h = x if residual is None else residual + x
    norm = LlamaRMSNorm(FEATURES, eps=1e-5)
    norm.weight.data = weight
    records, total = activations.rms_norm_quantize(x, weight, 1e-5, reader(bits), residual)
    require_records_of(records, norm(h), bits)
    assert torch.equal(total, h)
    for shift in (bias, None):
        records, total = activations.layer_norm_quantize(x, weight, shift, 1e-5, reader(bits), residual)
        require_records_of(records, F.layer_norm(h, (FEATURES,), weight, shift, 1e-5), bits)
        assert torch.equal(total, h)


@dtypes
@pytest.mark.parametrize("precision", [LayerPrecision(6, 6), LayerPrecision(6, 8), LayerPrecision(8, 8)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_the_layers(dtype, precision, bias):
    torch.manual_seed(0)
    layer = FlexQLinear.from_linear(nn.Linear(FEATURES, 30, bias=bias), precision=precision, backend="reference")
    x = torch.randn(2, 3, FEATURES).to(dtype)
    records = activations.quantize_activation(x.view(6, FEATURES), layer.reader())
    assert torch.equal(layer.forward_quantized(records, x.shape[:-1], dtype), layer(x))


def test_backends_that_quantise_for_themselves_have_no_reader():
    layer = FlexQLinear.from_linear(nn.Linear(FEATURES, 30), backend="simulate")
    assert layer.reader() is None
    layer.backend = "reference"
    assert layer.reader() == Reader(6, "reference", 30, 128)


def test_ops_are_declared_right_and_compile_without_a_graph_break():
    layer = FlexQLinear.from_linear(nn.Linear(FEATURES, 30), backend="reference")
    layer.prepare()
    x, residual, weight, bias = tensors((5, FEATURES), (5, FEATURES), (FEATURES,), (FEATURES,), dtype=torch.float32)
    mine = tuple(layer.reader())
    flexq = torch.ops.flexq
    for operator, arguments in [
        (flexq.quantize_activation, (x,)),
        (flexq.relu_quantize, (x,)),
        (flexq.silu_mul_quantize, (x, residual)),
        (flexq.norm_quantize, (x, None, weight, None, 1e-5, False)),
        (flexq.norm_quantize, (x, residual, weight, bias, 1e-5, True)),
    ]:
        torch.library.opcheck(operator.default, arguments + mine)
    records = activations.quantize_activation(x, layer.reader())
    operands = (records, 5, layer.weight, layer.weight_scale, layer.weight_exponent, layer.bias, 6, torch.float16)
    torch.library.opcheck(flexq.w6ax_linear_quantized.default, operands + mine)

    def block(x, residual):
        records, total = activations.rms_norm_quantize(x, weight, 1e-5, layer.reader(), residual)
        return layer.forward_quantized(records, x.shape[:-1], x.dtype), total

    found = torch.compile(block, fullgraph=True, backend="aot_eager")(x, residual)
    assert all(torch.equal(a, b) for a, b in zip(found, block(x, residual), strict=True))


def test_no_gradient_is_lost_in_silence_where_codes_carry_none():
    x, residual, weight = tensors((5, FEATURES), (5, FEATURES), (FEATURES,), dtype=torch.float32)
    _, total = activations.rms_norm_quantize(x, weight, 1e-5, reader(), residual.requires_grad_())
    with pytest.raises(RuntimeError, match="for inference and have no gradients"):
        total.sum().backward()


def test_what_does_not_fit_is_refused():
    layer = FlexQLinear.from_linear(nn.Linear(FEATURES, 30), backend="reference")
    x = torch.randn(5, FEATURES)
    with pytest.raises(ValueError, match="backend is 'cpu'; accepted for records: reference, auto, imma"):
        activations.quantize_activation(x, Reader(6, "cpu", 30, 128))
    with pytest.raises(ValueError, match="backend is 'auto' for records on cpu; accepted there: reference"):
        activations.quantize_activation(x, Reader(6, "auto", 30, 128))
    for refused, text in (
        (lambda: activations.relu_quantize(x[None], layer.reader()), r"x has shape \(1, 5, \d+\); accepted: \[M, K\]"),
        (lambda: activations.silu_mul_quantize(x, x[1:], layer.reader()), r"up has shape \(4, "),
        (lambda: activations.rms_norm_quantize(x, x[0, 1:], 1e-5, layer.reader()), "the norm's weight has shape"),
        (lambda: activations.layer_norm_quantize(x, x[0], x[0, 1:], 1e-5, layer.reader()), "the norm's bias has shape"),
        (lambda: activations.rms_norm_quantize(x, x[0], 1e-5, layer.reader(), x[1:]), r"residual has shape \(4, "),
    ):
        with pytest.raises(ValueError, match=text):
            refused()
    with pytest.raises(ValueError, match="cannot quantise non-finite values"):
        activations.relu_quantize(x / 0, layer.reader())
    records = activations.quantize_activation(x, layer.reader())
    with pytest.raises(
        ValueError, match=r"records have shape \(5, 264\); accepted: \(6, 264\) for 6 tokens of 2 groups"
    ):
        layer.forward_quantized(records, (6,), x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "imma", "bmma"])
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_on_a_gpu_the_kernels_read_what_the_ops_write(backend, tokens):
    layer = FlexQLinear.from_linear(nn.Linear(FEATURES, 70), backend=backend).cuda().half()
    layer.prepare()
    x, residual, weight = (
        tensor.cuda() for tensor in tensors((tokens, FEATURES), (tokens, FEATURES), (FEATURES,), dtype=torch.float16)
    )
    mine, operands = layer.reader(), (layer.weight_exponent, layer.bias, 6, torch.float16)
    for records, y in [
        (activations.quantize_activation(x, mine), x),
        (activations.relu_quantize(x, mine), torch.relu(x)),
        (activations.silu_mul_quantize(x, residual, mine), F.silu(x) * residual),
    ]:
        assert torch.equal(layer.forward_quantized(records, (tokens,), x.dtype), layer(y))
    records, total = activations.rms_norm_quantize(x, weight, 1e-5, mine, residual)
    assert torch.equal(total, x + residual)
    found, expected = (
        layer.forward_quantized(records, (tokens,), x.dtype),
        layer(activations.rms_norm(total, weight, 1e-5)),
    )
    assert (found - expected).norm() <= 2e-2 * expected.norm()  # a mean summed in another order may move a code by one
    flexq = torch.ops.flexq
    torch.library.opcheck(flexq.quantize_activation.default, (x, *mine))
    torch.library.opcheck(flexq.norm_quantize.default, (x, residual, weight, None, 1e-5, False, *mine))
    torch.library.opcheck(flexq.w6ax_linear_quantized.default, (records, tokens, layer.chunks, None, *operands, *mine))
