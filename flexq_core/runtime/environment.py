"""What this machine has, and what will therefore run."""

from __future__ import annotations

import os
import platform

import torch

from flexq_core.runtime import build


def describe() -> list[dict[str, str]]:
    """Rows of {what, found, consequence}: Python, torch, processor, the compiled kernel, GPU. Nothing is compiled."""
    available, reason = build.cpu_kernel_available()
    rows = [
        ("Python", platform.python_version(), "3.11 to 3.13 are supported"),
        ("PyTorch", torch.__version__, "the reference backend runs wherever it does"),
        (
            "Processor",
            f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
            "the kernel follows torch.set_num_threads",
        ),
        (
            "CPU kernel",
            "ready" if available else "not available",
            "compiled once, then cached" if available else f"{reason}; `reference` runs instead",
        ),
    ]
    if torch.cuda.is_available():
        rows.append(("GPU", torch.cuda.get_device_name(), "models run on it, on the reference backend"))
    else:
        rows.append(("GPU", "none", "models run on the processor"))
    return [dict(zip(("what", "found", "consequence"), row, strict=True)) for row in rows]


def _processor() -> str:
    """The processor's name; platform.processor() is empty or just the architecture on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
