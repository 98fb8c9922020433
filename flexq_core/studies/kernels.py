"""Kernel times by shape, method and tokens, beside the libraries' products and what the machine allows (FlexQ §4.3).

A method is a backend of the op, one of torch's own products or a library's. All go through one harness: the same warm-up,
cold weights (each call takes the copy that was used longest ago; the others together exceed twice the last cache), and an
output that is checked before it is timed. On a processor single calls are timed, here; on a GPU replays of CUDA graphs, in
kernels_gpu.py. Every figure is a record, measured once a machine.

    python -m flexq_core.studies.kernels --tokens 1 8 64 512     measures anew and keeps no record
    python -m flexq_core.studies.kernels --shapes paper --tokens 1 4 8 --outputs outputs/reference/{card}   keeps records
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from flexq_core.quant import LayerPrecision
from flexq_core.quant.spec import GROUP_SIZE, require_bits
from flexq_core.runtime import auto, cuda, ops
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.sources import paper
from flexq_core.studies import kernels_gpu
from flexq_core.studies.kernels_claims import ERROR_BOUNDS, FLEXQ_ERROR_BOUND, claims
from flexq_core.studies.kernels_combinations import read_combinations
from flexq_core.studies.kernels_compared import mean_speedups, wgmma_wins
from flexq_core.studies.parameters import counts, names, require_at_least, require_between, whole_number
from flexq_core.studies.timing import LEAST_CALLS, best_s, cold_bytes, cpu_times_us, machine_limits, warm_up
from flexq_core.workbook import gpu_tables
from flexq_core.workbook.arguments import given
from flexq_core.workbook.command import exit_status, outputs_of, print_claims, writable_outputs
from flexq_core.workbook.machine import preemptions, provenance
from flexq_core.workbook.records import Measurement, Records, Skipped, load_records, write_atomically
from flexq_core.workbook.run import Run

Shape = tuple[int, int]
"""N × K: outputs and features of a linear layer."""

DEMO_SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096))
"""Two of LLaMA-7B's: attention output, and gate or up."""

ACTIVATION_BITS = (6, 7, 8)
"""Those that FLEXQ_ERROR_BOUND can tell right from wrong; fewer are timed as combinations."""

BITS_PER_WEIGHT = 6 + 16 / GROUP_SIZE
_TORCH_BITS = {"torch-fp32": 32, "torch-fp16": 16, "torch-bf16": 16, "torch-int8": 8}
_BITS = _TORCH_BITS | dict.fromkeys(kernels_gpu.LIBRARIES, 8)
METHODS = (*ops.BACKENDS, *_BITS)
"""FlexQ's backends, torch's own products and libraries on a GPU; `torch-int8` is dynamic quantisation on the fastest engine."""

DEFAULT_METHODS = {
    "cpu": ("auto", "torch-fp32", "torch-bf16", "torch-int8"),
    "cuda": ("imma", "wgmma", "bmma", "torch-fp16", "torch-bf16", *kernels_gpu.LIBRARIES),
}

# x86 is left out: it packs for one of the other two, as it sees fit.
_INT8_ENGINES = ("onednn", "fbgemm", "qnnpack")
_UNTIMED_CALLS = 3


