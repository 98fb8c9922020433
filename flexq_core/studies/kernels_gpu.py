"""Kernel times on a GPU: each method's operands and product, and the CUDA graphs that replay it on cold weights.

One harness for all methods. A layer's weights lie there in so many copies that a copy has left the L2 cache when its turn
comes again; a graph holds one launch after the other, on the copies in turn, and a time is that of a replay divided by its
launches. `gemm_us` is the product alone, its operands quantised beforehand; FlexQ's `median_us` is the whole layer, which
quantises its activations as well; their graphs are replayed in turn, so that the difference is what that adds and not what
the card's clock did in between. With few tokens two more are, by themselves: `norm_us` is RMSNorm by torch and the product
alone, `norm_quantize_us` the same with the norm fused with quantisation, as a decoder block has it. Where a library takes
only some numbers of rows, or is faster with more, each padding that it takes is timed and the fastest counts;
`fewest_rows_us` is the time with the fewest rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexq_core.quant import LayerPrecision
from flexq_core.runtime import auto, cuda, ops
from flexq_core.runtime.activations import rms_norm
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.workbook.records import Measurement, Skipped

DEFINITION_BOUND = 2e-4
"""Relative error of FlexQ's float16 outputs against the `reference` backend's: sums that round differently change the last bit
of few of them, which comes to some 3e-5; one wrong group in a row of a hundred to 1e-1."""

CHECKED_TOKENS = 128
"""Of more, so many are compared with what they should be, from first to last; of a tile of 64 tokens in 8192 there is one."""
COMPILED_TOKENS = 8
"""Up to so many torchao's INT8 weights are timed: every number of tokens is a compile of seconds. For one token torch.compile
makes one kernel of the cast and the product, as fast as the weights are read; 4 and 8 took an H100 20 to 70 times as long."""

NORMED_TOKENS = 64
"""Up to so many FlexQ's layer is timed after a norm as well: of more, what quantisation adds is lost in the product."""

_NORM_EPS = 1e-5
_LEAST_COPIES = 3
_LEAST_LAUNCHES = 48  # so that what a replay itself takes, some microseconds, is lost among them
_LEAST_REPLAY_US = 2000  # or so long a replay: many launches of milliseconds tell no more
_WARM_UP_S = 0.01
_QUEUE_CYCLES = 2_000_000  # about a millisecond, in which replays queue up: what is timed is the GPU, not the launches


class Product(NamedTuple):
    """One way to multiply by a copy of the weights.

    launch: a copy → what the kernel writes; this is timed.  value: that → [tokens, outputs] float32.  note: for the record.
    """

    launch: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor] = Tensor.float
    note: str = ""


