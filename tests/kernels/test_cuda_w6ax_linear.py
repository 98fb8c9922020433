"""The CUDA kernels on this machine's card: exact, complete, and awake to a wrong bit. They compile wherever nvcc is found."""

import subprocess
from functools import partial

import pytest
import torch
from torch.utils import cpp_extension

from flexq_core.quant import LayerPrecision, pack_codes, quantize_weight
from flexq_core.quant.spec import group_count
from flexq_core.runtime import build, cuda, ops
from flexq_core.runtime.chunks import unpack_chunks
from flexq_core.runtime.linear import FlexQLinear
from tests.kernels import exactness

gpu = pytest.mark.gpu
BACKENDS = ["imma", "bmma", "wgmma"]
each = pytest.mark.parametrize("backend", BACKENDS)
bits_6_8 = pytest.mark.parametrize("activation_bits", [6, 8])


def nvcc_missing() -> str:
    try:
        build.cuda_home()
    except build.BuildError as error:
        return str(error)
    return ""


needs_nvcc = pytest.mark.skipif(bool(nvcc_missing()), reason=f"nothing can be compiled: {nvcc_missing()}")


@needs_nvcc
@pytest.mark.parametrize("source", [name for name in build.CUDA_SOURCES if name.endswith(".cu")])
def test_compiles_for_every_supported_card_without_spilling(source, tmp_path):
    compiles_without_spilling(source, ("80", "86", "89", "90a"), tmp_path)


@needs_nvcc
def test_hoppers_instructions_are_left_out_for_cards_after_it(tmp_path):
    known = subprocess.run([build.cuda_home() / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True)
    if "sm_120" not in known.stdout.split():
        pytest.skip("this nvcc knows no such card")
    compiles_without_spilling("w6ax_wgmma.cu", ("120",), tmp_path)


@needs_nvcc
def test_bit_planes_of_another_width_compile_without_spilling(tmp_path):
    compiles_without_spilling("w6ax_bmma.cu", ("80", "90a"), tmp_path, "-DFLEXQ_WEIGHT_BITS=5")


def compiles_without_spilling(source, cards, tmp_path, *macros):
    targets = [f"-gencode=arch=compute_{card},code=sm_{card}" for card in cards]
    command = [
        build.cuda_home() / "bin" / "nvcc",
        *build.CUDA_FLAGS,
        *cpp_extension.COMMON_NVCC_FLAGS,  # with which torch compiles them: half precision converts by name alone
        *macros,
        *targets,
        "-Werror",
        "all-warnings",
        "--threads=0",  # cards side by side
        "-Xptxas",
        "-v",
        "-c",
    ]
    done = subprocess.run(
        [*command, build.KERNELS / "cuda" / source, "-o", tmp_path / "object.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spilled = [
        line for line in done.stderr.splitlines() if "spill stores" in line and " 0 bytes spill stores" not in line
    ]
    assert not spilled
    assert "Potential Performance Loss" not in done.stderr  # serialised tensor cores, registers that do not move


def linear(*operands, **named):
    """`linear_on_gpu`, brought back."""
    return linear_on_gpu(*operands, **named).cpu()


def linear_on_gpu(x, packed, scales, exponents, bias, activation_bits, backend, dtype=torch.float32):
    """Run on the GPU into an output full of NaN, so that what is not written shows."""
    device = torch.device("cuda")
    chunks = cuda.repack(packed.to(device), scales.to(device), backend)
    x = x.to(device, dtype)
    out = torch.full((len(x), len(packed)), torch.nan, device=device, dtype=dtype)
    records = cuda.quantize_activation(x, activation_bits, backend)
    bias = None if bias is None else bias.to(device)
    y = cuda.linear(records, len(x), chunks, exponents.to(device), bias, activation_bits, backend, out)
    assert not torch.isnan(y).any()
    return y


@gpu
@each
@bits_6_8
@pytest.mark.parametrize("tokens", range(1, 66))
def test_equals_the_float64_oracle(backend, activation_bits, tokens):
    generator = torch.Generator().manual_seed(tokens)
    for outputs, features in [(1, 1), (37, 200), (64, 384), (33, 1030), (130, 2176), (257, 5001)]:
        run = partial(linear, backend=backend)
        exactness.equals_the_float64_oracle(run, generator, tokens, outputs, features, activation_bits)


@gpu
@each
@bits_6_8
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 40, 65])
def test_one_hot_activations_return_every_code_bit_for_bit(backend, activation_bits, tokens):
    exactness.returns_every_code_bit_for_bit(partial(linear, backend=backend), tokens, activation_bits)


@pytest.fixture(scope="module")
def every_width():
    """Bit planes of every width, compiled side by side: one by one they take a minute."""
    cuda.build_ahead([(weight_bits, 2) for weight_bits in range(2, 9)], torch.device("cuda"))