class KernelStudy:
    """Times methods on shapes and numbers of tokens, each once, and keeps the records.

    run: the workbook run whose records and device are used.  shapes: `demo`, `paper` (the 20 of the kernel figure), `paper-a8`
    (those of them that it runs with 8-bit activations) or NxK, comma-separated.  tokens: comma-separated.  methods: any of
    METHODS, or `default` for the device's.  activation_bits: one of ACTIVATION_BITS.  combinations: of bits, such as w4a8, for
    `combination_table`; `usual` or `none`.  threads: 0 is torch's number.  repeats: timed calls each, fewer where they would take
    longer than three seconds; on a GPU replays.
    Raises ValueError before anything is computed, saying what is accepted.
    """

    def __init__(
        self,
        run: Run,
        *,
        shapes: str = "demo",
        tokens: str = "1,8,64",
        activation_bits: int = 6,
        methods: str = "default",
        combinations: str = "usual",
        threads: int = 0,
        repeats: int = 20,
        seed: int = 0,
    ) -> None:
        self.run = run
        self.shapes = read_shapes(shapes)
        self.tokens = counts(tokens, "tokens")
        require_bits(activation_bits, accepted=ACTIVATION_BITS, what="activation_bits")
        self.on_gpu = torch.device(run.device).type == "cuda"
        self.combinations = read_combinations(combinations)
        usual = DEFAULT_METHODS["cuda" if self.on_gpu else "cpu"]
        asked = [
            method
            for name in names(methods, ("default", *METHODS), "method")
            for method in (usual if name == "default" else [name])
        ]
        require_between(0, os.cpu_count() or 1, threads=threads)
        require_at_least(LEAST_CALLS, repeats=repeats)
        require_at_least(0, seed=seed)
        fastest = [ops.resolve_backend("auto", run.device)] if "auto" in asked else []
        if fastest == ["auto"]:  # it depends on the shape, so what it chooses from is timed
            fastest = list(auto.CHOICES)
        self.methods = list(dict.fromkeys(m for method in asked for m in (fastest if method == "auto" else [method])))
        self.activation_bits, self.repeats, self.seed = activation_bits, repeats, seed
        self.threads = threads or torch.get_num_threads()
        self._layers: _ColdLayers | kernels_gpu.GpuLayers | None = None

    @property
    def card(self) -> str:
        """The GPU's name; empty on a processor."""
        return provenance(self.run.device)["device"] if self.on_gpu else ""

    def machine(self) -> dict[str, float]:
        """What this machine can do with so many threads; see `machine_limits`."""
        with _torch_settings(self.threads):
            return machine_limits(self.run)

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
        byte_limit_us, compute_limit_us, limit_us, over_limit, skipped}; see `limits_us`. On a GPU also what `_on_gpu` adds.
        """
        machine, cases = self.machine(), self.cases()
        rows = [
            {
                "method": method,
                "outputs": shape[0],
                "features": shape[1],
                "tokens": count,
                **self.measure(shape, method, count),
            }
            for shape, method, count in self.run.progress(cases, desc="kernels", total=len(cases))
        ]
        self._layers = None
        return tabulate(rows, machine)

    def combination_table(self) -> pd.DataFrame:
        """On a GPU, `bmma` with each combination of bits on the largest shape, one row a case: {combination, outputs, features,
        tokens, gemm_us, gemm_p10_us, gemm_p90_us, median_us, p10_us, p90_us, error, definition_error, byte_limit_us, skipped}.

        error: against float32, which is what so few bits lose; right is what equals the definition. Where nothing can be timed
        one record says why, and so does the table's only row.
        """
        shape = max(self.shapes, key=math.prod)
        reason = self._no_combinations()
        if reason:
            self._skip_combinations(shape, reason)
            return pd.DataFrame({"skipped": [reason]})
        rows = []
        for precision in self.run.progress(self.combinations, desc="bits", total=len(self.combinations)):
            made = functools.cache(functools.partial(self._layers_of_bits, shape, precision))
            for count in self.tokens:
                limit = limits_us(shape, count, self.machine(), precision.weight_bits)["byte_limit_us"]
                case = {"combination": str(precision), "outputs": shape[0], "features": shape[1], "tokens": count}
                rows.append(case | {"byte_limit_us": limit} | self._combination(shape, precision, count, made))
        table = pd.DataFrame(rows)
        first = ["combination", "outputs", "features", "tokens", "gemm_us", "median_us", "byte_limit_us"]
        return table.reindex(columns=list(dict.fromkeys([*first, *table])))

    def _no_combinations(self) -> str:
        """Why none can be timed, or nothing."""
        if not self.combinations:
            return "no combination of bits was asked for"
        if not self.on_gpu:
            return "bit planes are multiplied on NVIDIA GPUs only"
        try:
            ops.resolve_backend("bmma", self.run.device)
        except ValueError as obstacle:
            return str(obstacle)
        return ""

    def _combination(self, shape: Shape, precision: LayerPrecision, tokens: int, made: Callable) -> dict[str, Any]:
        inputs = {"outputs": shape[0], "features": shape[1], "tokens": tokens, "repeats": self.repeats}
        with torch.no_grad():
            records = self.run.records.once(
                model="x".join(map(str, shape)),
                method="bmma",
                seed=self.seed,
                parameters=inputs | vars(precision) | self._machine_inputs(),
                compute=lambda: made().measure(self._activations(shape, tokens, made()), self.repeats, math.inf),
            )
        values: dict[str, Any] = {metric: record.value for metric, record in records.items()}
        return values | {"skipped": records["skipped"].reason if "skipped" in records else ""}

    def _layers_of_bits(self, shape: Shape, precision: LayerPrecision) -> kernels_gpu.GpuLayers:
        every = [(other.weight_bits, other.activation_bits) for other in self.combinations]
        cuda.build_ahead(every, torch.device(self.run.device))
        bits = precision.activation_bits
        return kernels_gpu.GpuLayers(shape, "bmma", bits, self.run.device, self.seed, precision.weight_bits)

    def _skip_combinations(self, shape: Shape, reason: str) -> None:
        def skip() -> dict[str, Measurement]:
            raise Skipped(reason)

        self.run.records.once(
            model="x".join(map(str, shape)),
            method="bmma",
            seed=self.seed,
            parameters={"combinations": [str(precision) for precision in self.combinations]} | self._machine_inputs(),
            compute=skip,
        )

    def _machine_inputs(self) -> dict[str, Any]:
        return {"device": provenance(self.run.device)["device"], "threads": self.threads}

    def _time(self, shape: Shape, method: str, tokens: int) -> dict[str, Measurement]:
        if self._layers is None or (self._layers.shape, self._layers.method) != (shape, method):
            self._layers = None  # before others are made: both need not fit
            layers = kernels_gpu.GpuLayers if self.on_gpu else _ColdLayers
            self._layers = layers(shape, method, self.activation_bits, self.run.device, self.seed)
        x = self._activations(shape, tokens, self._layers)
        if self.on_gpu:
            return self._layers.measure(x, self.repeats, ERROR_BOUNDS.get(method, FLEXQ_ERROR_BOUND))
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

    def _activations(self, shape: Shape, tokens: int, layers: _ColdLayers | kernels_gpu.GpuLayers) -> Tensor:
        """[tokens, K] float32 on the layers' device, of the same seed for every method."""
        generator = torch.Generator(layers.device).manual_seed(self.seed + tokens)
        return torch.randn(tokens, shape[1], generator=generator, device=layers.device)


