"""`w6ax_linear`: every backend equals the float64 oracle, bit for bit where the answer is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexq_core.quant import pack_bit_planes, pack_codes, quantize_weight, unpack_bit_planes
from flexq_core.runtime import build, ops
from tests import reference

EXACT_BACKENDS = ["reference"] + (["cpu"] if build.cpu_kernel_available()[0] else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_layer(outputs, features, bits=6, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    quantized = quantize_weight(torch.randn(outputs, features, generator=generator), bits=bits)
    offset = torch.randn(outputs, generator=generator) if bias else None
    return quantized, pack_codes(quantized.codes, bits), offset


def run(x, quantized, packed, bias, activation_bits, backend):
    return ops.w6ax_linear(
        x, packed, quantized.scales, quantized.exponents, bias, quantized.bits, activation_bits, 128, backend
    )


def oracle(x, quantized, bias, activation_bits):
    return reference.linear_oracle(
        x.float().numpy(),
        quantized.codes.numpy(),
        quantized.scales.numpy(),
        quantized.exponents.numpy(),
        None if bias is None else bias.float().numpy(),
        activation_bits,
    )


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@settings(max_examples=40)
@given(
    tokens=st.sampled_from([1, 3, 8, 17, 33]),
    outputs=st.integers(1, 70),
    features=st.integers(1, 400),
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(2, 8),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_float64_oracle(backend, tokens, outputs, features, weight_bits, activation_bits, bias, seed):
    bits = weight_bits if backend == "reference" else 6
    quantized, packed, offset = make_layer(outputs, features, bits, seed=seed, bias=bias)
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed + 1))
    y = run(x, quantized, packed, offset, activation_bits, backend)
    truth = oracle(x, quantized, offset, activation_bits)
    # At most three groups and a bias: a few roundings of float32, relative to the largest term.
    assert np.abs(y.numpy() - truth).max() <= 2e-6 * max(1.0, np.abs(truth).max() * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_half_types_err_no_more_than_twice_the_plain_product(backend, dtype):
    quantized, packed, offset = make_layer(96, 512)
    x = torch.randn(17, 512).to(dtype)
    y = run(x, quantized, packed, offset, 8, backend)
    assert y.dtype == dtype
    truth = torch.from_numpy(oracle(x, quantized, offset, 8))
    weight = quantized.codes.float() * quantized.scales.float().repeat_interleave(128, 1)
    # The plain product of the same (fake-quantised) operands in the same type, and one rounding of the result.
    codes, scales = reference.quantize(x.float().numpy(), 8)
    fake = torch.from_numpy(codes.astype(np.float32) * np.repeat(scales, 128, 1)).to(dtype)
    plain = torch.nn.functional.linear(fake, weight.to(dtype), offset.to(dtype))
    error = (y.double() - truth).abs().max()
    assert error <= 2 * (plain.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("activation_bits", [6, 8])
@pytest.mark.parametrize("features", [128, 200, 384])
def test_one_hot_activations_return_the_codes_bit_for_bit(backend, activation_bits, features):
    codes, packed, scales, exponents = exact_layer(features)
    x = one_hot_rows(features, activation_bits)
    y = ops.w6ax_linear(x, packed, scales, exponents, None, 6, activation_bits, 128, backend)
    assert torch.equal(y, codes[:, :features].T * x.max() / 8)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("plane", range(6))
def test_the_exact_check_fails_when_a_bit_plane_is_dropped(backend, plane):
    codes, _, scales, exponents = exact_layer(256)
    planes = pack_bit_planes(codes, 6)
    planes[plane] = 0
    packed = pack_codes(unpack_bit_planes(planes), 6)
    x = one_hot_rows(256, 6)
    y = ops.w6ax_linear(x, packed, scales, exponents, None, 6, 6, 128, backend)
    assert not torch.equal(y, codes.T * x.max() / 8)


def exact_layer(features):
    """Random codes with power-of-two scales, so that every product and sum is exact in float32."""
    padded = -(-features // 128) * 128
    codes = torch.randint(-32, 32, (37, padded), dtype=torch.int8)
    codes[:, features:] = 0
    scales = torch.full((37, padded // 128), 0.25, dtype=torch.float16)
    return codes, pack_codes(codes, 6), scales, torch.full((37,), -1, dtype=torch.int8)


def one_hot_rows(features, activation_bits):
    """Row k is zero but for element k, which has scale one and the largest code."""
    return torch.eye(features) * (2 ** (activation_bits - 1) - 1)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_integer_sums_are_exact_at_their_extremes(backend):
    codes = torch.full((4, 256), -32, dtype=torch.int8)
    scales = torch.ones(4, 2, dtype=torch.float16)
    x = torch.full((3, 256), -127.0)
    exponents = torch.zeros(4, dtype=torch.int8)
    y = ops.w6ax_linear(x, pack_codes(codes, 6), scales, exponents, None, 6, 8, 128, backend)
    assert torch.equal(y, torch.full((3, 4), 127.0 * 32 * 256))


@pytest.mark.parametrize("backend", [*EXACT_BACKENDS, "simulate"])
def test_any_leading_shape_also_empty_and_strided(backend):
    quantized, packed, offset = make_layer(10, 130)
    for shape in [(130,), (0, 130), (2, 0, 130), (2, 3, 130)]:
        y = run(torch.randn(shape), quantized, packed, offset, 6, backend)
        assert y.shape == (*shape[:-1], 10) and torch.isfinite(y).all()
    x = torch.randn(6, 260)
    strided = x[::2, ::2]
    assert torch.equal(
        run(strided, quantized, packed, offset, 6, backend),
        run(strided.contiguous(), quantized, packed, offset, 6, backend),
    )


@pytest.mark.parametrize("weight_bits", [2, 3, 6, 8])
@pytest.mark.parametrize("activation_bits", [2, 5, 6, 8])
def test_simulate_agrees_with_reference(weight_bits, activation_bits):
    quantized, packed, offset = make_layer(64, 384, bits=weight_bits)
    x = torch.randn(9, 384)
    exact = run(x, quantized, packed, offset, activation_bits, "reference")
    simulated = run(x, quantized, packed, offset, activation_bits, "simulate")
    assert (simulated - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("backend", [*EXACT_BACKENDS, "simulate", "auto"])
def test_opcheck_and_compile_without_a_graph_break(backend):
    quantized, packed, offset = make_layer(24, 200)
    arguments = (
        torch.randn(2, 5, 200),
        packed,
        quantized.scales,
        quantized.exponents,
        offset,
        6,
        6,
        128,
        backend,
    )
    torch.library.opcheck(torch.ops.flexq.w6ax_linear.default, arguments)
    compiled = torch.compile(ops.w6ax_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.w6ax_linear(*arguments))


def test_a_kernel_that_reads_six_bit_weights_refuses_others():
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: it reads 6-bit weights, not 4-bit ones"):
        ops.resolve_backend("cpu", "cpu", weight_bits=4)
    with pytest.raises(ValueError, match="backend 'imma' cannot run here: .*use 'reference' or 'auto'"):
        ops.resolve_backend("imma", "cuda", weight_bits=4)


def test_auto_is_never_simulate():
    assert ops.resolve_backend("auto", "cpu") in ("cpu", "reference")
    assert ops.resolve_backend("auto", "cuda") == "reference"
    assert ops.resolve_backend("auto", "cpu", weight_bits=8) == "reference"


@pytest.mark.parametrize("backend", ["imma", "wgmma", "bmma"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("built_with", [None, "13.0"])
def test_without_a_gpu_its_backends_say_what_is_missing(monkeypatch, backend, built_with):
    monkeypatch.setattr(torch.version, "cuda", built_with)
    missing = "torch finds no CUDA GPU, or no driver" if built_with else "this torch is built without CUDA"
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run here: {missing}"):
        ops.resolve_backend(backend, "cuda")


def test_without_a_compiler_auto_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(build, "cpu_kernel_available", lambda: (False, "no C++ compiler was found"))
    monkeypatch.setattr(ops, "_warned", set())
    with pytest.warns(RuntimeWarning, match="not used: no C\\+\\+ compiler was found"):
        assert ops.resolve_backend("auto", "cpu") == "reference"
    with pytest.raises(ValueError, match="'cpu' cannot run here: no C\\+\\+ compiler was found; use 'reference'"):
        ops.resolve_backend("cpu", "cpu")


def broken(**changes):
    quantized, packed, offset = make_layer(8, 256)
    arguments = {
        "x": torch.randn(2, 256),
        "weight": packed,
        "weight_scale": quantized.scales,
        "weight_exponent": quantized.exponents,
        "bias": offset,
        "weight_bits": 6,
        "activation_bits": 6,
        "group_size": 128,
        "backend": "reference",
    }
    return ops.w6ax_linear(*{**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"x": torch.randn(2, 300)},
            ValueError,
            r"weight has shape \(8, 192\); accepted: \(8, 288\) for x of 300",
        ),
        ({"x": torch.randn(2, 256).double()}, TypeError, "x is torch.float64"),
        ({"x": torch.tensor(1.0)}, TypeError, r"of shape \(\); accepted: \[..., K\]"),
        ({"weight": torch.zeros(8, 192)}, TypeError, "weight is torch.float32; accepted: torch.uint8"),
        (
            {"weight_scale": torch.zeros(8, 2)},
            TypeError,
            "weight_scale is torch.float32; accepted: torch.float16",
        ),
        ({"weight_scale": torch.zeros(8, 3).half()}, ValueError, r"weight_scale has shape \(8, 3\)"),
        ({"weight_exponent": torch.zeros(8)}, TypeError, "weight_exponent is torch.float32"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\); accepted: \(8,\)"),
        ({"bias": torch.zeros(8).int()}, TypeError, "bias is torch.int32"),
        ({"weight_bits": 9}, ValueError, "weight bits is 9; accepted: 2, 3, 4, 5, 6, 7, 8"),
        ({"activation_bits": 1}, ValueError, "activation bits is 1; accepted: 2, 3, 4, 5, 6, 7, 8"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend is 'cuda'; accepted: auto, reference, cpu, imma, wgmma, bmma, simulate",
        ),
        ({"weight": torch.zeros(8, 192, dtype=torch.uint8, device="meta")}, ValueError, "weight is on meta"),
        ({"weight": torch.tensor(1, dtype=torch.uint8)}, ValueError, r"weight has shape \(\); accepted: \[N, bytes\]"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x has shape \(2, 0\); accepted: \[..., K\] of at least one feature"),
        ({"group_size": 0}, ValueError, "group_size is 0; accepted: an integer of at least 1"),
    ],
)
def test_bad_input_names_what_is_accepted(changes, error, text):
    with pytest.raises(error, match=text):
        broken(**changes)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_non_finite_activations_are_refused(backend):
    x = torch.randn(2, 256)
    x[1, 7] = float("nan")
    with pytest.raises(ValueError, match=r"nan at index \(1, 7\)"):
        broken(x=x, backend=backend)


def test_the_definition_is_exact_for_groups_whose_sums_a_float32_cannot_hold():
    """2047 products of 127 with -128 and one of 1 with 1: an odd sum beyond 2 ** 24."""
    x, codes = torch.full((1, 2048), 127.0), torch.full((1, 2048), -128, dtype=torch.int8)
    x[0, 0], codes[0, 0] = 1.0, 1
    operands = (pack_codes(codes, 8), torch.ones(1, 1).half(), torch.tensor([-12], dtype=torch.int8))
    y = ops.w6ax_linear(x, *operands, None, 8, 8, 2048, "reference")
    (scale,) = x.abs().amax(1) / 127
    inner = torch.tensor(2047 * 127 * -128 + 1).float()
    assert scale == 1 and y.item() == inner.item() / 2**12