@gpu
@pytest.mark.usefixtures("every_width")
@pytest.mark.parametrize("activation_bits", range(2, 9))
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_bit_planes_are_exact_in_every_combination_of_bits(weight_bits, activation_bits):
    run, bits = partial(linear, backend="bmma"), {"activation_bits": activation_bits, "weight_bits": weight_bits}
    exactness.returns_every_code_bit_for_bit(run, 24, **bits)
    for tokens in (1, 5, 17):
        exactness.gives_integers_for_integers(run, tokens, **bits)
        for sign in (-1.0, 1.0):
            exactness.holds_the_largest_sums(run, tokens, sign, **bits)
        for plane in range(weight_bits):
            exactness.misses_a_dropped_bit_plane(run, tokens, plane, **bits)
        generator = torch.Generator().manual_seed(tokens)
        exactness.equals_the_float64_oracle(run, generator, tokens, 37, 1030, **bits)


@gpu
@pytest.mark.parametrize("backend", ["imma", "wgmma"])
@pytest.mark.parametrize("activation_bits", [2, 3, 5, 7])
def test_integer_tensor_cores_take_activations_of_any_bits(backend, activation_bits):
    exactness.gives_integers_for_integers(partial(linear, backend=backend), 17, activation_bits)


@gpu
@pytest.mark.parametrize("backend", ["auto", "bmma"])
def test_a_layer_of_other_bits_runs_on_bit_planes(backend):
    layer = FlexQLinear.from_linear(torch.nn.Linear(1030, 333), precision=LayerPrecision(3, 5), backend=backend).cuda()
    packed = [tensor.clone() for tensor in layer.canonical()]  # before the layer holds them in another order only
    assert layer.prepare()[0] == "bmma"
    x = torch.randn(9, 1030, device="cuda")
    y = layer(x)
    operands = (*packed, layer.weight_exponent, layer.bias, 3, 5, 128)
    assert torch.equal(y, ops.w6ax_linear(x, *operands, backend))
    expected = ops.w6ax_linear(x, *operands, "reference")
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@gpu
@each
@pytest.mark.parametrize("tokens", [8, 48, 130])
def test_integer_inputs_give_integer_results_bit_for_bit(backend, tokens):
    exactness.gives_integers_for_integers(partial(linear, backend=backend), tokens)


@gpu
@each
@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("plane", range(6))
def test_dropping_a_bit_plane_is_caught(backend, tokens, plane):
    exactness.misses_a_dropped_bit_plane(partial(linear, backend=backend), tokens, plane)


@gpu
@each
@pytest.mark.parametrize("tokens", [8, 32])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_sums_at_their_extremes_do_not_overflow(backend, tokens, sign):
    exactness.holds_the_largest_sums(partial(linear, backend=backend), tokens, sign)


@gpu
@each
def test_activation_codes_equal_the_definition_at_rounding_edges(backend):
    exactness.quantises_as_defined_at_rounding_edges(partial(linear, backend=backend), range(2, 9))


@gpu
@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [None, torch.float16, torch.bfloat16, torch.float32])
def test_types_of_inputs_and_bias(backend, dtype, bias):
    """The result is the float32 one on the same inputs, rounded once."""
    weight = quantize_weight(torch.randn(70, 640))
    x = torch.randn(9, 640).to(dtype)
    b = None if bias is None else torch.randn(70, dtype=bias)
    arguments = (pack_codes(weight.codes, 6), weight.scales, weight.exponents, b, 6, backend)
    assert torch.equal(linear(x, *arguments, dtype=dtype), linear(x, *arguments).to(dtype))


@gpu
@each
@pytest.mark.parametrize("tokens", [9, 300])
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_of_any_type_is_added_bit_for_bit(backend, tokens, bias_dtype):
    """To exact sums, so that nothing is rounded but the sum with it, in float32, and then the output."""
    operands, sums, bias = exactness.integers_and_bias(tokens, 300, 70)
    bias = bias.to(bias_dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        right = (sums + bias.float()).to(dtype)
        assert torch.equal(linear(*operands, bias, 8, backend, dtype), right), dtype


@gpu
@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [4, 40])
def test_a_token_that_is_not_finite_gives_nan_and_the_others_do_not(backend, value, tokens):
    layer = FlexQLinear.from_linear(torch.nn.Linear(200, 40), backend=backend).cuda()
    x = torch.randn(tokens, 200, device="cuda")
    right = layer(x)
    x[2, 199] = value
    y = layer(x)
    assert torch.isnan(y[2]).all()
    others = torch.arange(tokens) != 2
    assert torch.equal(y[others], right[others])


@gpu
@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strided_and_misaligned_inputs(backend, dtype):
    layer = FlexQLinear.from_linear(torch.nn.Linear(300, 70), backend=backend).cuda()
    wide = torch.randn(33, 801, device="cuda", dtype=dtype)
    for x in (
        wide[:, 1:301],
        wide[:, ::2][:, :300],
        wide[3:300:4, :300],
        wide.T[:300].T,
        wide.flatten()[7:2107].view(7, 300),
    ):
        assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))
    assert layer(wide[:0, :300]).shape == (0, 70)


@gpu
@each
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_exponents_and_bias_may_begin_anywhere(backend, tokens):
    operands, sums, bias = exactness.integers_and_bias(tokens, 300, 72, "cuda")
    exponents = torch.zeros(73, dtype=torch.int8, device="cuda")
    shifted = torch.zeros(73, dtype=bias.dtype, device="cuda")
    exponents[1:], shifted[1:] = operands[-1], bias
    y = linear_on_gpu(*operands[:-1], exponents[1:], shifted[1:], 8, backend)
    assert torch.equal(y, sums + bias)


