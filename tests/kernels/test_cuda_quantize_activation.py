"""Quantisation of activations on this machine's card, alone and fused with what comes before it in a transformer block.

Records are decoded here by what layout.cuh says of them, and compared with NumPy's quantisation of what torch computes.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flexq_core.quant import pack_codes, quantize_weight
from flexq_core.runtime import cuda
from flexq_core.runtime.linear import FlexQLinear
from tests import reference
from tests.kernels import overlap

gpu = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ODD_FEATURES = [1, 6, 128, 200, 1030, 1152, 5001]
each = pytest.mark.parametrize("backend", ["imma", "bmma", "wgmma"])
bits_6_8 = pytest.mark.parametrize("bits", [6, 8])
every_width = pytest.mark.parametrize("bits", range(2, 9))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
tokens_odd = pytest.mark.parametrize("tokens", [1, 3, 8, 17, 33, 65])


def decode(records, tokens, features, bits, backend):
    """Records → codes int64 [M', G * 128] and scales float32 [M', G], M' with the tokens that fill the last block."""
    groups, tiles = -(-features // 128), cuda.token_tiles(tokens, backend)
    tile_bytes = bits * 128 + 32 if backend == "bmma" else 8 * 128
    blocks = -(-tokens // (8 * tiles))
    data = records.cpu().numpy().reshape(blocks, groups, tiles * (tile_bytes + 32))
    scales = np.ascontiguousarray(data[..., tiles * tile_bytes :]).view("<f4").reshape(blocks, groups, tiles, 8)
    area = data[..., : tiles * tile_bytes].reshape(blocks, groups, tiles, tile_bytes)
    if backend == "imma":
        codes = area.view(np.int8).astype(np.int64).reshape(blocks, groups, tiles, 2, 8, 64)  # k / 64, token, k % 64
        codes = codes.transpose(0, 2, 4, 1, 3, 5)
    elif backend == "wgmma":
        # Token, 16 bytes, k / 16 % 4, k % 4; of token m, bytes i ^ m are those of i = k / 64, k / 4 % 4.
        units = area.view(np.int8).astype(np.int64).reshape(blocks, groups, tiles, 8, 8, 4, 4)
        units = np.stack([units[:, :, :, m, np.arange(8) ^ m] for m in range(8)], 3)
        codes = units.reshape(blocks, groups, tiles, 8, 2, 4, 4, 4).transpose(0, 2, 3, 1, 4, 6, 5, 7)
        # Token / 2 % 4, token / 8 % 2, token % 2.
        scales = scales.reshape(blocks, groups, tiles // 2, 4, 2, 2).transpose(0, 1, 2, 4, 3, 5)
        scales = scales.reshape(blocks, groups, tiles, 8)
    else:
        planes = area[..., : bits * 128].reshape(blocks, groups, tiles, bits, 8, 16)  # plane, token, k / 8
        ones = np.unpackbits(planes, axis=-1, bitorder="little")
        codes = -(2 ** (bits - 1)) * ones[:, :, :, -1].astype(np.int64)  # two's complement
        for plane in range(bits - 1):
            codes += ones[:, :, :, plane].astype(np.int64) << plane
        codes = codes.transpose(0, 2, 3, 1, 4)
        sums = np.ascontiguousarray(area[..., bits * 128 :]).view("<i4").reshape(blocks, groups, tiles, 8)
        assert np.array_equal(sums.transpose(0, 2, 3, 1), codes.sum(-1))
    rows = blocks * tiles * 8
    return codes.reshape(rows, groups * 128), scales.transpose(0, 2, 3, 1).reshape(rows, groups)


def quantized(y, bits):
    """Codes and scales of a tensor by the definition; a group that is not finite has no codes, and the scale NaN."""
    y = y.detach().float().cpu().numpy()
    groups = -(-y.shape[1] // 128)
    blocks = np.zeros((len(y), groups * 128), np.float32)
    blocks[:, : y.shape[1]] = y
    broken = ~np.isfinite(blocks.reshape(len(y), groups, 128)).all(-1)
    blocks.reshape(len(y), groups, 128)[broken] = 0
    codes, scales = reference.quantize(blocks, bits)
    scales[broken] = np.nan
    return codes, scales


def run(operation, *operands, bits, backend, **named):
    """Run into records whose every bit is set, and decode them; padding must be zeros. With the new residual, if any."""
    tokens, features = operands[0].shape
    records = operation(*operands, bits, backend, **named)
    records = records[0] if isinstance(records, tuple) else records
    records.fill_(0xFF)
    poison = torch.full_like(operands[0], torch.nan)
    del poison  # what is allocated next, such as the new residual, has its bytes
    result = operation(*operands, bits, backend, out=records, **named)
    total = result[1] if isinstance(result, tuple) else None
    assert (result if total is None else result[0]) is records
    codes, scales = decode(records, tokens, features, bits, backend)
    assert not codes[tokens:].any() and not scales[tokens:].any()
    assert not codes[:, features:].any()
    return (codes[:tokens], scales[:tokens]) if total is None else (codes[:tokens], scales[:tokens], total)


def assert_same(found, y, bits):
    codes, scales = quantized(y, bits)
    assert np.array_equal(found[1], scales, equal_nan=True)
    assert np.array_equal(found[0], codes)


def assert_close(found, y, bits, share=2e-3):
    """As `assert_same`, but for numbers that another order of summation puts on the other side of a rounding.

    Such a number is one unit in the last place away, after a product perhaps two: so much may a scale differ, and a code
    by one; only the 8-bit codes of bfloat16 are as fine as its units.
    """
    codes, scales = quantized(y, bits)
    assert np.array_equal(np.isnan(found[1]), np.isnan(scales))
    finite = ~np.isnan(scales)
    tolerance = max(2 * torch.finfo(y.dtype).eps, 2e-6)
    assert (np.abs(found[1] - scales)[finite] <= tolerance * scales[finite]).all()
    if y.dtype != torch.float32:  # of which every sum differs
        assert (found[1] != scales)[finite].sum() <= 2 + 5 * share * scales.size
    off = np.abs(found[0] - codes)
    assert off.max() <= (2 if y.dtype == torch.bfloat16 and bits == 8 else 1)
    assert (off > 0).sum() <= 4 + share * codes.size


def random(tokens, features, dtype, seed=0, scale=3.0):
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(DEVICE, dtype)


def rms_norm(x, weight, eps):
    """transformers' LlamaRMSNorm."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@gpu
@each
@bits_6_8
@dtypes
@tokens_odd
def test_plain_and_relu_equal_the_definition_bit_for_bit(tokens, dtype, bits, backend):
    for features in ODD_FEATURES:
        x = random(tokens, features, dtype, seed=features)
        assert_same(run(cuda.quantize_activation, x, bits=bits, backend=backend), x, bits)
        assert_same(run(cuda.relu_quantize, x, bits=bits, backend=backend), torch.relu(x), bits)


@gpu
@each
@every_width
def test_each_code_at_each_place(bits, backend):
    """One number of a token is the largest, at every place in turn; and a ramp through all codes."""
    x = torch.eye(128, device=DEVICE)
    assert_same(run(cuda.quantize_activation, x, bits=bits, backend=backend), x, bits)
    assert_same(run(cuda.quantize_activation, -x, bits=bits, backend=backend), -x, bits)
    top = 2 ** (bits - 1) - 1
    ramp = (torch.arange(256, device=DEVICE) * 37 % (2 * top + 1) - top).float()
    x = torch.stack([ramp.roll(shift) for shift in range(40)])
    x[:, ::128] = top  # so that every group's scale is one
    codes, scales = run(cuda.quantize_activation, x, bits=bits, backend=backend)
    assert (scales == 1).all()
    assert np.array_equal(codes, x.cpu().numpy())


@gpu
@each
@every_width
def test_quotients_beside_halves_round_as_the_division_does(bits, backend):
    """Numbers within a few units in the last place of where a code changes, for scales of every mantissa and size."""
    generator = np.random.default_rng(7)
    top = 2 ** (bits - 1) - 1
    largest = (generator.uniform(1, 2, (512, 8, 1)) * 2.0 ** generator.integers(-120, 128, (512, 8, 1))).astype("<f4")
    scales = largest / np.float32(top)
    halves = generator.integers(-top, top, (512, 8, 128)) + np.float32(0.5)
    x = (halves * scales).astype("<f4")
    x = (x.view("<i4") + generator.integers(-2, 3, x.shape)).astype("<i4").view("<f4")
    x[..., 5:6] = largest
    x = torch.from_numpy(x.reshape(512, 1024)).to(DEVICE)
    assert_same(run(cuda.quantize_activation, x, bits=bits, backend=backend), x, bits)


@gpu
@each
@every_width
def test_the_smallest_and_the_largest_numbers(bits, backend):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(70, 384, generator=generator)
    for row in range(64):
        x[row] *= 2.0 ** (-150 + row)  # subnormal inputs, then subnormal scales, then ordinary ones
    x[64] = torch.tensor([1e-45, -1e-45, 0.0, -0.0]).repeat(96)
    x[65] = (
        torch.randint(-60, 61, (384,), generator=generator) * 1e-45
    )  # quotients by a scale of one unit exceed the codes
    x[66] *= 5e37
    x[67] = torch.tensor([3.4028234e38, -3.4028234e38, 1.0, 1e38]).repeat(96)
    x[68] = 0
    x[69, :128], x[69, 128:] = 0, 65504
    x = x.to(DEVICE)
    assert_same(run(cuda.quantize_activation, x, bits=bits, backend=backend), x, bits)
    halves = torch.arange(-300, 300, device=DEVICE, dtype=torch.float16).view(1, -1) * 2.0**-24  # subnormal in float16
    assert_same(run(cuda.quantize_activation, halves, bits=bits, backend=backend), halves, bits)


@gpu
@each
@bits_6_8
@dtypes
@tokens_odd
def test_silu_times_up(tokens, dtype, bits, backend):
    """torch's own definition; its exponential may be another by one unit of float32, seldom of the result."""
    for features in ODD_FEATURES:
        gate, up = random(tokens, features, dtype, seed=1), random(tokens, features, dtype, seed=2)
        found = run(cuda.silu_mul_quantize, gate, up, bits=bits, backend=backend)
        assert_close(found, F.silu(gate) * up, bits, share=1e-3)


@gpu
@each
@bits_6_8
@dtypes
def test_silu_times_up_is_exact_where_the_exponential_does_not_matter(dtype, bits, backend):
    """SiLU of 0 is 0, of more than 20 itself, of less than -105 zero: what is left are the products and their rounding."""
    generator = torch.Generator().manual_seed(5)
    for features in ODD_FEATURES:
        gate = torch.tensor([0.0, 32.0, 77.0, -200.0, 24.5])[torch.randint(0, 5, (19, features), generator=generator)]
        gate, up = gate.to(DEVICE, dtype), random(19, features, dtype, seed=6)
        expected = F.relu(gate) * up
        assert_same(run(cuda.silu_mul_quantize, gate, up, bits=bits, backend=backend), expected, bits)


@gpu
@each
@dtypes
@pytest.mark.parametrize("residual", [False, True])
@tokens_odd
def test_rms_norm(tokens, residual, dtype, backend):
    for features in [*ODD_FEATURES, 8192, 8200, 16384]:
        for bits, scale in [(6, 3.0), (8, 2e-3)]:  # of the second, eps is the larger part
            x, weight = random(tokens, features, dtype, 1, scale), random(1, features, dtype, 2)[0]
            named = {"residual": random(tokens, features, dtype, 3, scale)} if residual else {}
            found = run(cuda.rms_norm_quantize, x, weight, 1e-5, bits=bits, backend=backend, **named)
            total = x + named["residual"] if residual else x
            assert not residual or torch.equal(found[2], total)
            assert_close(found, rms_norm(total, weight, 1e-5), bits)


@gpu
@each
@dtypes
@pytest.mark.parametrize("residual", [False, True])
@tokens_odd
def test_layer_norm(tokens, residual, dtype, backend):
    for features in [*ODD_FEATURES[1:], 8192, 8200, 16384]:
        for bits, scale in [(6, 3.0), (8, 2e-3)]:
            x, weight = random(tokens, features, dtype, 1, scale) + scale, random(1, features, dtype, 2)[0]
            bias = random(1, features, dtype, 4)[0] if bits == 6 else None
            named = {"residual": random(tokens, features, dtype, 3, scale)} if residual else {}
            found = run(cuda.layer_norm_quantize, x, weight, bias, 1e-5, bits=bits, backend=backend, **named)
            total = x + named["residual"] if residual else x
            assert not residual or torch.equal(found[2], total)
            assert_close(found, layer_norm(total, weight, bias, 1e-5), bits)


def signs(tokens, features, dtype):
    """Rows of +-2^r, of both signs equally many: mean 0, deviation 2^r, and exactly +-1 when normalised."""
    x = torch.ones(tokens, features)
    x[:, ::2] = -1
    generator = torch.Generator().manual_seed(8)
    x = torch.stack([row[torch.randperm(features, generator=generator)] for row in x])
    return (x * 2.0 ** (torch.arange(tokens) % 5 - 2)[:, None]).to(DEVICE, dtype)


@gpu
@each
@bits_6_8
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("features", [2, 200, 1030, 4096, 5002, 9000, 16384])
def test_norms_are_exact_where_nothing_is_left_to_rounding(features, dtype, bits, backend):
    """Each weight and bias meets its own number: one place off and codes differ."""
    x = signs(19, features, dtype)
    normal = torch.sign(x.float())
    generator = torch.Generator().manual_seed(9)
    weight, bias = (torch.randint(-64, 65, (2, features), generator=generator) / 16).to(DEVICE, dtype)
    y = (normal * weight.float()).to(dtype)
    assert_same(run(cuda.rms_norm_quantize, x, weight, 0.0, bits=bits, backend=backend), y, bits)
    y = (normal * weight.float() + bias.float()).to(dtype)
    assert_same(run(cuda.layer_norm_quantize, x, weight, bias, 0.0, bits=bits, backend=backend), y, bits)
    residual = random(19, features, torch.float32, 10, 1.0).sign().to(dtype)
    found = run(
        cuda.layer_norm_quantize, x - residual, weight, bias, 0.0, bits=bits, backend=backend, residual=residual
    )
    assert_same(found, y, bits)
    assert torch.equal(found[2], x)


@gpu
@each
def test_the_variance_of_numbers_far_from_zero(backend):
    """The sum of squares less the square of the sum would have no digit left."""
    x = random(9, 4096, torch.float32, scale=1.0) + 3000
    weight, bias = torch.ones(2, 4096, device=DEVICE)
    h = x.double() - x.double().mean(-1, keepdim=True)
    y = (h / h.pow(2).mean(-1, keepdim=True).sqrt() + 1).float()
    codes, scales = run(cuda.layer_norm_quantize, x, weight, bias, 0.0, bits=8, backend=backend)
    expected, expected_scales = quantized(y, 8)
    assert np.abs(scales / expected_scales - 1).max() <= 1e-3
    assert np.abs(codes - expected).max() <= 1


@gpu
@each
@dtypes
def test_strided_rows(dtype, backend):
    """Views of wide tensors: aligned, misaligned, with rows apart, of step two, transposed, repeated."""
    wide = random(41, 2 * 1152 + 4, dtype)
    ordinary = wide.flatten()[: 41 * 1152].view(41, 1152)
    views = [wide[:, at : at + k] for at in (0, 1, 2, 4) for k in (1152, 1030)]
    views += [wide[3::5, 8:1160], wide[:, ::2][:, :1024], wide[:, :40].T, wide[:1, :512].expand(5, 512), wide[:1, 3:9]]
    views += [ordinary, wide[:, 7:8]]
    for bits in (6, 8):
        for x in views:
            copy = x.contiguous().clone()
            assert_same(run(cuda.quantize_activation, x, bits=bits, backend=backend), copy, bits)
            weight = random(1, x.shape[1] + 1, dtype, 2)[0, 1:]
            for operation, more in [(cuda.rms_norm_quantize, ()), (cuda.layer_norm_quantize, (weight,))]:
                expected = run(operation, copy, weight.clone(), *more, 1e-6, bits=bits, backend=backend, residual=copy)
                found = run(operation, x, weight, *more, 1e-6, bits=bits, backend=backend, residual=x)
                for one, other in zip(found[:2], expected[:2], strict=True):
                    assert np.array_equal(one, other)
                assert torch.equal(found[2], expected[2]) and torch.equal(found[2], copy + copy)


@gpu
@each
@dtypes
@tokens_odd
def test_the_halves_of_one_tensor_are_gate_and_up(tokens, dtype, backend):
    for features in (1152, 200, 1030, 5001):
        gate_up = random(tokens, 2 * features, dtype)
        before = gate_up.clone()
        gate, up = gate_up.chunk(2, dim=-1)
        found = run(cuda.silu_mul_quantize, gate, up, bits=8, backend=backend)
        expected = run(cuda.silu_mul_quantize, gate.contiguous(), up.contiguous(), bits=8, backend=backend)
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
        assert_close(found, F.silu(gate) * up, 8, share=1e-3)
        assert torch.equal(gate_up, before)


@gpu
@each
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("features", [384, 1030])
def test_what_is_not_finite_is_not_lost(features, value, dtype, backend):
    x, other = random(11, features, dtype, 1), random(11, features, dtype, 2)
    weight, at = torch.ones(features, device=DEVICE, dtype=dtype), 131
    broken = x.clone()
    broken[2, at] = value
    for bits in (6, 8):
        named = {"bits": bits, "backend": backend}
        assert_same(run(cuda.quantize_activation, broken, **named), broken, bits)
        assert_same(run(cuda.relu_quantize, broken, **named), torch.relu(broken), bits)
        fused = {
            "gate": lambda x, named=named: run(cuda.silu_mul_quantize, x, other, **named),
            "up": lambda x, named=named: run(cuda.silu_mul_quantize, other, x, **named),
            "rms_norm": lambda x, named=named: run(cuda.rms_norm_quantize, x, weight, 1e-6, **named),
            "layer_norm": lambda x, named=named: run(cuda.layer_norm_quantize, x, weight, weight, 1e-6, **named),
            "residual": lambda x, named=named: run(cuda.rms_norm_quantize, other, weight, 1e-6, residual=x, **named),
        }
        for name, operation in fused.items():
            right, found = operation(x), operation(broken)
            assert np.isnan(found[1][2, at // 128]), name
            assert not found[0][2, 128:256].any(), name
            rest = np.arange(11) != 2
            assert np.array_equal(found[0][rest], right[0][rest]), name
            assert np.array_equal(found[1][rest], right[1][rest]), name


@gpu
@each
def test_results_beyond_the_type_are_not_finite_either(backend):
    """60000 + 60000 and 300 * 300 are infinite in float16, as they are for torch."""
    big = torch.full((3, 200), 6e4, device=DEVICE, dtype=torch.float16)
    weight = torch.ones(200, device=DEVICE, dtype=torch.float16)
    assert np.isnan(run(cuda.rms_norm_quantize, big, weight, 1e-6, bits=8, backend=backend, residual=big)[1]).all()
    gate = torch.full((3, 200), 300.0, device=DEVICE, dtype=torch.float16)
    assert np.isnan(run(cuda.silu_mul_quantize, gate, gate, bits=8, backend=backend)[1]).all()


@gpu
@bits_6_8
@dtypes
@pytest.mark.parametrize("features", [6, 200, 1030, 5001])
def test_more_groups_than_are_quantised_at_once(features, dtype, bits):
    """wgmma: a warp takes four of a token then, on any card of up to 170 multiprocessors."""
    tokens = 9600 // -(-features // 128) + 5
    x, up = random(tokens, features, dtype, seed=1), random(tokens, features, dtype, seed=2)
    assert_same(run(cuda.quantize_activation, x, bits=bits, backend="wgmma"), x, bits)
    assert_same(run(cuda.relu_quantize, x, bits=bits, backend="wgmma"), torch.relu(x), bits)
    found = run(cuda.silu_mul_quantize, x, up, bits=bits, backend="wgmma")
    assert_close(found, F.silu(x) * up, bits, share=1e-3)


@gpu
@each
def test_more_tokens_than_a_grid_has_rows(backend):
    """A grid has 65535 rows at most; prefill of a batch has more tokens."""
    x = random(65_600, 130, torch.float16)
    weight = random(1, 130, torch.float16, 2)[0]
    assert_same(run(cuda.quantize_activation, x, bits=6, backend=backend), x, 6)
    found = run(cuda.rms_norm_quantize, x, weight, 1e-6, bits=6, backend=backend)
    assert_close(found, rms_norm(x, weight, 1e-6), 6)


@gpu
@each
@bits_6_8
def test_the_largest_layers(bits, backend):
    for tokens in (1, 16):
        x, up = random(tokens, 28672, torch.float16, 1), random(tokens, 28672, torch.float16, 2)
        assert_same(run(cuda.quantize_activation, x, bits=bits, backend=backend), x, bits)
        assert_close(run(cuda.silu_mul_quantize, x, up, bits=bits, backend=backend), F.silu(x) * up, bits, share=1e-3)


@gpu
@each
def test_no_tokens(backend):
    x, weight = torch.empty(0, 300, device=DEVICE), torch.ones(300, device=DEVICE)
    assert cuda.quantize_activation(x, 6, backend).numel() == 0
    assert cuda.silu_mul_quantize(x, x, 6, backend).numel() == 0
    records, total = cuda.rms_norm_quantize(x, weight, 1e-6, 6, backend, residual=x)
    assert records.numel() == 0 and total.shape == (0, 300)
    assert cuda.quantize_activation(torch.empty(3, 0, device=DEVICE), 6, backend).numel() == 0


@gpu
@each
def test_equal_calls_give_equal_bits_whatever_tokens_are_beside(backend):
    x, weight = random(16, 5120, torch.float16), random(1, 5120, torch.float16, 2)[0]
    first = run(cuda.rms_norm_quantize, x, weight, 1e-6, bits=8, backend=backend)
    for tokens in (16, 9, 3, 1):
        found = run(cuda.rms_norm_quantize, x[:tokens], weight, 1e-6, bits=8, backend=backend)
        assert np.array_equal(found[0], first[0][:tokens]) and np.array_equal(found[1], first[1][:tokens])


@gpu
@each
def test_any_device_index(backend):
    """Launches go to the tensors' device, also while another is current, and leave that as it is.

    On a stream of the tensors' device, which no other device can launch on: a default stream is every device's.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    rows = [torch.randn(9, 1030) for _ in range(2)]

    def launches(device):
        x, y = (each.to(device) for each in rows)
        norm = {"residual": y, "activation_bits": 6, "backend": backend}
        return [
            cuda.quantize_activation(x, 6, backend),
            cuda.relu_quantize(x, 6, backend),
            cuda.silu_mul_quantize(x, y, 6, backend),
            *cuda.rms_norm_quantize(x, y[0], 1e-6, **norm),
            *cuda.layer_norm_quantize(x, y[0], y[1], 1e-5, **norm),
        ]

    right = [each.cpu() for each in launches("cuda:0")]
    with torch.cuda.stream(torch.cuda.Stream(1)), torch.cuda.device(0):
        found = launches("cuda:1")
        assert torch.cuda.current_device() == 0
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, right, strict=True))


@gpu
@each
@bits_6_8
@dtypes
def test_the_linear_kernels_take_the_records(dtype, bits, backend):
    """ReLU fused into a layer's quantisation gives the bits of the two apart."""
    layer = FlexQLinear.from_linear(torch.nn.Linear(1030, 333), backend=backend).cuda()
    chunks = layer.prepare()[1]
    for tokens in (1, 8, 19, 65):
        x = random(tokens, 1030, dtype)
        out = torch.full((tokens, 333), torch.nan, device=DEVICE, dtype=dtype)
        records = cuda.relu_quantize(x, bits, backend)
        cuda.linear(records, tokens, chunks, layer.weight_exponent, layer.bias, bits, backend, out)
        arguments = (chunks, layer.weight_exponent, layer.bias, bits, backend)
        assert torch.equal(out, cuda.w6ax_linear(torch.relu(x), *arguments))


class Block:
    """A gated MLP with its norm, on random weights: each launch reads what the one before it wrote."""

    def __init__(self, backend, hidden=1024, inner=2816):
        self.backend, self.inner = backend, inner
        self.weight = random(1, hidden, torch.float16, 2)[0]
        self.up, self.down = self.layer(2 * inner, hidden, 3), self.layer(hidden, inner, 4)

    def layer(self, outputs, features, seed):
        generator = torch.Generator().manual_seed(seed)
        weight = quantize_weight(torch.randn(outputs, features, generator=generator) / features**0.5)
        packed = pack_codes(weight.codes, 6).to(DEVICE)
        return cuda.repack(packed, weight.scales.to(DEVICE), self.backend), weight.exponents.to(DEVICE)

    def linear(self, records, tokens, layer, bits):
        chunks, exponents = layer
        out = torch.full((tokens, len(exponents)), torch.nan, device=DEVICE, dtype=torch.float16)
        return cuda.linear(records, tokens, chunks, exponents, None, bits, self.backend, out)

    def __call__(self, x, residual, between=lambda: None):
        for _ in range(3):
            records, residual = cuda.rms_norm_quantize(x, self.weight, 1e-6, 6, self.backend, residual=residual)
            between()
            gate_up = self.linear(records, len(x), self.up, 6)
            between()
            records = cuda.silu_mul_quantize(*gate_up.chunk(2, dim=-1), 8, self.backend)
            between()
            x = self.linear(records, len(x), self.down, 8)
            between()
        return x, residual


@gpu
@each
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_launches_that_overlap_give_what_launches_apart_give(tokens, backend):
    def rows(seed):
        return random(tokens, 1024, torch.float16, seed)

    overlap.gives_what_launches_apart_give(Block(backend), rows, rows(6))


@gpu
def test_records_that_do_not_fit_are_refused():
    x = torch.zeros(3, 300, device=DEVICE)
    right = cuda.quantize_activation(x, 6, "imma")
    size = right.numel()
    assert cuda.quantize_activation(x, 6, "imma", out=right) is right
    with pytest.raises(
        ValueError, match=rf"out is torch.uint8 of shape \({size - 1},\); accepted: \[{size}\] torch.uint8"
    ):
        cuda.quantize_activation(x, 6, "imma", out=right[1:])
    with pytest.raises(ValueError, match=r"out is torch.int8 of shape"):
        cuda.relu_quantize(x, 6, "imma", out=right.view(torch.int8))
    wide = torch.zeros(2 * size + 1, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="not contiguous"):
        cuda.silu_mul_quantize(x, x, 6, "imma", out=wide[: 2 * size : 2])
    with pytest.raises(ValueError, match="out starts at an address of 1 modulo 16; accepted: a multiple of 16"):
        cuda.quantize_activation(x, 6, "imma", out=wide[1 : size + 1])


def test_what_does_not_fit_is_refused_before_a_launch():
    x, weight = torch.zeros(3, 300), torch.zeros(300)
    with pytest.raises(ValueError, match="x is on cpu; accepted: a CUDA device"):
        cuda.quantize_activation(x, 6, "imma")
    with pytest.raises(ValueError, match="gate is on cpu; accepted: a CUDA device"):
        cuda.silu_mul_quantize(x, x, 6, "imma")
    with pytest.raises(ValueError, match="backend is 'cpu'; accepted for records: imma, bmma"):
        cuda.relu_quantize(x, 6, "cpu")
    with pytest.raises(ValueError, match="activation bits is 9; accepted: 2, 3, 4, 5, 6, 7, 8"):
        cuda.quantize_activation(x, 9, "bmma")
    with pytest.raises(TypeError, match=r"x is torch.float64 of shape \(3, 300\); accepted: \[M, K\] float32"):
        cuda.quantize_activation(x.double(), 6, "imma")
    with pytest.raises(TypeError, match=r"x is torch.float32 of shape \(300,\); accepted: \[M, K\]"):
        cuda.rms_norm_quantize(weight, weight, 1e-6, 6, "imma")
    with pytest.raises(TypeError, match="up is torch.float16, gate torch.float32; accepted: one type"):
        cuda.silu_mul_quantize(x, x.half(), 6, "imma")
    with pytest.raises(ValueError, match=r"up has shape \(3, 299\); accepted: \(3, 300\) for gate of \(3, 300\)"):
        cuda.silu_mul_quantize(x, x[:, 1:], 6, "imma")
    with pytest.raises(ValueError, match=r"weight has shape \(299,\); accepted: \(300,\) for x of \(3, 300\)"):
        cuda.rms_norm_quantize(x, weight[1:], 1e-6, 6, "imma")
    with pytest.raises(TypeError, match="bias is torch.bfloat16, x torch.float32; accepted: one type"):
        cuda.layer_norm_quantize(x, weight, weight.bfloat16(), 1e-5, 6, "imma")
    with pytest.raises(ValueError, match=r"residual has shape \(2, 300\); accepted: \(3, 300\)"):
        cuda.rms_norm_quantize(x, weight, 1e-6, 6, "imma", residual=x[:2])
    with pytest.raises(ValueError, match="residual is on meta, x on cpu; accepted: one device"):
        cuda.rms_norm_quantize(x, weight, 1e-6, 6, "imma", residual=x.to("meta"))


@gpu
@pytest.mark.parametrize("features", [0, 16385])
def test_norms_of_more_numbers_than_a_block_holds_are_refused(features):
    x, weight = torch.zeros(2, features, device=DEVICE), torch.zeros(features, device=DEVICE)
    with pytest.raises(ValueError, match=f"x has {features} features; accepted by a fused norm: 1 to 16384"):
        cuda.rms_norm_quantize(x, weight, 1e-6, 6, "imma")


@gpu
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_an_epsilon_that_is_none_is_refused(eps):
    x, weight = torch.zeros(2, 300, device=DEVICE), torch.zeros(300, device=DEVICE)
    with pytest.raises(ValueError, match=f"eps is {eps}; accepted: a finite number, at least 0"):
        cuda.layer_norm_quantize(x, weight, None, eps, 6, "imma")