class GpuLayers:
    """A linear layer of one shape under one method, and as many copies of its weights as keep each out of the L2 cache.

    shape: N × K.  method: one of METHODS.  activation_bits, weight_bits: FlexQ's.  device: a CUDA device.
    Raises Skipped where this machine cannot run the method.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        method: str,
        activation_bits: int,
        device: str,
        seed: int,
        weight_bits: int = 6,
    ) -> None:
        if method not in METHODS:
            raise Skipped(f"{method} runs on processors, or waits for one, and no CUDA graph can replay it")
        self.shape, self.method, self.device = shape, method, torch.device(device)
        torch.cuda.empty_cache()  # what earlier graphs held
        outputs, features = shape
        generator = torch.Generator(self.device).manual_seed(seed)
        self.weight = torch.randn(outputs, features, generator=generator, device=self.device) / math.sqrt(features)
        self._operands = METHODS[method](self.weight, LayerPrecision(weight_bits, activation_bits), method)
        stored = self._operands.stored
        cold = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
        size = getattr(self._operands, "stored_bytes", stored.numel() * stored.element_size())
        count = max(_LEAST_COPIES, 1 + math.ceil(cold / size))
        self.copies = [stored, *(stored.clone() for _ in range(count - 1))]

    def measure(self, x: Tensor, replays: int, bound: float) -> dict[str, Measurement]:
        """Times and errors for activations x, metric → value.

        x: [M, K] floating point, taken as float16.  replays: timed ones.  bound: the largest relative error against float32
        that is right.
        Raises RuntimeError, before anything is timed, for an output that is wrong; Skipped where the library refuses.
        """
        x = x.to(self.device, torch.float16)
        checked = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_TOKENS), device=self.device).round().long()
        truth = F.linear(x[checked].float(), self.weight)
        products = [(product, product.value(y)) for product, y in self._taken(self._operands.products(x))]
        error = max(self._require("float32", y, truth, bound, checked) for _, y in products)
        layer, normed = getattr(self._operands, "layer", None), {}
        measured = {"error": Measurement(error, "1")}
        if layer is not None:
            normed = self._normed(x, bound, checked)
            definition, whole = self._operands.definition(x[checked]), layer(x, self.copies[0])
            errors = [
                self._require("its definition", y, definition, DEFINITION_BOUND, checked)
                for y in (whole, products[0][1])
            ]
            measured["definition_error"] = Measurement(max(errors), "1")
        products = [product for product, _ in products]  # what they computed may fill gigabytes
        ways = [product.launch for product in products]
        if layer is not None:
            ways.append(lambda copy: layer(x, copy))
        found = self._times_us(ways, replays)
        if layer is not None:
            measured |= _quantiles("median_us p10_us p90_us", found.pop())
        if normed:  # in a pass of their own: more graphs in turn load the card so that the largest layers slow down
            after_norm = self._times_us(list(normed.values()), replays)
            measured |= {metric: _median(times) for metric, times in zip(normed, after_norm, strict=True)}
        timed = [(times, product.note) for times, product in zip(found, products, strict=True)]
        times, note = min(timed, key=lambda each: _median(each[0]).value)
        if len(timed) > 1:
            measured["fewest_rows_us"] = _median(*timed[0])
        return measured | _quantiles("gemm_us gemm_p10_us gemm_p90_us", times, note)

    def _normed(self, x: Tensor, bound: float, checked: Tensor) -> dict[str, Callable[[Tensor], Any]]:
        """A decoder's kernels after RMSNorm, by the metric that each way is timed for.

        Empty with many tokens, and of rows that are longer than a fused norm takes.
        """
        if self.method not in auto.CHOICES or len(x) > NORMED_TOKENS or self.shape[1] > cuda.MOST_NORM_FEATURES:
            return {}
        weight = torch.linspace(0.5, 1.5, self.shape[1], device=self.device).half()
        ways = self._operands.normed(x, cuda.Norm(weight, None, _NORM_EPS, centred=False))
        expected = F.linear(rms_norm(x[checked], weight, _NORM_EPS).float(), self.weight)
        for metric, way in ways.items():
            self._require(f"float32, for {metric}", way(self.copies[0]), expected, bound, checked)
        return ways

    def _taken(self, products: list[Product]) -> list[tuple[Product, Tensor]]:
        """Those that the library takes, each with what it computes."""
        taken, refusal = [], ""
        for product in products:
            try:
                taken.append((product, product.launch(self.copies[0])))
            except RuntimeError as error:
                if self.method in cuda.ORDERS:  # ours takes everything
                    raise
                refusal = str(error).splitlines()[0]
        if not taken:
            raise Skipped(f"{self.method} refuses {'x'.join(map(str, self.shape))}: {refusal}")
        return taken

    def _require(self, what: str, y: Tensor, expected: Tensor, bound: float, checked: Tensor) -> float:
        """The relative error of the checked tokens; RuntimeError where it is beyond its bound, or any output is not finite."""
        error = ((y[checked].float() - expected.float()).norm() / expected.float().norm()).item()
        if not (error <= bound and y.isfinite().all()):  # a nan is not within any bound
            shape = "x".join(map(str, self.shape))
            case = f"{self.method} is wrong at {shape}, {len(y)} tokens"
            raise RuntimeError(f"{case}: relative error {error} against {what}, bound {bound}")
        return error

    def _times_us(self, ways: list[Callable[[Tensor], Any]], replays: int) -> list[Tensor]:
        launches = [[partial(way, copy) for copy in self.copies] for way in ways]
        return replayed_us(launches, replays)


def replayed_us(ways: list[list[Callable[[], Any]]], replays: int) -> list[Tensor]:
    """Time of a launch when a CUDA graph replays a way's in turn: for each way [replays] float64 microseconds.

    The ways take turns, a replay each, so that what else happens to the card in that time happens to all.
    """
    graphs = [_captured(launches) for launches in ways]
    end = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < end:
        for graph, _ in graphs:
            graph.replay()
        torch.cuda.synchronize()
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)] for _ in graphs]
    torch.cuda._sleep(_QUEUE_CYCLES)
    for turn in zip(*events, strict=True):
        for (graph, _), (before, after) in zip(graphs, turn, strict=True):
            before.record()
            graph.replay()
            after.record()
    torch.cuda.synchronize()
    return [
        torch.tensor([before.elapsed_time(after) * 1e3 / launched for before, after in mine], dtype=torch.float64)
        for (_, launched), mine in zip(graphs, events, strict=True)
    ]


def _captured(launches: list[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of these in turn, again and again until a replay takes long enough, and how many it holds."""
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for launch in launches[:_LEAST_COPIES]:  # libraries choose and allocate now: a capture may not
            launch()
        torch.cuda._sleep(_QUEUE_CYCLES)
        before.record()
        launches[0]()
        after.record()
    torch.cuda.synchronize()
    enough = math.ceil(_LEAST_REPLAY_US / (before.elapsed_time(after) * 1e3 or 1))
    graph = torch.cuda.CUDAGraph()
    rounds = math.ceil(min(_LEAST_LAUNCHES, enough) / len(launches))
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches * rounds:
            launch()
    return graph, rounds * len(launches)


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: libraries keep a workspace for every stream they have seen