@gpu
@each
def test_equal_calls_give_equal_bits(backend):
    layer = FlexQLinear.from_linear(torch.nn.Linear(4096, 1024), backend=backend).cuda().half()
    x = torch.randn(16, 4096, device="cuda", dtype=torch.float16)
    first = layer(x)
    assert all(torch.equal(layer(x), first) for _ in range(50))
    assert torch.equal(layer(x[:9]), first[:9])  # nor does a token's result depend on the tokens beside it


@gpu
@each
def test_two_streams_at_once(backend):
    layers = [FlexQLinear.from_linear(torch.nn.Linear(2048, 512), backend=backend).cuda().half() for _ in range(2)]
    xs = [torch.randn(8, 2048, device="cuda", dtype=torch.float16) for _ in range(2)]
    expected = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(layers[index](xs[index]))
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(y, right) for y in found)


def replays_with_new_data(captured, x, called):
    """What is captured on x gives what is called gives, bit for bit, whatever x then holds."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(x)
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, called(x))


@gpu
@each
def test_a_graph_replayed_with_new_data(backend):
    layers = torch.nn.Sequential(
        *[FlexQLinear.from_linear(torch.nn.Linear(1024, 1024), backend=backend) for _ in range(3)]
    )
    layers = layers.cuda().half()
    x = torch.randn(4, 1024, device="cuda", dtype=torch.float16)
    layers(x)
    replays_with_new_data(layers, x, layers)


@gpu
@pytest.mark.parametrize(("tokens", "features", "outputs"), [(1, 8320, 5000), (3, 6656, 20_000)])
def test_codes_that_blocks_keep_are_not_read_before_they_are_written(tokens, features, outputs):
    """Calls that overlap, whose records lie where those of the call before did."""
    layer = FlexQLinear.from_linear(torch.nn.Linear(features, outputs, device="cuda"), backend="imma").half()
    xs = torch.randn(4, tokens, features, device="cuda", dtype=torch.float16)
    expected = []
    for x in xs:
        expected.append(layer(x))
        torch.cuda.synchronize()
    found = [layer(x) for _ in range(10) for x in xs]
    assert all(torch.equal(y, expected[i % 4]) for i, y in enumerate(found))
    replays_with_new_data(layer, xs[0], layer)


@gpu
@each
def test_compiles_without_a_graph_break(backend):
    layer = FlexQLinear.from_linear(torch.nn.Linear(640, 256), backend=backend).cuda().half()
    layer.prepare()
    x = torch.randn(5, 640, device="cuda", dtype=torch.float16)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    arguments = (x, layer.prepare()[1], layer.weight_exponent, layer.bias, 6, backend)
    torch.library.opcheck(torch.ops.flexq.w6ax_linear_repacked, arguments)


@gpu
@each
@bits_6_8
def test_the_layer_agrees_with_the_reference_and_with_the_canonical_op(backend, activation_bits):
    precision = LayerPrecision(6, activation_bits)
    layer = FlexQLinear.from_linear(torch.nn.Linear(1030, 333), precision=precision, backend=backend).cuda()
    x = torch.randn(2, 9, 1030, device="cuda")
    y = layer(x)
    operands = (*layer.canonical(), layer.weight_exponent, layer.bias, 6, activation_bits, 128)
    expected = ops.w6ax_linear(x, *operands, "reference")
    assert torch.equal(y, ops.w6ax_linear(x, *operands, backend))
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@gpu
@pytest.mark.parametrize("tokens", [1, 32, 33, 64, 65, 300])
def test_auto_equals_the_kernels_it_chooses_from(tokens):
    layer = FlexQLinear.from_linear(torch.nn.Linear(512, 96)).cuda()
    x = torch.randn(tokens, 512, device="cuda")
    y = layer(x)
    layer.backend = cuda.backend_for(tokens, 512, 96, x.device)
    assert torch.equal(layer(x), y)


@gpu
@pytest.mark.parametrize("tokens", [4, 300])
def test_auto_is_compiled_and_captured(tokens):
    """Of few tokens and of many, for which it takes different kernels on Hopper."""
    layer = FlexQLinear.from_linear(torch.nn.Linear(640, 256)).cuda().half()
    x = torch.randn(tokens, 640, device="cuda", dtype=torch.float16)
    right = layer(x)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x), right)
    replays_with_new_data(compiled, x, layer)


@gpu
def test_auto_compiled_once_takes_the_kernel_of_each_number_of_tokens(monkeypatch):
    """The compiled layer chooses when it is called, not when it is traced: on Hopper these numbers take both kernels."""
    layer = FlexQLinear.from_linear(torch.nn.Linear(640, 256)).cuda().half()
    chunks, bits = layer.prepare()[1], layer.precision.activation_bits
    taken, product = [], cuda.linear

    def watched(*operands):
        taken.append(operands[6])
        return product(*operands)

    monkeypatch.setattr(cuda, "linear", watched)
    torch.compiler.reset()  # of what other tests compiled of this class, which counts towards torch's limit
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    numbers = (4, 300, 5, 299)  # from the second on the number is a variable of the compiled code
    right = [layer.backend_for(tokens) for tokens in numbers]
    if torch.cuda.get_device_capability()[0] == 9:
        assert right == ["imma", "wgmma"] * 2
    for tokens, backend in zip(numbers, right, strict=True):
        x = torch.randn(tokens, 640, device="cuda", dtype=torch.float16)
        y = compiled(x)
        assert torch.equal(y, ops.w6ax_linear_repacked(x, chunks, layer.weight_exponent, layer.bias, bits, backend))
        assert taken == [backend] * 2  # by the compiled layer, and by the line above
        taken.clear()


@gpu
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("tokens", [9, 300])
def test_any_device_index(backend, tokens):
    """A layer runs where its tensors are, whichever device is current, and leaves that as it is.

    On a stream of the tensors' device, which no other device can launch on: a default stream is every device's.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    layer = FlexQLinear.from_linear(torch.nn.Linear(4096, 256), backend=backend)
    for current, device in [(0, 1), (1, 0), (1, 1)]:
        x = torch.randn(tokens, 4096)
        right = layer.to("cuda:0")(x.to("cuda:0")).cpu()
        with torch.cuda.stream(torch.cuda.Stream(device)), torch.cuda.device(current):
            found = layer.to(f"cuda:{device}")(x.to(f"cuda:{device}"))
            assert torch.cuda.current_device() == current
            assert found.device.index == device and torch.equal(found.cpu(), right)


