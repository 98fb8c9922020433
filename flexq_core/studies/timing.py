"""How calls are timed, and what a machine can do by such times: the limits that 03_kernels and 04_e2e set beside their own.

The records' keys of both count this file (workbook/records.py), so that 04_e2e's need not count all of kernels.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexq_core.runtime.linear import FlexQLinear
from flexq_core.workbook.machine import provenance
from flexq_core.workbook.records import Measurement

if TYPE_CHECKING:
    from flexq_core.workbook.run import Run

_WARM_UP_S = 0.3
_BUDGET_S = 3.0  # a slow call is timed fewer than `repeats` times, but at least
LEAST_CALLS = 5


def machine_limits(run: Run) -> dict[str, float]:
    """What this machine can do with torch's threads, measured unless on record: read_bandwidth_gbps, int8_rate_gops,
    fp32_rate_gops; on a GPU copy_bandwidth_gbps, which counts reads and writes, in place of the last."""
    records = run.records.once(
        model="machine",
        method="limits",
        seed=0,
        parameters={"device": provenance(run.device)["device"], "threads": torch.get_num_threads()},
        compute=lambda: _measured_limits(torch.device(run.device)),
    )
    return {metric: record.value for metric, record in records.items()}


def _measured_limits(device: torch.device) -> dict[str, Measurement]:
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 2048
    codes = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
    buffer = torch.ones((2**32 if on_gpu else max(cold_bytes(), 2**30)) // 4, device=device)
    products = 2 * size**3 / 1e9
    if on_gpu:
        target, size_gb = torch.empty_like(buffer.uniform_()), buffer.numel() * 4 / 1e9
        # Neither torch's copy nor its elementwise kernel is sure to be the faster.
        copy_s = min(
            best_s(lambda: target.copy_(buffer), device), best_s(lambda: torch.neg(buffer, out=target), device)
        )
        int8_s = best_s(lambda: torch._int_mm(codes, codes.T), device)
        return {
            "read_bandwidth_gbps": Measurement(size_gb / best_s(buffer.sum, device), "GB/s"),
            "copy_bandwidth_gbps": Measurement(2 * size_gb / copy_s, "GB/s", "reads and writes"),
            "int8_rate_gops": Measurement(products / int8_s, "GOP/s"),
        }
    floats = torch.randn(size, size, device=device)
    flexq = FlexQLinear.from_linear(nn.Linear(size, size, bias=False, device=device))
    # No library is sure to reach the processor's rate with INT8, so the fastest product found here stands for it.
    int8_s = min(best_s(lambda: torch._int_mm(codes, codes.T), device), best_s(lambda: flexq(floats), device))
    return {
        "read_bandwidth_gbps": Measurement(buffer.numel() * 4 / 1e9 / best_s(buffer.sum, device), "GB/s"),
        "int8_rate_gops": Measurement(products / int8_s, "GOP/s"),
        "fp32_rate_gops": Measurement(products / best_s(lambda: floats @ floats, device), "GOP/s"),
    }


def best_s(call: Callable[[], Any], device: torch.device, *, calls: int = 6) -> float:
    """The shortest of several calls, in seconds, after a warm-up: a rate that the machine has been seen to reach."""
    warm_up(device)
    call()
    timed = _cuda_times_us if device.type == "cuda" else cpu_times_us
    return timed([lambda _: call()], torch.empty(0), calls).min().item() / 1e6


def cpu_times_us(layers: list[Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> Tensor:
    """Times of single calls, each on the layer that was used longest ago: [calls] float64 microseconds."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < LEAST_CALLS or (len(times) < repeats and time.perf_counter() - begin < _BUDGET_S):
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


def warm_up(device: torch.device) -> None:
    """Keep every thread busy for a while, the same before every method.

    On a virtual machine of two processors the threads of the first short parallel calls may stay packed on one of them for a
    whole second (8 ms a call in place of 2): whichever method came first would pay for it. On a GPU it raises the clocks.
    """
    a = torch.randn(512, 512, device=device)
    end = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < end:
        (a @ a).sum().item()  # .item() waits for a GPU


def cold_bytes() -> int:
    """Twice the size of the processor's last cache, at least 64 MiB: what is read between two uses of the same weights."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    cache = max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=0)
    return max(2 * cache, 64 * 2**20)