class _ColdLayers:
    """A linear layer of one shape under one method, and as many copies of it as keep each out of the caches."""

    def __init__(self, shape: Shape, method: str, activation_bits: int, device: str, seed: int) -> None:
        """Raises Skipped where this machine cannot run the method."""
        if method in kernels_gpu.LIBRARIES:
            raise Skipped(f"{method} runs on NVIDIA GPUs only")
        self.shape, self.method, self.device = shape, method, torch.device(device)
        self.activation_bits = activation_bits
        outputs, features = shape
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(features, outputs, bias=False, device="meta").to_empty(device=device)
        self.linear.requires_grad_(False)
        self.linear.weight.copy_(torch.randn(outputs, features, generator=generator) / math.sqrt(features))
        self.dtype = kernels_gpu.DTYPES.get(method, torch.float32)
        self._made: dict[str, list[nn.Module]] = {engine: [self._make(engine)] for engine in self._engines()}

    def first(self) -> list[nn.Module]:
        """One layer an engine; all but `torch-int8` have one."""
        return [layers[0] for layers in self._made.values()]

    def for_input(self, x: Tensor) -> tuple[list[nn.Module], str]:
        """The copies, and the engine they run on: of several the one that is fastest on x while its weights are warm."""
        engine = next(iter(self._made))
        if len(self._made) > 1:
            engine = min(self._made, key=lambda name: best_s(lambda: self._made[name][0](x), self.device, calls=20))
            torch.backends.quantized.engine = engine  # a copy is packed anew
        layers = self._made[engine]
        size = math.prod(self.shape) * _TORCH_BITS.get(self.method, BITS_PER_WEIGHT) / 8
        copies = 1 + math.ceil(cold_bytes() / size)
        layers.extend(copy.deepcopy(layers[0]) for _ in range(copies - len(layers)))
        return layers, engine

    def _engines(self) -> list[str]:
        if self.method != "torch-int8":
            return [""]
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
    """`demo`, `paper`, `paper-a8` and NxK, comma-separated, as N × K, each once; ValueError says what is accepted."""
    sensitive = paper.kernel_speedups().query("activation_bits == 8")[["outputs", "features"]].drop_duplicates()
    named = {
        "demo": DEMO_SHAPES,
        "paper": paper.kernel_shapes(),
        "paper-a8": tuple(sensitive.itertuples(index=False, name=None)),
    }
    found: dict[Shape, None] = {}
    for item in names(text, None, "shape") or [text]:
        if item not in named and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", item, re.ASCII):
            raise ValueError(
                f"shapes holds {item!r}; accepted: demo, paper, paper-a8, or outputs x features such as 4096x4096,11008x4096"
            )
        found |= dict.fromkeys(named.get(item) or [tuple(map(int, item.split("x")))])
    return tuple(found)


