"""One token's norm, quantisation and product in one launch: as the launches that it takes the place of."""

from functools import cache

import pytest
import torch
from torch import nn

from flexq_core.quant import pack_codes
from flexq_core.runtime import activations, cuda
from flexq_core.runtime.linear import FlexQLinear
from tests.kernels import exactness, overlap

gpu = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
centred = pytest.mark.parametrize("centred", [False, True], ids=["rms_norm", "layer_norm"])
DEVICE = "cuda"

SHAPES = {
    "a group": (70, 128),
    "part of a group": (33, 4),
    "fewer groups than warps": (2000, 1028),
    "a group a warp": (96, 2048),
    "short rows, several tiles": (16_000, 3072),
    "longer rows": (12_288, 5120),
    "longer rows, few tiles": (1, 7160),
    "two tiles for some blocks": (5120, 5120),
    "an odd number of groups": (4640, 8060),
    "the longest that are normalised": (10_240, 8192),
}
WITHOUT_NORM = SHAPES | {
    "longer than what is normalised": (6000, 8196),
    "as long as eighty groups": (2000, 10_240),
    "a part of a group longer": (2000, 10_244),
    "long rows, an odd number of groups": (2000, 17_280),
    "the longest that are quantised": (5000, 28_672),
}


def random(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@cache
def layer(outputs, features, seed=0, bias=True):
    """Chunks for `imma`, exponents and bias: of integers the sums are exact, in whatever order."""
    codes, scales, _ = exactness.exact_layer(outputs, features, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, -5, (outputs,), generator=generator, dtype=torch.int8).to(DEVICE)
    chunks = cuda.repack(pack_codes(codes.to(DEVICE), 6), scales.to(DEVICE), "imma")
    return chunks, exponents, random(outputs, dtype=torch.float32, seed=seed + 1) if bias else None


def integers(features, bits, dtype):
    return exactness.integers(1, features, bits).to(DEVICE, dtype)


def apart(x, operands, bits):
    """Quantisation, then the product."""
    return product(cuda.quantize_activation(x, bits, "imma"), operands, bits, x.dtype)


def product(records, operands, bits, dtype):
    out = torch.full((1, len(operands[1])), torch.nan, device=DEVICE, dtype=dtype)
    return cuda.linear(records, 1, *operands, bits, "imma", out)


@gpu
@dtypes
@pytest.mark.parametrize("shape", WITHOUT_NORM.values(), ids=WITHOUT_NORM.keys())
def test_a_row_gives_the_bits_of_quantisation_and_product(shape, dtype):
    for bias, bits in ((True, 6), (False, 8), (True, 2)):
        operands, x = layer(*shape, bias=bias), integers(shape[1], bits, dtype)
        y, total = cuda.linear_of_row(x, *operands, bits)
        assert total is None
        assert torch.equal(y, apart(x, operands, bits))


@gpu
@dtypes
@pytest.mark.parametrize("shape", WITHOUT_NORM.values(), ids=WITHOUT_NORM.keys())
def test_codes_are_those_of_the_kernels_apart(shape, dtype):
    """Of any numbers, bit for bit; in another order where apart two blocks of fewer warps share a multiprocessor."""
    tiles, processors = -(-shape[0] // 32), torch.cuda.get_device_properties(DEVICE).multi_processor_count
    another_order = processors < tiles < 4 / 3 * processors
    relative, absolute = (torch.finfo(dtype).eps, 1e-4) if another_order else (0, 0)  # a unit of the last place
    operands, x = layer(*shape), random(1, shape[1], dtype=dtype, seed=4)
    for bits in (6, 8):
        found, _ = cuda.linear_of_row(x, *operands, bits)
        torch.testing.assert_close(found, apart(x, operands, bits), rtol=relative, atol=absolute)


@gpu
@centred
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_norm_is_exact_where_nothing_is_left_to_rounding(shape, dtype, centred):
    """Rows of +-2, of which each number meets a weight and a bias of its own: one place off and codes differ."""
    features = shape[1]
    generator = torch.Generator().manual_seed(9)
    x = (4.0 * (torch.randperm(features, generator=generator) % 2) - 2.0)[None].to(DEVICE, dtype)
    residual = random(1, features, dtype=dtype, seed=3).sign()
    for bits in (6, 8):
        operands, y = layer(*shape), integers(features, bits, dtype)
        shift = torch.randint(-3, 4, (features,), generator=generator).to(DEVICE, dtype) * centred
        norm = cuda.Norm(((y - shift) * x.sign())[0], shift if centred else None, 0.0, centred)
        right = apart(y, operands, bits)
        assert torch.equal(cuda.linear_of_row(x, *operands, bits, norm)[0], right)
        found, total = cuda.linear_of_row(x - residual, *operands, bits, norm, residual)
        assert torch.equal(found, right)
        assert torch.equal(total, x)


@gpu
@centred
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_norm_is_as_the_kernel_before_the_product_has_it(shape, dtype, centred):
    """But for a sum in another order, which may move a code by one."""
    outputs, features = shape
    x, residual = random(1, features, dtype=dtype, seed=1) + 0.5, random(1, features, dtype=dtype, seed=2)
    weight, shift = random(2, features, dtype=dtype, seed=3)
    operands = layer(outputs, features)
    for eps, bits in ((1e-5, 8), (3.0, 6)):
        if centred:
            records, total = cuda.layer_norm_quantize(x, weight, shift, eps, bits, "imma", residual=residual)
        else:
            records, total = cuda.rms_norm_quantize(x, weight, eps, bits, "imma", residual=residual)
        right = cuda.linear(records, 1, *operands, bits, "imma", x.new_empty(1, outputs)).double()
        norm = cuda.Norm(weight, shift if centred else None, eps, centred)
        found, h = cuda.linear_of_row(x, *operands, bits, norm, residual)
        assert torch.equal(h, total)
        assert (found.double() - right).norm() <= 1e-2 * right.norm()


@gpu
def test_the_variance_of_numbers_far_from_zero():
    """The sum of squares less the square of the sum would have no digit left."""
    x = random(1, 4096, dtype=torch.float32).round() + 2000  # whole numbers, of which float16 has all up to 2048
    x = x.half()
    h = x.double() - x.double().mean()
    normal = h / h.pow(2).mean().sqrt()
    ones, zeros = torch.ones(4096, device=DEVICE).half(), torch.zeros(4096, device=DEVICE).half()
    operands = layer(512, 4096, bias=False)
    right = apart(normal.half(), operands, 8)
    found, _ = cuda.linear_of_row(x, *operands, 8, cuda.Norm(ones, zeros, 0.0, True))
    assert (found - right).norm() <= 1e-2 * right.norm()


@gpu
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("features", [1028, 12_004])
def test_what_is_not_finite_gives_nan(features, value, dtype):
    """Wherever it is: each lane that shares a group tells the others."""
    operands, ones = layer(100, features), torch.ones(features, device=DEVICE, dtype=dtype)
    norms = [cuda.Norm(ones, None, 1e-5, False), cuda.Norm(ones, ones, 1e-5, True)] if features <= 8192 else []
    other = random(1, features, dtype=dtype)
    for at in (*range(256, 256 + 128, 11), features - 1):
        x = random(1, features, dtype=dtype)
        x[0, at] = value
        assert cuda.linear_of_row(x, *operands, 6)[0].isnan().all()
        for norm in norms:
            assert cuda.linear_of_row(x, *operands, 6, norm)[0].isnan().all()
            assert cuda.linear_of_row(other, *operands, 6, norm, x)[0].isnan().all()


@gpu
@pytest.mark.parametrize("features", [5120, 6000])
def test_rows_that_are_not_in_vectors_are(features):
    """Strided, or at an odd address: a module's input may be any view."""
    wide = random(2, 2 * features + 3)
    views = wide[:1, 1 : features + 1], wide[:1, ::2][:, :features], wide[1:, 3 : features + 3]
    module = FlexQLinear.from_linear(nn.Linear(features, 70), backend="imma").cuda().half()
    for x in views:
        assert torch.equal(module(x), module(x.clone(memory_format=torch.contiguous_format)))
    norm, operands = cuda.Norm(views[1][0], None, 1e-5, False), layer(70, features)
    whole = cuda.Norm(views[1][0].clone(), None, 1e-5, False)
    found = cuda.linear_of_row(views[0], *operands, 6, norm, views[2])
    right = cuda.linear_of_row(views[0].clone(), *operands, 6, whole, views[2].clone())
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


class Steps:
    """Products that each read what the one before wrote, with a norm and without."""

    def __init__(self, hidden=5120):
        self.weight = random(hidden, seed=2)
        self.layers = [layer(hidden, hidden, seed, bias=False) for seed in range(3)]

    def __call__(self, x, residual, between=lambda: None):
        norm = cuda.Norm(self.weight, None, 1e-6, False)
        for _ in range(3):
            for index, operands in enumerate(self.layers):
                if index < 2:
                    x, residual = cuda.linear_of_row(x, *operands, 8, norm, residual)
                else:
                    x, _ = cuda.linear_of_row(x, *operands, 6)
                between()
        return x, residual


@gpu
def test_launches_that_overlap_give_what_launches_apart_give():
    overlap.gives_what_launches_apart_give(Steps(), lambda seed: random(1, 5120, seed=seed), random(1, 5120, seed=6))


@gpu
def test_any_device_index():
    """On a stream of the tensors' device, which no other device can launch on: a default stream is every device's."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    operands, x, weight = layer(300, 1028), random(1, 1028), random(1028, seed=1)

    def product(device):
        here = [each.to(device) for each in operands]
        norm = cuda.Norm(weight.to(device), None, 1e-5, False)
        return cuda.linear_of_row(x.to(device), *here, 6, norm, x.to(device))

    right = [each.cpu() for each in product("cuda:0")]
    with torch.cuda.stream(torch.cuda.Stream(1)), torch.cuda.device(0):
        found = product("cuda:1")
        assert torch.cuda.current_device() == 0
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, right, strict=True))


@gpu
def test_the_op_of_a_norm_and_its_product():
    module = FlexQLinear.from_linear(nn.Linear(1028, 70), backend="auto").cuda().half()
    module.prepare()
    x, residual, weight = random(1, 1028), random(1, 1028, seed=1), random(1028, seed=2)
    norm = cuda.Norm(weight, None, 1e-5, False)
    assert module.takes_norm(x)
    y, h = module.forward_norm(x, norm, residual)
    assert torch.equal(h, x + residual)
    expected = module(activations.rms_norm(h, weight, 1e-5))
    assert (y - expected).norm() <= 2e-2 * expected.norm()
    alone, same = module.forward_norm(h, norm)
    assert same is h and torch.equal(alone, y)
    operands = (module.chunks, module.weight_exponent, module.bias, 6)
    for given in (None, residual):
        torch.library.opcheck(torch.ops.flexq.norm_linear.default, (x, given, *norm, *operands))


@gpu
def test_what_a_row_may_not_be():
    module = FlexQLinear.from_linear(nn.Linear(1028, 70), backend="auto").cuda().half()
    assert module.takes_norm(random(1, 1028))
    for x in (random(2, 1028), random(1, 1028, dtype=torch.float32), random(1, 1026), random(0, 1028), random(1, 8196)):
        assert not module.takes_norm(x)
    module.backend = "bmma"
    assert not module.takes_norm(random(1, 1028))
    operands, weight = layer(70, 1028), random(1028)
    with pytest.raises(
        ValueError, match=r"x is torch.float16 of shape \(2, 1028\), for weights of 9 groups; accepted: one"
    ):
        cuda.linear_of_row(random(2, 1028), *operands, 6)
    with pytest.raises(ValueError, match=r"of shape \(1, 128\), for weights of 9 groups"):
        cuda.linear_of_row(random(1, 128), *operands, 6)
    with pytest.raises(ValueError, match="eps is nan"):
        cuda.linear_of_row(random(1, 1028), *operands, 6, cuda.Norm(weight, None, float("nan"), False))
    with pytest.raises(TypeError, match=r"weight is torch.float32, x torch.float16"):
        cuda.linear_of_row(random(1, 1028), *operands, 6, cuda.Norm(weight.float(), None, 0.0, False))
    with pytest.raises(ValueError, match=r"residual has shape \(1, 1024\)"):
        cuda.linear_of_row(random(1, 1028), *operands, 6, cuda.Norm(weight, None, 0.0, False), random(1, 1024))
    with pytest.raises(ValueError, match="the norm has a bias and is not centred; accepted for RMSNorm: None"):
        cuda.linear_of_row(random(1, 1028), *operands, 6, cuda.Norm(weight, weight, 0.0, False))
    with pytest.raises(ValueError, match="a residual is added before a norm; accepted without one: None"):
        cuda.linear_of_row(random(1, 1028), *operands, 6, None, random(1, 1028))
    for features, long_norm in ((8196, cuda.Norm(random(8196), None, 0.0, False)), (28_676, None)):
        with pytest.raises(ValueError, match="in up to 224 groups, with a norm 64"):
            cuda.linear_of_row(random(1, features), *layer(70, features), 6, long_norm)
    with pytest.raises(ValueError, match="x is on cpu; accepted: a CUDA device"):
        cuda.linear_of_row(random(1, 1028).cpu(), *operands, 6)
