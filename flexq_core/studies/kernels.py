"""Kernel times by shape, method and tokens, beside torch's own products and what the machine allows (FlexQ §4.3).

A method is a backend of the op or one of torch's own. All go through one harness: the same warm-up, single calls, cold
weights (each call takes the copy that was used longest ago; the others together exceed twice the last cache), and an
output that is checked before it is timed. Every figure is a record, measured once a machine.

    python -m flexq_core.studies.kernels --tokens 1 8 64 512     measures anew and keeps no record
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

from flexq_core.quant import LayerPrecision
from flexq_core.quant.spec import ACTIVATION_BITS, GROUP_SIZE, require_bits
from flexq_core.runtime import ops
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.sources import paper
from flexq_core.studies.parameters import counts, names, require_at_least, require_between
from flexq_core.workbook import figures
from flexq_core.workbook.machine import preemptions, provenance
from flexq_core.workbook.records import Measurement, Records, Skipped
from flexq_core.workbook.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shape = tuple[int, int]
"""N × K: outputs and features of a linear layer."""

DEMO_SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096))
"""Two of LLaMA-7B's: attention output, and gate or up."""

BITS_PER_WEIGHT = 6 + 16 / GROUP_SIZE
_TORCH_BITS = {"torch-fp32": 32, "torch-fp16": 16, "torch-bf16": 16, "torch-int8": 8}
_TORCH_DTYPES = {"torch-fp16": torch.float16, "torch-bf16": torch.bfloat16}
METHODS = (*ops.BACKENDS, *_TORCH_BITS)
"""FlexQ's backends, and torch's own products; `torch-int8` is dynamic quantisation on the fastest engine."""

ERROR_BOUNDS = {"torch-fp32": 1e-5, "torch-fp16": 1e-2, "torch-bf16": 2e-2, "torch-int8": 5e-2}
FLEXQ_ERROR_BOUND = 6e-2
"""Relative error against float32, ‖y - y32‖ / ‖y32‖. On normal numbers 6-bit groups of 128 come to 4%: a wrong one to 100%."""

BASELINES = ("torch-int8", "torch-fp16", "torch-fp32")
"""Speed-ups are over the first of these that was measured."""

# x86 is left out: it packs for one of the other two, as it sees fit.
_INT8_ENGINES = ("onednn", "fbgemm", "qnnpack")
_WARM_UP_S = 0.3
_UNTIMED_CALLS = 3
_BUDGET_S = 3.0  # a slow method is timed fewer than `repeats` times, but at least
_LEAST_CALLS = 5