def limits_us(shape: Shape, tokens: int, machine: dict[str, float], weight_bits: int = 6) -> dict[str, float]:
    """The least time a layer of so many bits could take on this machine, in microseconds.

    byte_limit_us: its weights with their scales, activations in and outputs out (float32; on a GPU float16), at the bandwidth
    of reading, on a GPU of copying.  compute_limit_us: 2 M N K operations at the measured INT8 rate.  limit_us: the larger.
    """
    outputs, features = shape
    bandwidth = machine.get("copy_bandwidth_gbps", machine["read_bandwidth_gbps"])
    read_us = _bytes_moved(shape, tokens, weight_bits + 16 / GROUP_SIZE, machine) / bandwidth / 1e3
    compute_us = 2 * tokens * outputs * features / machine["int8_rate_gops"] / 1e3
    return {"byte_limit_us": read_us, "compute_limit_us": compute_us, "limit_us": max(read_us, compute_us)}


def _bytes_moved(shape: Shape, tokens: int, bits: float, machine: dict[str, float]) -> float:
    outputs, features = shape
    float_bytes = 2 if "copy_bandwidth_gbps" in machine else 4
    return outputs * features * bits / 8 + float_bytes * tokens * (outputs + features)


def tabulate(rows: list[dict[str, Any]], machine: dict[str, float]) -> pd.DataFrame:
    """Measured cases with their limits; see `KernelStudy.table`. machine: what `KernelStudy.machine` found."""
    for row in rows:
        row |= limits_us((row["outputs"], row["features"]), row["tokens"], machine)
    table = pd.DataFrame(rows)
    on_gpu = "copy_bandwidth_gbps" in machine
    times = ["median_us", "p10_us", "p90_us", *(["gemm_us", "gemm_p10_us", "gemm_p90_us"] if on_gpu else [])]
    for name in (*times, "error", "gbps", "gops"):
        if name not in table:
            table[name] = math.nan
    if on_gpu:
        table = _on_gpu(table, machine)
    table["over_limit"] = table["gemm_us" if on_gpu else "median_us"] / table["limit_us"]
    first = ["method", "outputs", "features", "tokens", *times, "limit_us", "over_limit"]
    return table[first + [name for name in table if name not in first]]


def _on_gpu(table: pd.DataFrame, machine: dict[str, float]) -> pd.DataFrame:
    """With {gbps, gops, bandwidth_share} of the product alone, and layer times where a layer is no more than its product.

    bandwidth_share: a method's own bytes, at its own width, by time and the measured bandwidth of copying.
    """
    table = table.copy()
    plain = table["method"].isin([*kernels_gpu.DTYPES, "torchao-int8wo"])
    for name in ("median_us", "p10_us", "p90_us"):
        table.loc[plain, name] = table.loc[plain, "gemm_us" if name == "median_us" else f"gemm_{name}"]
    weights = table["outputs"] * table["features"]
    bits = table["method"].map(lambda method: _BITS.get(method, BITS_PER_WEIGHT))
    moved = [
        _bytes_moved((row.outputs, row.features), row.tokens, _BITS.get(row.method, BITS_PER_WEIGHT), machine)
        for row in table.itertuples()
    ]
    table["gbps"] = weights * bits / 8 / table["gemm_us"] / 1e3
    table["gops"] = 2 * table["tokens"] * weights / table["gemm_us"] / 1e3
    table["bandwidth_share"] = moved / table["gemm_us"] / 1e3 / machine["copy_bandwidth_gbps"]
    return table


def recorded(records: pd.DataFrame) -> dict[tuple[str, int], pd.DataFrame]:
    """What records of GPUs say, of this machine or another: (card, activation bits) → a table as `KernelStudy.table` makes it."""
    times = gpu_tables.kernel_times(records)
    limits = records[(records["study"] == "03_kernels") & (records["method"] == "limits")].sort_values("time")
    tables = {}
    for (card, bits), flexq in times.dropna(subset=["activation_bits"]).groupby(["device", "activation_bits"]):
        mine = times[(times["device"] == card) & times["activation_bits"].isin([bits, math.nan])]
        mine = mine.merge(flexq[["outputs", "features"]].drop_duplicates(), on=["outputs", "features"])
        found = limits[limits["device"] == card]
        machine = dict(zip(found["metric"], found["value"], strict=True))
        if "copy_bandwidth_gbps" in machine:
            rows = mine.drop(columns=["device", "activation_bits"]).to_dict("records")
            tables[card, int(bits)] = tabulate(rows, machine).assign(skipped="")
    return tables


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
    warm_up(x.device)
    for layer in layers[-_UNTIMED_CALLS:]:
        layer(x)
    before = preemptions()
    times = cpu_times_us(layers, x, repeats)
    return times, preemptions() - before


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