@gpu
@each
@bits_6_8
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64, 129, 300])
def test_large_layers_agree_with_the_reference(backend, activation_bits, tokens):
    """More tiles than fit a card at once, the last of them not whole; a block of imma takes several."""
    layer = FlexQLinear.from_linear(
        torch.nn.Linear(640, 40009, device="cuda"), precision=LayerPrecision(6, activation_bits), backend=backend
    )
    x = torch.randn(tokens, 640, device="cuda")
    y = layer(x)
    layer.backend = "reference"
    expected = layer(x)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


IMMA_FORMS = {  # tokens, features, outputs; on a card of 108 to 132 multiprocessors
    "8 tokens, a tile a block": (8, 2100, 3000),
    "8 tokens, a tile a block of longer rows": (8, 4700, 3000),
    "8 tokens, a tile a block of long rows": (5, 8500, 3000),
    "8 tokens, two blocks a multiprocessor": (8, 2100, 4700),
    "8 tokens, two blocks a multiprocessor, the longest rows": (3, 8192, 4300),
    "8 tokens, two blocks a multiprocessor, not a group for every warp": (1, 300, 4300),
    "8 tokens, halves alone": (8, 2100, 1500),
    "8 tokens, halves alone, not a group for every warp": (8, 300, 1500),
    "8 tokens, halves alone, the last without outputs": (8, 2100, 1450),
    "8 tokens, a tile and a half a block of rows too long for two blocks": (8, 8200, 4300),
    "8 tokens, several tiles a block": (8, 2100, 20000),
    "8 tokens, several tiles a block of longer rows": (8, 4700, 20000),
    "8 tokens, several tiles a block of long rows": (8, 7100, 20000),
    "a token, several tiles a block of long rows": (1, 4200, 20000),
    "a token, halves alone": (1, 4200, 1500),
    "a token, several tiles and a half a block": (1, 4200, 17900),
    "a token, a tile and a half a block of the longest rows": (1, 28672, 4300),
    "a token, rows too long to be kept": (1, 28801, 4300),
    "4 tokens, several tiles a block of long rows": (4, 6600, 20000),
    "4 tokens, several tiles and a half a block of long rows": (4, 6600, 17900),
    "4 tokens, several tiles a block of the longest rows for them": (3, 8192, 20000),
    "4 tokens, several tiles a block of longer rows": (4, 8200, 20000),
    "8 tokens, fifteen tiles a block, not a group for every warp": (8, 300, 60000),
    "8 tokens, fifteen tiles a block, a group less than warps": (8, 1900, 60000),
    "8 tokens, fifteen tiles a block, a group more than warps": (8, 2100, 60000),
    "16 tokens, two blocks a multiprocessor": (16, 2100, 4300),
    "16 tokens, several tiles a block": (16, 2100, 9000),
    "32 tokens, two blocks a multiprocessor": (32, 2100, 4300),
    "32 tokens, several tiles a block": (32, 2100, 9000),
    "16 tokens, halves alone": (16, 2100, 1000),
    "32 tokens, halves alone": (32, 2100, 1000),
    "64 tokens, halves alone": (64, 2100, 1000),
    "64 tokens, halves of weights that two tiles share": (100, 2100, 1000),
    "64 tokens, several tiles a block": (64, 2100, 9000),
    "64 tokens, several tiles a block, four of the same weights": (200, 2100, 4300),
}


