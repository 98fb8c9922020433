"""Kernel times by shape, tokens and backend on the processor, beside torch's own and the limit of the memory (FlexQ §4.3).

Weights are cold: each method rotates over distinct copies that together exceed the last-level cache. Every method's output
is checked before it is timed.

    python -m flexq_core.studies.kernels --tokens 1 8 64 512
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from flexq_core.quant import LayerPrecision
from flexq_core.runtime.linear import FlexQLinear

LLAMA_7B = ((12288, 4096), (4096, 4096), (11008, 4096), (4096, 11008))
"""N × K of LLaMA-7B's linear layers: fused QKV, attention output, gate or up, down."""

COLD_BYTES = 768 * 2**20
BITS_PER_WEIGHT = 6 + 16 / 128
INT8_ENGINES = ("onednn", "x86", "fbgemm")


def read_bandwidth_gbps() -> float:
    """Bytes a second (in GB/s) that summing a buffer far larger than the cache reads; the best of several tries."""
    buffer = torch.ones(2**28, dtype=torch.float32)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.numel() * 4 / best / 1e9


def methods(activation_bits: int) -> dict[str, Callable[[nn.Linear], Callable[[Tensor], Tensor]]]:
    """Method → maker of a callable from a float32 linear layer."""
    precision = LayerPrecision(6, activation_bits)
    made: dict[str, Callable] = {
        f"flexq w6a{activation_bits}": lambda linear: FlexQLinear.from_linear(
            linear, precision=precision, backend="cpu"
        ),
        "torch fp32": lambda linear: linear,
        "torch bf16": lambda linear: linear.to(torch.bfloat16),
    }
    supported = torch.backends.quantized.supported_engines
    made |= {f"torch int8 {e}": lambda linear, e=e: _dynamic_int8(linear, e) for e in INT8_ENGINES if e in supported}
    return made


def sweep(
    shapes: tuple[tuple[int, int], ...] = LLAMA_7B,
    tokens: tuple[int, ...] = (1, 8, 64, 512),
    *,
    activation_bits: int = 6,
    repeats: int = 30,
    cold_bytes: int = COLD_BYTES,
) -> pd.DataFrame:
    """Time every method on every shape and number of tokens.

    Returns rows of {method, outputs, features, tokens, median_us, p10_us, p90_us, limit_us, error}: limit_us is the time to
    read 6-bit weights with their scales at the measured bandwidth, error the relative error against float32.
    """
    bandwidth = read_bandwidth_gbps()
    rows = []
    for outputs, features in shapes:
        for name, make in methods(activation_bits).items():
            torch.manual_seed(0)
            linear = nn.Linear(features, outputs, bias=False).requires_grad_(False)
            size = outputs * features * (4 if "fp32" in name else 2 if "bf16" in name else 1)
            layers = [make(nn.Linear(features, outputs, bias=False)) for _ in range(max(2, cold_bytes // size) - 1)]
            layers.append(make(copy.deepcopy(linear)))
            for count in tokens:
                x = torch.randn(count, features)
                with torch.no_grad():
                    expected, found = linear(x), _call(name, layers[-1], x)
                    error = ((found.float() - expected).norm() / expected.norm()).item()
                    if not error < 0.1:
                        raise RuntimeError(f"{name} is wrong at {outputs}x{features}, {count} tokens: error {error}")
                    times = _times_us(name, layers, x, repeats)
                rows.append(
                    {
                        "method": name,
                        "outputs": outputs,
                        "features": features,
                        "tokens": count,
                        "median_us": times.quantile(0.5).item(),
                        "p10_us": times.quantile(0.1).item(),
                        "p90_us": times.quantile(0.9).item(),
                        "limit_us": outputs * features * BITS_PER_WEIGHT / 8 / bandwidth / 1e3,
                        "error": error,
                    }
                )
    return pd.DataFrame(rows)


def compare(times: pd.DataFrame) -> pd.DataFrame:
    """One row a shape and number of tokens: FlexQ, torch's best INT8 engine, their ratio, and FlexQ over the limit."""
    keys = ["outputs", "features", "tokens"]
    best = times[times["method"].str.startswith("torch int8")].groupby(keys)["median_us"].min()
    mine = times[times["method"].str.startswith("flexq")].set_index(keys)
    table = pd.DataFrame({"flexq_us": mine["median_us"], "int8_us": best, "limit_us": mine["limit_us"]})
    for dtype in ("fp32", "bf16"):
        table[f"{dtype}_us"] = times[times["method"] == f"torch {dtype}"].set_index(keys)["median_us"]
    table["over_int8"] = table["flexq_us"] / table["int8_us"]
    table["over_limit"] = table["flexq_us"] / table["limit_us"]
    return table.reset_index()


def _dynamic_int8(linear: nn.Linear, engine: str) -> nn.Module:
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)


def _call(name: str, layer: Callable, x: Tensor) -> Tensor:
    return layer(x.bfloat16() if "bf16" in name else x)


def _times_us(name: str, layers: list[Callable], x: Tensor, repeats: int) -> Tensor:
    """Times of single calls, each on the layer that was used longest ago: [repeats] float64 microseconds."""
    x = x.bfloat16() if "bf16" in name else x
    if "int8" in name:
        torch.backends.quantized.engine = name.rsplit(" ", 1)[-1]
    for layer in layers:  # all of them: the first touch of a page costs more than its reading
        layer(x)
    times = []
    for index in range(repeats):
        layer = layers[index % len(layers)]
        start = time.perf_counter()
        layer(x)
        times.append((time.perf_counter() - start) * 1e6)
    return torch.tensor(times, dtype=torch.float64)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m flexq_core.studies.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 64, 512], help="batch sizes (default: 1 8 64 512)"
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{n}x{k}" for n, k in LLAMA_7B], help="NxK (default: LLaMA-7B's)"
    )
    parser.add_argument("--activation-bits", type=int, choices=(6, 8), default=6, help="(default: 6)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: torch's)")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls each (default: 30)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes = tuple(tuple(map(int, shape.split("x"))) for shape in options.shapes)
    times = sweep(shapes, tuple(options.tokens), activation_bits=options.activation_bits, repeats=options.repeats)
    print(f"{options.threads} threads, weights cold, median microseconds; over_int8: against torch's best engine")
    print(compare(times).to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