def write_auto_table(tables: dict[tuple[str, int], pd.DataFrame], path: Path = auto.PATH) -> list[dict[str, Any]]:
    """Write from how many tokens on `wgmma` is the faster for each layer timed (see runtime/auto.py); returns the new rows.

    tables: what `recorded` gives. Rows of cards that it does not hold stay.
    """
    rows = {}
    # Where 6-bit activations were timed they decide.
    for (card, _), table in sorted(tables.items(), key=lambda each: (each[0][1] != 6, each[0])):
        for row in wgmma_wins(table).to_dict("records"):
            rows.setdefault((card, row["outputs"], row["features"]), {"card": card, **row})
    cards = {card for card, _ in tables}
    kept = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["card"] not in cards]
    lines = [json.dumps(row) for row in (*kept, *rows.values())]
    write_atomically(path, "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    """The command line; see `--help`. Returns the exit status."""
    return exit_status(lambda: _measure(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flexq_core.studies.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokens", type=whole_number, nargs="+", default=[1, 8, 64, 512], help="batch sizes (default: 1 8 64 512)"
    )
    parser.add_argument("--shapes", nargs="+", default=["demo"], help="NxK, or demo, paper or paper-a8 (default: demo)")
    parser.add_argument(
        "--activation-bits", type=int, nargs="+", choices=ACTIVATION_BITS, default=[6], help="(default: 6)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=("default", *METHODS), default=["default"], help="(default: the device's usual)"
    )
    parser.add_argument(
        "--combinations", nargs="+", default=["none"], help="of bits on a GPU: usual, or w4a8 ... (default: none)"
    )
    parser.add_argument("--threads", type=int, default=0, help="(default: torch's)")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls each, or replays on a GPU (default: 30)")
    parser.add_argument(
        "--outputs",
        metavar="FOLDER",
        type=given,
        help="keep records in FOLDER/records, measure none of them again, and drop those of older source; from the "
        "repository's root, and {card} is the GPU's short name (default: none)",
    )
    parser.add_argument(
        "--write-auto-table",
        action="store_true",
        help="write what `auto` takes from FOLDER's records; nothing is timed",
    )
    return parser


def _measure(arguments: list[str] | None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    folder, write_table = options.pop("outputs"), options.pop("write_auto_table")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place_of = outputs_of if write_table else writable_outputs
    try:
        kept = place_of(folder, device) if folder else None
    except ValueError as error:
        parser.error(str(error))
    if write_table:
        tables = recorded(load_records(kept)) if kept else {}
        if not tables:
            parser.error("--write-auto-table needs --outputs with records of a GPU")
        print(pd.DataFrame(write_auto_table(tables)).to_string(index=False))
        return 0
    for name in ("tokens", "shapes", "methods", "combinations"):
        options[name] = ",".join(map(str, options[name]))
    with tempfile.TemporaryDirectory() as temporary:
        place = kept or Path(temporary)
        run = Run("03_kernels", options, device, place, Records("03_kernels", place, device))
        try:
            studies = [KernelStudy(run, **options | {"activation_bits": bits}) for bits in options["activation_bits"]]
        except ValueError as error:
            parser.error(str(error))
        for study in studies:
            _print(study, study.table())
        if studies[0].combinations:
            _show(studies[0].combination_table())
        if kept:
            run.records.drop_old()
    return 0


def _show(table: pd.DataFrame) -> None:
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))


def _print(study: KernelStudy, table: pd.DataFrame) -> None:
    where = study.card or f"{study.threads} threads"
    bits = f"{study.activation_bits}-bit activations"
    print(f"{where}, {bits}, weights cold, microseconds; over_limit: against what the machine allows")
    _show(table)
    if study.card:
        _show(mean_speedups(table))
    print_claims(claims(table, study.card))


if __name__ == "__main__":
    sys.exit(main())