TILINGS = [  # tokens, features, outputs → rows of a tile, its teams, its tokens, blocks that share one, whole before, by halves
    (16, 300, 500, (128, 1, 16, 1, 1, False)),
    (16, 300, 17300, (128, 1, 16, 1, 2, False)),
    (16, 1100, 17000, (128, 1, 16, 1, 0, False)),
    (16, 8192, 20100, (128, 1, 16, 2, 1, False)),
    (16, 3300, 17300, (128, 1, 16, 3, 1, False)),
    (16, 4100, 17300, (128, 1, 16, 4, 1, False)),
    (16, 2500, 4300, (128, 1, 16, 2, 0, False)),
    (16, 3300, 8900, (128, 1, 16, 3, 0, False)),
    (16, 14000, 6100, (128, 1, 16, 4, 0, False)),
    (16, 14000, 2300, (128, 1, 16, 5, 0, False)),
    (16, 5100, 5000, (128, 1, 16, 5, 0, False)),
    (16, 7900, 100, (128, 1, 16, 6, 0, False)),
    (16, 1100, 500, (64, 3, 16, 1, 0, False)),
    (16, 4000, 6500, (64, 3, 16, 1, 0, False)),
    (16, 5100, 6500, (64, 3, 16, 1, 0, False)),
    (16, 2100, 500, (64, 3, 16, 2, 0, False)),
    (16, 6600, 4000, (64, 3, 16, 2, 0, False)),
    (16, 3700, 13700, (64, 2, 16, 1, 0, False)),
    (16, 6600, 10300, (64, 2, 16, 1, 0, False)),
    (30, 300, 500, (128, 1, 32, 1, 1, False)),
    (30, 2100, 500, (64, 2, 32, 2, 0, False)),
    (30, 28672, 20100, (128, 1, 32, 2, 1, False)),
    (30, 3300, 500, (64, 2, 32, 3, 0, False)),
    (30, 4100, 19400, (128, 1, 32, 3, 1, False)),
    (30, 4100, 500, (64, 2, 32, 3, 0, False)),
    (30, 4100, 17300, (128, 1, 32, 4, 1, False)),
    (30, 1100, 500, (64, 3, 32, 1, 0, False)),
    (30, 1200, 6300, (64, 3, 32, 1, 0, False)),
    (30, 28672, 8300, (64, 3, 32, 1, 0, False)),
    (30, 640, 17300, (128, 1, 32, 1, 0, False)),
    (30, 5100, 10300, (64, 2, 32, 1, 0, False)),
    (30, 2600, 15500, (64, 2, 32, 1, 0, False)),
    (30, 14000, 13100, (128, 1, 32, 2, 0, False)),
    (30, 200, 23500, (128, 1, 32, 1, 2, False)),
    (30, 3300, 8900, (128, 1, 32, 3, 0, False)),
    (30, 5100, 6500, (64, 3, 32, 1, 0, False)),
    (30, 4100, 5000, (64, 3, 32, 1, 0, False)),
    (30, 18600, 6100, (128, 1, 32, 4, 0, False)),
    (30, 5100, 5000, (128, 1, 32, 5, 0, False)),
    (30, 6600, 4000, (64, 2, 32, 2, 0, False)),
    (30, 6600, 4400, (128, 1, 32, 6, 0, False)),
    (60, 300, 500, (128, 1, 64, 1, 1, False)),
    (60, 300, 25700, (128, 1, 64, 1, 2, False)),
    (60, 2100, 500, (64, 2, 64, 2, 0, False)),
    (60, 3300, 500, (64, 2, 64, 3, 0, False)),
    (60, 4100, 500, (64, 2, 64, 3, 0, False)),
    (60, 20000, 17300, (128, 1, 64, 4, 1, False)),
    (60, 28672, 4100, (64, 2, 64, 2, 0, False)),
    (60, 28672, 8300, (64, 3, 64, 1, 0, False)),
    (60, 2100, 25700, (128, 1, 64, 1, 0, False)),
    (60, 6600, 13100, (64, 2, 64, 1, 0, False)),
    (60, 1100, 13700, (64, 2, 64, 1, 0, False)),
    (60, 3300, 16800, (64, 2, 64, 1, 0, False)),
    (60, 2500, 4300, (128, 1, 64, 2, 0, False)),
    (60, 2000, 4300, (64, 3, 64, 1, 0, False)),
    (60, 1100, 500, (64, 3, 64, 1, 0, False)),
    (60, 3300, 8900, (128, 1, 64, 3, 0, False)),
    (60, 1100, 6300, (64, 3, 64, 1, 0, False)),
    (60, 5100, 6500, (64, 3, 64, 1, 0, False)),
    (60, 18600, 6100, (128, 1, 64, 4, 0, False)),
    (60, 12500, 5900, (128, 1, 64, 5, 0, False)),
    (60, 6600, 4400, (128, 1, 64, 6, 0, False)),
    (100, 300, 500, (128, 1, 128, 1, 1, False)),
    (300, 300, 8900, (128, 1, 128, 1, 2, False)),
    (100, 2100, 500, (64, 2, 128, 2, 0, False)),
    (100, 2100, 4300, (128, 1, 128, 2, 0, False)),
    (300, 16500, 13100, (128, 1, 128, 2, 2, False)),
    (100, 3300, 500, (64, 2, 128, 3, 0, False)),
    (100, 3300, 4300, (128, 1, 128, 3, 0, False)),
    (100, 4100, 500, (64, 2, 128, 3, 0, False)),
    (100, 20000, 17300, (128, 1, 128, 4, 1, False)),
    (100, 5100, 2500, (128, 1, 128, 5, 0, False)),
    (100, 1100, 500, (64, 3, 128, 1, 0, False)),
    (100, 1024, 6300, (64, 3, 128, 1, 0, False)),
    (100, 1200, 6300, (64, 3, 128, 1, 0, False)),
    (700, 300, 4500, (128, 1, 256, 1, 1, False)),
    (700, 300, 8900, (128, 1, 256, 1, 2, False)),
    (2048, 12000, 1000, (128, 1, 256, 2, 0, False)),
    (2048, 16500, 3000, (128, 1, 256, 2, 1, False)),
    (2048, 2100, 5000, (128, 1, 256, 2, 2, False)),
    (700, 3300, 1500, (128, 1, 256, 3, 0, False)),
    (2048, 9400, 300, (128, 1, 256, 4, 0, False)),
    (500, 14300, 1400, (128, 1, 256, 5, 0, False)),
    (500, 5100, 1400, (64, 3, 128, 1, 0, False)),
    (1024, 16500, 500, (64, 2, 128, 2, 0, False)),
    (60, 300, 17300, (192, 1, 64, 1, 1, False)),
    (60, 5100, 10300, (192, 1, 64, 2, 0, False)),
    (60, 5600, 5100, (192, 1, 64, 4, 0, False)),
    (60, 26300, 2900, (192, 1, 64, 6, 0, False)),
    (300, 300, 6000, (192, 1, 128, 1, 1, False)),
    (300, 300, 11700, (192, 1, 128, 1, 2, False)),
    (1024, 4100, 1500, (192, 1, 128, 2, 0, False)),
    (300, 2600, 20100, (192, 1, 128, 2, 2, False)),
    (300, 21700, 2100, (192, 1, 128, 3, 0, False)),
    (100, 16500, 29200, (192, 1, 128, 3, 1, False)),
    (300, 3300, 17300, (192, 1, 128, 3, 2, False)),
    (700, 4000, 900, (192, 1, 128, 4, 0, False)),
    (700, 740, 12100, (192, 1, 128, 1, 3, False)),
    (300, 2000, 25500, (192, 1, 128, 2, 3, False)),
    (300, 6600, 8900, (192, 1, 128, 4, 1, False)),
    (250, 16500, 25700, (192, 1, 128, 4, 2, False)),
    (100, 12000, 4000, (64, 2, 128, 2, 0, False)),
    (250, 28672, 1500, (192, 1, 128, 6, 0, False)),
    (2100, 2100, 100, (64, 2, 128, 2, 0, False)),
    (2100, 16500, 100, (64, 2, 128, 3, 0, False)),
    (2100, 16500, 400, (64, 3, 128, 1, 0, False)),
    (16, 2100, 28000, (128, 1, 16, 1, 0, False)),
    (60, 640, 18300, (192, 1, 64, 1, 1, False)),
    (100, 2400, 9000, (128, 1, 128, 1, 1, False)),
    (300, 2400, 3200, (128, 1, 128, 1, 1, False)),
    (2100, 128, 16500, (128, 1, 256, 1, 9, False)),
    (2100, 128, 17000, (192, 1, 128, 1, 12, False)),
    (2100, 300, 16500, (128, 1, 256, 1, 9, False)),
    (2100, 300, 17000, (192, 1, 128, 1, 12, False)),
    (2100, 640, 16500, (128, 1, 256, 1, 9, False)),
    (2100, 640, 17000, (192, 1, 128, 1, 12, False)),
    (750, 7000, 16500, (128, 1, 256, 1, 3, False)),
    (700, 2100, 6500, (128, 1, 256, 2, 1, True)),
    (2100, 2100, 2300, (128, 1, 256, 2, 1, True)),
    (700, 3300, 11300, (128, 1, 256, 2, 2, True)),
    (2100, 3300, 4100, (128, 1, 256, 2, 2, True)),
    (1000, 2100, 16900, (128, 1, 256, 2, 4, True)),
    (2100, 2100, 11300, (128, 1, 256, 2, 6, True)),
    (700, 3300, 5700, (128, 1, 256, 3, 1, True)),
    (700, 4100, 5700, (128, 1, 256, 4, 1, True)),
    (1000, 12000, 4700, (128, 1, 256, 4, 1, False)),
    (700, 12000, 11300, (128, 1, 256, 4, 2, False)),
    (700, 3300, 6100, (192, 1, 128, 2, 1, False)),
]
"""What wgmma does on an H200: with each size of block the splits that it is known to choose, with whole tiles before it and
without, and more and fewer groups than stages, in odd numbers and even ones; by halves, some without tokens, after one to six
whole tiles. Nine tiles begin at each of four stages in either parity, twelve at each of six."""