class KernelStudy:
    """Times methods on shapes and numbers of tokens, each once, and keeps the records.

    run: the workbook run whose records and device are used.  shapes: `demo`, `paper` (the 20 of the kernel figure) or
    NxK, comma-separated.  tokens: comma-separated.  methods: any of METHODS.  threads: 0 is torch's number.
    repeats: timed calls each, fewer where they would take longer than three seconds.
    Raises ValueError before anything is computed, saying what is accepted.
    """

    def __init__(
        self,
        run: Run,
        *,
        shapes: str = "demo",
        tokens: str = "1,8,64",
        activation_bits: int = 6,
        methods: str = "auto,torch-fp32,torch-bf16,torch-int8",
        threads: int = 0,
        repeats: int = 20,
        seed: int = 0,
    ) -> None:
        self.run = run
        self.shapes = read_shapes(shapes)
        self.tokens = counts(tokens, "tokens")
        require_bits(activation_bits, accepted=ACTIVATION_BITS, what="activation_bits")
        asked = names(methods, METHODS, "method")
        require_between(0, os.cpu_count() or 1, threads=threads)
        require_at_least(_LEAST_CALLS, repeats=repeats)
        require_at_least(0, seed=seed)
        fastest = ops.resolve_backend("auto", run.device) if "auto" in asked else ""
        self.methods = list(dict.fromkeys(fastest if method == "auto" else method for method in asked))
        self.activation_bits, self.repeats, self.seed = activation_bits, repeats, seed
        self.threads = threads or torch.get_num_threads()
        self._layers: _ColdLayers | None = None

    def machine(self) -> dict[str, float]:
        """What this machine can do, measured: read_bandwidth_gbps, int8_rate_gops, fp32_rate_gops."""
        with _torch_settings(self.threads):
            records = self.run.records.once(
                model="machine", method="limits", seed=0, parameters=self._machine_inputs(), compute=self._rates
            )
        return {metric: record.value for metric, record in records.items()}

    def cases(self) -> list[tuple[Shape, str, int]]:
        """(shape, method, tokens) in the order they are timed: a shape's layers are made once a method."""
        return [(shape, method, count) for shape in self.shapes for method in self.methods for count in self.tokens]

    def measure(self, shape: Shape, method: str, tokens: int) -> dict[str, Any]:
        """One case, metric → value, timed unless on record; `skipped` is the reason where this machine cannot."""
        inputs = {"outputs": shape[0], "features": shape[1], "tokens": tokens, "repeats": self.repeats}
        if method in ops.BACKENDS:
            inputs["activation_bits"] = self.activation_bits
        with _torch_settings(self.threads), torch.no_grad():
            records = self.run.records.once(
                model="x".join(map(str, shape)),
                method=method,
                seed=self.seed,
                parameters=inputs | self._machine_inputs(),
                compute=lambda: self._time(shape, method, tokens),
            )
        values: dict[str, Any] = {metric: record.value for metric, record in records.items()}
        return values | {"skipped": records["skipped"].reason if "skipped" in records else ""}

    def table(self) -> pd.DataFrame:
        """Every case, one row each: {method, outputs, features, tokens, median_us, p10_us, p90_us, error, gbps, gops,
        byte_limit_us, compute_limit_us, limit_us, over_limit, skipped}; see `limits_us`."""
        machine, cases = self.machine(), self.cases()
        rows = [
            {
                **dict.fromkeys(("median_us", "p10_us", "p90_us", "error", "gbps", "gops"), math.nan),
                "method": method,
                "outputs": shape[0],
                "features": shape[1],
                "tokens": count,
                **self.measure(shape, method, count),
                **limits_us(shape, count, machine),
            }
            for shape, method, count in self.run.progress(cases, desc="kernels", total=len(cases))
        ]
        self._layers = None
        table = pd.DataFrame(rows)
        table["over_limit"] = table["median_us"] / table["limit_us"]
        columns = ["method", "outputs", "features", "tokens", "median_us", "p10_us", "p90_us", "limit_us", "over_limit"]
        return table[columns + [name for name in table if name not in columns]]

    def _machine_inputs(self) -> dict[str, Any]:
        return {"device": provenance(self.run.device)["device"], "threads": self.threads}

    def _rates(self) -> dict[str, Measurement]:
        device = torch.device(self.run.device)
        size = 8192 if device.type == "cuda" else 2048
        floats = torch.randn(size, size, device=device)
        codes = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
        flexq = FlexQLinear.from_linear(nn.Linear(size, size, bias=False, device=device))
        buffer = torch.ones(max(_cold_bytes(device), 2**30) // 4, device=device)
        products = 2 * size**3 / 1e9
        # No library is sure to reach the processor's rate with INT8, so the fastest product found here stands for it.
        int8_s = min(_best_s(lambda: torch._int_mm(codes, codes.T), device), _best_s(lambda: flexq(floats), device))
        return {
            "read_bandwidth_gbps": Measurement(buffer.numel() * 4 / 1e9 / _best_s(buffer.sum, device), "GB/s"),
            "int8_rate_gops": Measurement(products / int8_s, "GOP/s"),
            "fp32_rate_gops": Measurement(products / _best_s(lambda: floats @ floats, device), "GOP/s"),
        }

    def _time(self, shape: Shape, method: str, tokens: int) -> dict[str, Measurement]:
        if self._layers is None or (self._layers.shape, self._layers.method) != (shape, method):
            self._layers = None  # before others are made: both need not fit
            self._layers = _ColdLayers(shape, method, self.activation_bits, self.run.device, self.seed)
        generator = torch.Generator().manual_seed(self.seed + tokens)
        x = torch.randn(tokens, shape[1], generator=generator).to(self.run.device)
        error = _checked_error(self._layers, x)
        layers, engine = self._layers.for_input(x)
        times, preempted = _times_us(layers, x.to(self._layers.dtype), self.repeats)
        median_us = times.quantile(0.5).item()
        bits = _TORCH_BITS.get(method, BITS_PER_WEIGHT)
        return {
            "median_us": Measurement(median_us, "us", engine),
            "p10_us": Measurement(times.quantile(0.1).item(), "us"),
            "p90_us": Measurement(times.quantile(0.9).item(), "us"),
            "timed_calls": Measurement(len(times), "1"),
            "preemptions_per_call": Measurement(preempted / len(times), "1"),
            "error": Measurement(error, "1"),
            "gbps": Measurement(math.prod(shape) * bits / 8 / median_us / 1e3, "GB/s"),
            "gops": Measurement(2 * tokens * math.prod(shape) / median_us / 1e3, "GOP/s"),
        }


class _ColdLayers:
    """A linear layer of one shape under one method, and as many copies of it as keep each out of the caches."""

    def __init__(self, shape: Shape, method: str, activation_bits: int, device: str, seed: int) -> None:
        """Raises Skipped where this machine cannot run the method."""
        self.shape, self.method, self.device = shape, method, torch.device(device)
        self.activation_bits = activation_bits
        outputs, features = shape
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(features, outputs, bias=False, device="meta").to_empty(device=device)
        self.linear.requires_grad_(False)
        self.linear.weight.copy_(torch.randn(outputs, features, generator=generator) / math.sqrt(features))
        flexq_dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.dtype = _TORCH_DTYPES.get(method, flexq_dtype if method in ops.BACKENDS else torch.float32)
        self._made: dict[str, list[nn.Module]] = {engine: [self._make(engine)] for engine in self._engines()}

    def first(self) -> list[nn.Module]:
        """One layer an engine; all but `torch-int8` have one."""
        return [layers[0] for layers in self._made.values()]

    def for_input(self, x: Tensor) -> tuple[list[nn.Module], str]:
        """The copies, and the engine they run on: of several the one that is fastest on x while its weights are warm."""
        engine = next(iter(self._made))
        if len(self._made) > 1:
            engine = min(self._made, key=lambda name: _best_s(lambda: self._made[name][0](x), self.device, calls=20))
            torch.backends.quantized.engine = engine  # a copy is packed anew
        layers = self._made[engine]
        size = math.prod(self.shape) * _TORCH_BITS.get(self.method, BITS_PER_WEIGHT) / 8
        copies = 1 + math.ceil(_cold_bytes(self.device) / size)
        layers.extend(copy.deepcopy(layers[0]) for _ in range(copies - len(layers)))
        return layers, engine

    def _engines(self) -> list[str]:
        if self.method != "torch-int8":
            return [""]
        if self.device.type != "cpu":
            raise Skipped("torch's dynamic INT8 runs on processors only")
        supported = [e for e in _INT8_ENGINES if e in torch.backends.quantized.supported_engines]
        if not supported:
            raise Skipped("this torch has no engine for dynamic INT8")
        return [engine for engine in supported if engine != "qnnpack"] or supported  # made for phones

    def _make(self, engine: str) -> nn.Module:
        if self.method in ops.BACKENDS:
            try:
                ops.resolve_backend(self.method, self.device)
            except ValueError as obstacle:
                raise Skipped(str(obstacle)) from None
            precision = LayerPrecision(6, self.activation_bits)
            return FlexQLinear.from_linear(self.linear, precision=precision, backend=self.method)
        if self.method != "torch-int8":
            return copy.deepcopy(self.linear).to(self.dtype)
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated; its successor is another package
            sequence = nn.Sequential(copy.deepcopy(self.linear))
            return torch.ao.quantization.quantize_dynamic(sequence, {nn.Linear}, dtype=torch.qint8)


def read_shapes(text: str) -> tuple[Shape, ...]:
    """`demo`, `paper`, or NxK comma-separated, as N × K; ValueError says what is accepted."""
    named = {"demo": DEMO_SHAPES, "paper": paper.kernel_shapes()}
    if text in named:
        return named[text]
    items = [item.strip() for item in text.split(",") if item.strip()]
    for item in items or [text]:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", item, re.ASCII):
            raise ValueError(
                f"shapes holds {item!r}; accepted: demo, paper, or outputs x features such as 4096x4096,11008x4096"
            )
    return tuple(dict.fromkeys(tuple(map(int, item.split("x"))) for item in items))


def limits_us(shape: Shape, tokens: int, machine: dict[str, float]) -> dict[str, float]:
    """The least time a 6-bit layer could take on this machine, in microseconds.

    byte_limit_us: its weights with their scales, float32 activations in and outputs out, at the bandwidth of reading.
    compute_limit_us: 2 M N K operations at the measured INT8 rate.  limit_us: the larger.
    """
    outputs, features = shape
    size = outputs * features * BITS_PER_WEIGHT / 8 + 4 * tokens * (outputs + features)
    read_us = size / machine["read_bandwidth_gbps"] / 1e3
    compute_us = 2 * tokens * outputs * features / machine["int8_rate_gops"] / 1e3
    return {"byte_limit_us": read_us, "compute_limit_us": compute_us, "limit_us": max(read_us, compute_us)}


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """FlexQ's fastest backend over the baseline: {outputs, features, tokens, method, baseline, speedup}.

    baseline: the first of BASELINES that was measured. Empty without one, or without FlexQ.
    """
    keys = ["outputs", "features", "tokens"]
    measured = table.dropna(subset=["median_us"])
    baseline = next((name for name in BASELINES if name in set(measured["method"])), None)
    flexq = measured[measured["method"].isin(ops.BACKENDS)].sort_values("median_us").drop_duplicates(keys)
    base = measured[measured["method"] == baseline]
    both = flexq.merge(base[[*keys, "median_us"]], on=keys, suffixes=("", "_base")).sort_values(keys)
    both = both.assign(baseline=baseline, speedup=both["median_us_base"] / both["median_us"])
    return both[[*keys, "method", "baseline", "speedup"]].reset_index(drop=True)


def title(method: str) -> str:
    """A method's name in figures."""
    return f"FlexQ, {method}" if method in ops.BACKENDS else method.replace("torch-", "torch ").replace("int8", "INT8")


_COLOURS = {
    "cpu": figures.MAIN,
    "reference": figures.SEQUENCE[4],
    "simulate": figures.SEQUENCE[5],
    "torch-fp32": figures.INK,
    "torch-fp16": figures.NEUTRAL,
    "torch-bf16": figures.SEQUENCE[2],
    "torch-int8": figures.ACCENT,
}
_MARKERS = "osD^vPX*"


def plot_times(table: pd.DataFrame) -> Figure:
    """Time by tokens, a line a method and the limit, a panel a shape; the first four shapes."""
    shapes = list(table[["outputs", "features"]].drop_duplicates().itertuples(index=False, name=None))[:4]
    columns, lines = min(2, len(shapes)), math.ceil(len(shapes) / 2)
    size = (max(figures.HALF_PAGE[0], 3.4 * columns), 2.5 * lines + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, shape in zip(axes.flat, shapes, strict=False):
        _plot_shape(axis, table[(table["outputs"] == shape[0]) & (table["features"] == shape[1])])
        axis.set_title(f"{shape[0]} × {shape[1]}")
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("time (µs)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _plot_shape(axis: Axes, mine: pd.DataFrame) -> None:
    for index, (method, rows) in enumerate(mine.dropna(subset=["median_us"]).groupby("method", sort=False)):
        spread = (rows["median_us"] - rows["p10_us"], rows["p90_us"] - rows["median_us"])
        style = {"color": _COLOURS.get(method, figures.SEQUENCE[3]), "marker": _MARKERS[index % len(_MARKERS)]}
        axis.errorbar(rows["tokens"], rows["median_us"], yerr=spread, label=title(method), markersize=4, **style)
    limit = mine.drop_duplicates("tokens")
    axis.plot(limit["tokens"], limit["limit_us"], "--", color=figures.INK, linewidth=1, label="limit of this machine")
    axis.set(xscale="log", yscale="log", xlabel="tokens")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_xticks(limit["tokens"], map(str, limit["tokens"]))
    axis.minorticks_off()


def plot_speedups(table: pd.DataFrame) -> Figure:
    """Speed-up of FlexQ's fastest backend by shape, a colour a number of tokens, beside the paper's on its GPU."""
    found = speedups(table)
    shapes = list(table[["outputs", "features"]].drop_duplicates().itertuples(index=False, name=None))
    published = paper.kernel_speedups().query("kernel == 'flexq'")
    tokens = sorted(table["tokens"].unique())
    offsets = np.linspace(-0.25, 0.25, len(tokens)) if len(tokens) > 1 else [0.0]
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], 1.6 + 0.4 * len(shapes)), layout="constrained")
    for index, (count, offset) in enumerate(zip(tokens, offsets, strict=True)):
        colour = figures.SEQUENCE[index % len(figures.SEQUENCE)]
        plural = "s" if count > 1 else ""
        for rows, marker, face, whose in ((found, "o", colour, "here"), (published, "D", "none", "the paper's GPU")):
            mine = rows[rows["tokens"] == count]
            places = [
                (row.speedup, shapes.index((row.outputs, row.features)) + offset)
                for row in mine.itertuples()
                if (row.outputs, row.features) in shapes
            ]
            if places:
                label = f"{count} token{plural}, {whose}"
                axis.plot(*zip(*places, strict=True), marker, color=colour, markerfacecolor=face, label=label)
    axis.axvline(1, color=figures.INK, linewidth=1)
    axis.set_yticks(range(len(shapes)), [f"{n} × {k}" for n, k in shapes])
    axis.set_ylim(len(shapes) - 0.5, -0.5)
    over = title(found["baseline"].iloc[0]) if len(found) else "a baseline (none measured)"
    axis.set(xlabel=f"speed-up over {over}; the paper's over INT8 cuBLAS", xscale="log")
    ticks = [t for t in (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


AT_MOST_OVER_INT8 = 1.1
"""How much longer than torch's dynamic INT8 FlexQ's CPU kernel may take for one token, the geometric mean over shapes."""
AT_MOST_PREEMPTIONS = 0.25
"""Preemptions a call above which a machine is too busy to tell: on a quiet one there are hardly any."""


def claims(table: pd.DataFrame) -> list[tuple[str, bool | None, str]]:
    """What this study claims, as (claim, whether the table bears it out, the numbers); None where it cannot tell."""
    measured = table.dropna(subset=["median_us"])
    share = measured["error"] / [ERROR_BOUNDS.get(method, FLEXQ_ERROR_BOUND) for method in measured["method"]]
    text = "every method's product is right: its relative error against float32 is within its bound"
    right: tuple[str, bool | None, str] = (text, None, "nothing could be measured here")
    if len(measured):
        worst = measured.loc[share.idxmax()]
        right = (text, bool((share <= 1).all()), f"nearest to its bound: {worst['method']}, {worst['error']:.2%}")
    return [right, _speed_claim(measured)]


def _speed_claim(measured: pd.DataFrame) -> tuple[str, bool | None, str]:
    text = (
        "for 1 token FlexQ's CPU kernel takes no longer than torch's dynamic INT8 on its best engine "
        f"(geometric mean over shapes at most {AT_MOST_OVER_INT8} of it)"
    )
    one = measured[measured["tokens"] == 1].pivot_table(
        index=["outputs", "features"], columns="method", values="median_us", sort=False
    )
    if "torch-int8" not in one:
        return text, None, "torch-int8 was not timed with 1 token here"
    flexq = next((method for method in ("cpu", "reference") if method in one), None)
    if flexq is None:
        return text, None, "the CPU kernel was not timed with 1 token here"
    used = measured[(measured["tokens"] == 1) & measured["method"].isin([flexq, "torch-int8"])]
    ratio = float(np.exp(np.log(one[flexq] / one["torch-int8"]).mean()))
    if flexq != "cpu":
        return text, None, f"the CPU kernel was not timed; {flexq} takes {ratio:.2f} of torch-int8's time"
    detail = f"{ratio:.2f} of torch-int8's time over {len(one)} shapes"
    preempted = used["preemptions_per_call"].max()
    if preempted > AT_MOST_PREEMPTIONS:
        busy = f"other programs took the processors {preempted:.1f} times a call: time anew on a quiet machine"
        return text, None, f"{detail}, but {busy}"
    return text, ratio <= AT_MOST_OVER_INT8, detail


def _checked_error(layers: _ColdLayers, x: Tensor) -> float:
    """The largest relative error against float32 of a method's layers; RuntimeError where it is not within its bound."""
    expected = layers.linear(x)
    bound = ERROR_BOUNDS.get(layers.method, FLEXQ_ERROR_BOUND)
    outputs = [layer(x.to(layers.dtype)).float() for layer in layers.first()]
    error = max(((y - expected).norm() / expected.norm()).item() for y in outputs)
    if not error <= bound:  # nan is wrong, too
        shape = "x".join(map(str, layers.shape))
        raise RuntimeError(
            f"{layers.method} is wrong at {shape}, {len(x)} tokens: relative error {error}, bound {bound}"
        )
    return error


def _times_us(layers: list[Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> tuple[Tensor, int]:
    """Times of single calls, each on the layer that was used longest ago: [calls] float64 microseconds.

    Also how often the system took a processor from this process meanwhile: on a quiet machine hardly ever.
    """
    _warm_up(x.device)
    for layer in layers[-_UNTIMED_CALLS:]:
        layer(x)
    before = preemptions()
    times = (_cuda_times_us if x.is_cuda else _cpu_times_us)(layers, x, repeats)
    return times, preemptions() - before


def _cpu_times_us(layers: list[Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> Tensor:
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _LEAST_CALLS or (len(times) < repeats and time.perf_counter() - begin < _BUDGET_S):
        layer = layers[len(times) % len(layers)]
        start = time.perf_counter()
        layer(x)
        times.append((time.perf_counter() - start) * 1e6)
    return torch.tensor(times, dtype=torch.float64)


def _cuda_times_us(layers: list[Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> Tensor:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # about 10 ms, in which calls queue up: what is timed is the GPU, not the launches
    for index, (start, end) in enumerate(events):
        start.record()
        layers[index % len(layers)](x)
        end.record()
    torch.cuda.synchronize()
    return torch.tensor([start.elapsed_time(end) * 1e3 for start, end in events], dtype=torch.float64)


def _warm_up(device: torch.device) -> None:
    """Keep every thread busy for a while, the same before every method.

    On a virtual machine of two processors the threads of the first short parallel calls may stay packed on one of them for a
    whole second (8 ms a call in place of 2): whichever method came first would pay for it. On a GPU it raises the clocks.
    """
    a = torch.randn(512, 512, device=device)
    end = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < end:
        (a @ a).sum().item()  # .item() waits for a GPU


def _best_s(call: Callable[[], Any], device: torch.device, *, calls: int = 6) -> float:
    """The shortest of several calls, in seconds, after a warm-up: a rate that the machine has been seen to reach."""
    _warm_up(device)
    call()
    timed = _cuda_times_us if device.type == "cuda" else _cpu_times_us
    return timed([lambda _: call()], torch.empty(0), calls).min().item() / 1e6


def _cold_bytes(device: torch.device) -> int:
    """Twice the size of the last cache, at least 64 MiB: what is read between two uses of the same weights."""
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        cache = max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=0)
    return max(2 * cache, 64 * 2**20)


@contextmanager
def _torch_settings(threads: int) -> Iterator[None]:
    """Torch with this number of threads, and afterwards with the threads and INT8 engine that it had."""
    before, engine = torch.get_num_threads(), torch.backends.quantized.engine
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.backends.quantized.engine = engine


def main(arguments: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m flexq_core.studies.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 64, 512], help="batch sizes (default: 1 8 64 512)"
    )
    parser.add_argument("--shapes", nargs="+", default=["demo"], help="NxK, or demo, or paper (default: demo)")
    parser.add_argument("--activation-bits", type=int, choices=(6, 8), default=6, help="(default: 6)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["auto", *_TORCH_BITS], help="(default: auto and torch's)"
    )
    parser.add_argument("--threads", type=int, default=0, help="(default: torch's)")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls each (default: 30)")
    options = vars(parser.parse_args(arguments))
    for name in ("tokens", "shapes", "methods"):
        options[name] = ",".join(map(str, options[name]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        run = Run("03_kernels", options, device, Path(folder), Records("03_kernels", Path(folder), device))
        try:
            study = KernelStudy(run, **options)
        except ValueError as error:
            parser.error(str(error))
        table = study.table()
    print(f"{study.threads} threads, weights cold, microseconds; over_limit: against what the machine allows")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
