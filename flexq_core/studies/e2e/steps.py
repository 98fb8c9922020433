"""Where the time of a decode step goes on a GPU, and what it could not go below."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexq_core.studies.e2e.decode import cache_bytes
from flexq_core.studies.e2e.linears import model_bytes
from flexq_core.studies.e2e.processes import local_part

PARTS = ("gemm", "attention", "other")
"""Of a step: matrix products with what is part of their kernels (with one token FlexQ's norms and some quantisation), attention,
and all else (norms and quantisation apart, rotary embeddings, caches, sampling)."""

_NAMES = {
    "attention": ("fmha", "flash", "softmax", "attention_kernel"),
    "gemm": ("w6ax", "gemm", "gemv", "nvjet", "cutlass", "xmma", "_mm", "splitk", "split_k", "cublas"),
}
_LAUNCHERS = ("cutlass::Kernel", "cutlass::Kernel2", "cutlass::device_kernel")
_REPLAYS = 8
STEPS = 1 + _REPLAYS
"""That `parts_ms` runs."""


def step_bytes(model: nn.Module, cache: Any, tokens: int) -> int:
    """Bytes that a decode step must read: all weights but the embedding's rows, and the keys and values of `tokens` positions."""
    embedding, head = (
        local_part(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    unread = 0 if embedding.data_ptr() == head.data_ptr() else embedding.nbytes
    return model_bytes(model) - unread + cache_bytes(cache, tokens)


def parts_ms(step: Callable[[], None]) -> tuple[dict[str, float], str]:
    """Milliseconds of a step by part of PARTS, and `idle`, when no kernel runs; nothing where the profiler sees no kernel.

    Also which kernels the matrix products are, see `products`.
    step: launches one step on the current GPU; called STEPS times.  Kernels that overlap count once, as the one that began first.
    """
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_REPLAYS):
            step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted((event.time_range.start, event.time_range.end, event.name) for event in on_gpu)
    return (shares_ms(kernels, _REPLAYS), products(kernels)) if kernels else ({}, "")


def shares_ms(kernels: list[tuple[float, float, str]], steps: int) -> dict[str, float]:
    """Kernels (start, end, name) in microseconds and in order, of so many equal steps → milliseconds a step by part."""
    busy = dict.fromkeys((*PARTS, "idle"), 0.0)
    now = kernels[0][0]
    for start, end, name in kernels:
        busy["idle"] += max(0.0, start - now)
        busy[part_of(name)] += max(0.0, end - max(start, now))
        now = max(now, end)
    return {part: total / steps / 1e3 for part, total in busy.items()}


def products(kernels: list[tuple[float, float, str]]) -> str:
    """The names of the three kernels that take most of the matrix products' time, with their shares of it."""
    times: Counter[str] = Counter()
    for start, end, name in kernels:
        if part_of(name) == "gemm":
            times[product_name(name)] += end - start
    return ", ".join(f"{name} {time / times.total():.0%}" for name, time in times.most_common(3))


def product_name(kernel: str) -> str:
    """A matrix product's kernel by the part of its C++ name that says so, without its type and arguments.

    `void flexq::(anonymous namespace)::w6ax_wgmma_kernel<128>(Linear)` is `w6ax_wgmma_kernel`. CUTLASS launches all through
    kernels of one name: of those it is what they launch.
    """
    names = [name for name in re.findall(r"\w+(?:::\w+)*", kernel) if part_of(name) == "gemm"]
    return next((name for name in names if name not in _LAUNCHERS), names[0])


def part_of(kernel: str) -> str:
    """The part of a step that a kernel of this name belongs to."""
    name = kernel.lower()
    return next((part for part, marks in _NAMES.items() if any(mark in name for mark in marks)), "other")