def tiling_id(tokens, features, outputs, tiling):
    rows, teams, tile_tokens, split, whole, halves = tiling
    shared = "shared by halves" if halves else "shared"
    return f"wgmma, {tokens} x {features} x {outputs}: {rows} x {tile_tokens}, {teams} teams, {whole} whole, {shared} by {split}"


@gpu
@pytest.mark.parametrize("outputs_over", [0, 3])  # of a token wgmma stores several at once, and one by one
@pytest.mark.parametrize(
    ("backend", "tokens", "features", "outputs"),
    [pytest.param("imma", *shape, id=f"imma, {form}") for form, shape in IMMA_FORMS.items()]
    + [pytest.param("wgmma", *tiling[:3], id=tiling_id(*tiling)) for tiling in TILINGS],
)
def test_every_form_gives_integers_for_integers(backend, tokens, features, outputs, outputs_over):
    """Bit for bit, in all rows and columns, in outputs and with a bias of each type; most last tiles are not whole."""
    operands, sums, bias = exactness.integers_and_bias(tokens, features, outputs + outputs_over, "cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        right = (sums + bias.to(dtype).float()).to(dtype)
        assert torch.equal(linear_on_gpu(*operands, bias.to(dtype), 8, backend, dtype), right), dtype


@gpu
@pytest.mark.parametrize(
    ("tokens", "features", "outputs", "tiling"), [pytest.param(*each, id=tiling_id(*each)) for each in TILINGS]
)
def test_the_forms_of_wgmma_are_what_runs(tokens, features, outputs, tiling):
    """Other cards have other multiprocessors for clusters."""
    if "H200" not in torch.cuda.get_device_name():
        pytest.skip("the tilings are an H200's")
    kernels = build.cuda_kernels(torch.device("cuda", 0))
    for over in (0, 3):
        case = (tokens, outputs + over, group_count(features), cuda.token_tiles(tokens, "wgmma"))
        assert kernels.wgmma_tiling(*case) == tiling


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [16400, 16403])  # of a token stored eight at once, and one by one
def test_a_block_of_several_tiles_computes_what_blocks_of_one_do(dtype, outputs):
    """wgmma: the last rows by themselves are a tile for a few blocks, in other places of it. Five groups are too few to share."""
    linear = torch.nn.Linear(640, outputs, device="cuda")
    last = torch.nn.Linear(640, 1000, device="cuda")
    last.load_state_dict({"weight": linear.weight[-1000:], "bias": linear.bias[-1000:]})
    x = torch.randn(700, 640, device="cuda").to(dtype)
    many, few = (FlexQLinear.from_linear(layer, backend="wgmma")(x) for layer in (linear, last))
    assert torch.equal(many[:, -1000:], few)