def _quantiles(metrics: str, times: Tensor, note: str = "") -> dict[str, Measurement]:
    median, p10, p90 = metrics.split()
    tails = {p10: 0.1, p90: 0.9}
    return {median: _median(times, note)} | {m: Measurement(times.quantile(q).item(), "us") for m, q in tails.items()}


def _median(times: Tensor, note: str = "") -> Measurement:
    return Measurement(times.quantile(0.5).item(), "us", note)


class _FlexQ:
    """The CUDA kernels, on weights in the order that the backend reads."""

    def __init__(self, weight: Tensor, precision: LayerPrecision, backend: str) -> None:
        self._bits, self._backend = precision.activation_bits, backend
        try:
            ops.resolve_backend(backend, weight.device, precision.weight_bits, activation_bits=self._bits)
        except ValueError as obstacle:
            raise Skipped(str(obstacle)) from None
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self._layer = FlexQLinear.from_linear(linear, precision=precision, backend=backend)
        self.stored = self._layer.prepare()[1]
        self._packed = (*self._layer.canonical(), self._layer.weight_exponent)  # from what the kernel reads

    def products(self, x: Tensor) -> list[Product]:
        exponent = self._layer.weight_exponent
        records = cuda.quantize_activation(x, self._bits, self._backend)
        out = x.new_full((len(x), len(exponent)), torch.nan)
        arguments = (exponent, None, self._bits, self._backend, out)
        return [Product(lambda chunks: cuda.linear(records, len(x), chunks, *arguments))]

    def layer(self, x: Tensor, chunks: Tensor) -> Tensor:
        exponent = self._layer.weight_exponent
        return ops.w6ax_linear_repacked(x, chunks, exponent, None, self._bits, self._backend)

    def normed(self, x: Tensor, norm: cuda.Norm) -> dict[str, Callable[[Tensor], Tensor]]:
        """The layer after a norm: torch's beside the product of what was quantised before, and fused with quantisation."""
        exponent, eps = self._layer.weight_exponent, norm.eps
        records = cuda.rms_norm_quantize(x, norm.weight, eps, self._bits, self._backend)
        arguments = (exponent, None, self._bits, self._backend)
        out_apart, out_fused = (x.new_full((len(x), len(exponent)), torch.nan) for _ in range(2))

        def apart(chunks: Tensor) -> Tensor:
            F.rms_norm(x, x.shape[1:], norm.weight, eps)
            return cuda.linear(records, len(x), chunks, *arguments, out_apart)

        def fused(chunks: Tensor) -> Tensor:
            if self._layer.takes_norm(x):
                return cuda.linear_of_row(x, chunks, exponent, None, self._bits, norm)[0]
            quantized = cuda.rms_norm_quantize(x, norm.weight, eps, self._bits, self._backend)
            return cuda.linear(quantized, len(x), chunks, *arguments, out_fused)

        return {"norm_us": apart, "norm_quantize_us": fused}

    def definition(self, x: Tensor) -> Tensor:
        bits, group_size = self._layer.precision.weight_bits, self._layer.group_size
        return ops.w6ax_linear(x, *self._packed, None, bits, self._bits, group_size, "reference")


class _Floating:
    """cuBLAS on unquantised operands."""

    def __init__(self, weight: Tensor, precision: LayerPrecision, method: str) -> None:
        self.stored = weight.to(DTYPES[method])

    def products(self, x: Tensor) -> list[Product]:
        x = x.to(self.stored.dtype)
        return [Product(lambda weight: F.linear(x, weight))]


class _CublasInt8:
    """`torch._int_mm`: weights with a scale an output, activations with one a token; the sums are left as int32."""

    def __init__(self, weight: Tensor, precision: LayerPrecision, method: str) -> None:
        self.stored, self._scale = _int8_rows(weight)

    def products(self, x: Tensor) -> list[Product]:
        codes, scale = _int8_rows(x.float())

        def product(rows: int) -> Product:
            padded = F.pad(codes, (0, 0, 0, rows - len(x)))
            return Product(
                lambda weight: torch._int_mm(padded, weight.t()),
                lambda sums: sums[: len(x)] * scale * self._scale.t(),
                f"operands quantised before, sums scaled after, neither timed; {rows} rows",
            )

        least = max(len(x), 17)  # it takes no fewer
        return [product(rows) for rows in sorted({least, -(-least // 32) * 32})]


class _CublasltFp8:
    """`torch._scaled_mm`: e4m3 with one scale a tensor, which the product applies, and float16 outputs."""

    def __init__(self, weight: Tensor, precision: LayerPrecision, method: str) -> None:
        if torch.cuda.get_device_capability(weight.device) < (8, 9):
            raise Skipped(f"{torch.cuda.get_device_name(weight.device)} has no FP8 tensor cores")
        self.stored, self._scale = _fp8(weight)

    def products(self, x: Tensor) -> list[Product]:
        def product(rows: int) -> Product:
            codes, scale = _fp8(F.pad(x.float(), (0, 0, 0, rows - len(x))))
            scales = {"scale_a": scale, "scale_b": self._scale}
            options = {"out_dtype": torch.float16, "use_fast_accum": True}
            return Product(
                lambda weight: torch._scaled_mm(codes, weight.t(), **scales, **options),
                lambda y: y[: len(x)].float(),
                f"operands quantised before, not timed; {rows} rows",
            )

        return [product(rows) for rows in sorted({len(x), -(-len(x) // 16) * 16, max(len(x), 32)})]


class _TorchaoInt8:
    """torchao's weight-only INT8, compiled, as it is meant to be used."""

    def __init__(self, weight: Tensor, precision: LayerPrecision, method: str) -> None:
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise Skipped(f"torchao cannot be imported ({error}): python -m pip install --upgrade torchao") from None
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        quantize_(linear, Int8WeightOnlyConfig())
        self.stored = linear.weight.data
        self.stored_bytes = weight.numel()  # the tensor says it is bfloat16

    def products(self, x: Tensor) -> list[Product]:
        if len(x) > COMPILED_TOKENS:
            raise Skipped(f"torchao's weight-only INT8 is meant for few tokens; up to {COMPILED_TOKENS} are timed")
        x = x.bfloat16()
        torch.compiler.reset()  # after eight shapes of one function torch would compile no more, and not say so
        product = torch.compile(F.linear, dynamic=False)
        return [Product(lambda weight: product(x, weight))]


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] float32 → codes [R, K] int8 and a scale a row [R, 1]."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] float32 → codes [R, K] float8_e4m3fn and one scale."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = x.abs().amax() / largest
    return (x / scale).clamp_(-largest, largest).to(torch.float8_e4m3fn), scale


DTYPES = {"torch-fp32": torch.float32, "torch-fp16": torch.float16, "torch-bf16": torch.bfloat16}
LIBRARIES = {"cublas-int8": _CublasInt8, "cublaslt-fp8": _CublasltFp8, "torchao-int8wo": _TorchaoInt8}
"""Methods that run on GPUs only, beside FlexQ's own."""
METHODS: dict[str, Callable[[Tensor, LayerPrecision, str], Any]] = {
    **dict.fromkeys(cuda.ORDERS, _FlexQ),
    **dict.fromkeys(DTYPES, _Floating),
    **LIBRARIES,
}
"""Method → what makes its operands from weight [N, K] float32, FlexQ's precision and its own name."""