@gpu
@pytest.mark.parametrize(
    ("tokens", "features", "outputs", "rows"),
    [
        pytest.param(8, 2100, 3000, slice(0, 1500), id="tiles and halves"),
        pytest.param(64, 2100, 3000, slice(32, 1032), id="tiles and halves of many tokens"),
        pytest.param(1, 6600, 3000, slice(0, 1500), id="tiles and halves of a row"),
        pytest.param(4, 6600, 18000, slice(17408, 18000), id="halves of turns before and without"),
    ],
)
def test_an_output_has_the_same_bits_in_a_tile_and_in_a_half(tokens, features, outputs, rows):
    """imma: the rows by themselves are few tiles, which go by halves."""
    linear = torch.nn.Linear(features, outputs, dtype=torch.float16, device="cuda")
    few = torch.nn.Linear(features, rows.stop - rows.start, dtype=torch.float16, device="cuda")
    few.load_state_dict({"weight": linear.weight[rows], "bias": linear.bias[rows]})
    x = torch.randn(tokens, features, device="cuda")
    many, alone = (FlexQLinear.from_linear(layer, backend="imma")(x) for layer in (linear, few))
    assert torch.equal(many[:, rows], alone)


@gpu
@each
@pytest.mark.parametrize(("outputs", "groups"), [(1, 1), (32, 3), (45, 2), (257, 40)])
def test_repacked_weights_are_read_back_bit_for_bit(backend, outputs, groups):
    codes = torch.randint(-32, 32, (outputs, groups * 128), dtype=torch.int8)
    packed, scales = pack_codes(codes, 6).cuda(), torch.rand(outputs, groups).half().cuda()
    found = unpack_chunks(cuda.repack(packed, scales, backend), outputs, planes=backend == "bmma")
    assert torch.equal(found[0], packed) and torch.equal(found[1], scales)


def test_what_vectors_cannot_read_and_weights_of_no_group_are_refused_before_a_launch():
    odd = torch.zeros(1 + 3136, dtype=torch.uint8)[1:].view(1, 1, 3136)
    records, exponents, out = (
        torch.zeros(1056, dtype=torch.uint8),
        torch.zeros(32, dtype=torch.int8),
        torch.zeros(1, 32),
    )
    with pytest.raises(ValueError, match=r"chunks starts at an address of \d+ modulo 16; accepted: a multiple of 16"):
        cuda.linear(records, 1, odd, exponents, None, 6, "imma", out)
    with pytest.raises(ValueError, match=r"chunks have shape \(1, 0, 3136\); accepted: weights of at least one group"):
        cuda.linear(records, 1, odd[:, :0], exponents, None, 6, "imma", out)


def packed_zeros(outputs, groups, bits=6, device="cpu"):
    weight = torch.zeros(outputs, groups * 16 * bits, dtype=torch.uint8, device=device)
    return weight, torch.zeros(outputs, groups, dtype=torch.float16, device=device)


@pytest.mark.parametrize(
    ("changes", "backend", "error", "text"),
    [
        ({}, "cpu", ValueError, "backend is 'cpu'; accepted for repacked weights: auto, imma, bmma, wgmma"),
        (
            {"weight": torch.zeros(96, 192)},
            "imma",
            TypeError,
            r"weight is torch.float32 of shape \(96, 192\); accepted",
        ),
        ({"scale": torch.zeros(96, 2)}, "imma", TypeError, "weight_scale is torch.float32 .* accepted: torch.float16"),
        (
            {"scale": packed_zeros(95, 2)[1]},
            "bmma",
            ValueError,
            r"weight has shape \(96, 192\), weight_scale \(95, 2\)",
        ),
        ({"scale": packed_zeros(96, 0)[1]}, "bmma", ValueError, r"weight_scale \(96, 0\); .* `canonical\(\)`"),
        ({"weight": packed_zeros(96, 0)[0]}, "auto", ValueError, r"weight has shape \(96, 0\)"),
        ({"weight": packed_zeros(96, 1, bits=9)[0]}, "bmma", ValueError, "with weights of 2, 3, 4, 5, 6, 7, 8 bits"),
        ({"weight": packed_zeros(96, 2, bits=4)[0]}, "wgmma", ValueError, "for 'wgmma': .* with weights of 6 bits"),
        ({}, "imma", ValueError, "weight is on cpu, weight_scale on cpu; accepted: one CUDA device"),
    ],
    ids=str,
)
def test_weights_and_scales_that_do_not_fit_each_other_are_not_repacked(changes, backend, error, text):
    weight, scale = packed_zeros(96, 2)
    with pytest.raises(error, match=text):
        cuda.repack(changes.get("weight", weight), changes.get("scale", scale), backend)


@gpu
@each
def test_a_gpu_holds_weights_once_and_the_state_dict_is_canonical(backend):
    layer = FlexQLinear.from_linear(torch.nn.Linear(1024, 512, bias=False), backend=backend)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.cuda().prepare()
    held = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert held == layer.weight_bytes() == 512 * (1024 * 6 // 8 + 8 * 2 + 1)
    found = layer.state_dict()
    assert list(found) == list(stored)
    assert all(torch.equal(found[name].cpu(), stored[name]) for name in stored)


@gpu
def test_moving_or_loading_a_layer_repacks_it():
    layer = FlexQLinear.from_linear(torch.nn.Linear(256, 96)).cuda()
    assert layer.prepare()[0] == "auto"
    x = torch.randn(3, 256, device="cuda")
    y = layer(x)
    other = FlexQLinear.from_linear(torch.nn.Linear(256, 96)).cuda()
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    layer.backend = "reference"
    assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()
    assert (layer.cpu()(x.cpu()) - y.cpu()).abs().max() <= 1e-5 * y.abs().max()


@gpu
def test_what_does_not_fit_is_refused_before_a_launch():
    layer = FlexQLinear.from_linear(torch.nn.Linear(256, 96)).cuda()
    chunks, exponent = layer.prepare()[1], layer.weight_exponent
    x = torch.randn(3, 256, device="cuda")

    def call(x=x, chunks=chunks, exponent=exponent, bias=None, bits=6, backend="imma"):
        return ops.w6ax_linear_repacked(x, chunks, exponent, bias, bits, backend)

    with pytest.raises(TypeError, match="x is torch.float64"):
        call(x=x.double())
    with pytest.raises(
        ValueError, match=r"chunks has shape \(3, 2, 3136\); accepted: \(3, 3, 3136\) for x of 300 features"
    ):
        call(x=torch.randn(3, 300, device="cuda"))
    with pytest.raises(TypeError, match="chunks is torch.int8; accepted: torch.uint8"):
        call(chunks=chunks.view(torch.int8))
    with pytest.raises(ValueError, match="weight_exponent is on cpu, x on cuda:0; accepted: one device"):
        call(exponent=exponent.cpu())
    with pytest.raises(ValueError, match="x is on cpu; accepted: a CUDA device"):
        call(x=x.cpu())
    with pytest.raises(ValueError, match="activation bits is 9; accepted: 2, 3, 4, 5, 6, 7, 8"):
        call(bits=9)
    planes = cuda.repack(*packed_zeros(96, 2, bits=4, device="cuda"), "bmma")
    assert planes.shape == (3, 2, 2112)  # of 4 bits
    with pytest.raises(ValueError, match=r"chunks has shape \(3, 2, 2112\); accepted: \(3, 2, 3136\)"):
        call(chunks=planes)
    with pytest.raises(ValueError, match=r"chunks has shape \(3, 2, 2112\); accepted: \(3, 3, 2112\) for x of 300"):
        call(x=torch.randn(3, 300, device="cuda"), chunks=planes, backend="bmma")
    with pytest.raises(ValueError, match="backend is 'cpu'; accepted for repacked weights: auto, imma, bmma, wgmma"):
        call(backend="cpu")
    with pytest.raises(ValueError, match="not contiguous"):
        call(chunks=chunks.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="bias has shape"):
        call(bias=torch.zeros(7, device="cuda"))
