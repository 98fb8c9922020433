"""This machine: what a record says of it, and what will run on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import subprocess
from datetime import UTC, datetime
from functools import cache
from typing import Any

from flexq_core.workbook import paths


def provenance(device: str) -> dict[str, Any]:
    """git_commit, dirty, versions, device, driver and time, as a record holds them."""
    return {**_machine(device), "time": datetime.now(UTC).isoformat(timespec="seconds")}


@cache
def _machine(device: str) -> dict[str, Any]:
    import torch

    import flexq_core

    packages = ("torch", "transformers", "numpy")
    versions = {"python": platform.python_version(), "flexq_core": flexq_core.__version__}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    commit = _git("rev-parse", "HEAD")
    on_gpu = device.startswith("cuda")
    return {
        "git_commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "driver": (driver() or "unknown") if on_gpu else None,
    }


def processor_name() -> str:
    """The processor's name; platform.processor() is empty or just the architecture on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def card_label(name: str) -> str:
    """A GPU's short name, as its folder's: `NVIDIA H100 80GB HBM3` is h100, `NVIDIA GeForce RTX 4090` rtx-4090."""
    words = [word for word in re.split(r"[\s-]+", name.lower()) if word not in ("nvidia", "tesla", "geforce")]
    number = next((index for index, word in enumerate(words) if re.search(r"\d", word)), len(words))
    return "-".join(words[: number + 1])


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository, or None without git or outside a repository."""
    if not (paths.ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def driver() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def describe() -> list[dict[str, str]]:
    """Rows of {what, found, consequence}: Python, torch, processor, the compiled kernel, GPU. Nothing is compiled."""
    import torch

    from flexq_core.runtime import build

    available, reason = build.cpu_kernel_available()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows = [
        ("Python", platform.python_version(), "3.11 to 3.13 are supported"),
        ("PyTorch", torch.__version__, "the reference backend runs wherever it does"),
        ("Processor", f"{processor_name()}, {threads}", "the kernel follows torch.set_num_threads"),
        (
            "CPU kernel",
            "ready" if available else "not available",
            "compiled on first use, then cached" if available else f"{reason}; `reference` runs instead",
        ),
        ("GPU", gpu or "none", "models run on it" if gpu else "models run on the processor"),
    ]
    return [dict(zip(("what", "found", "consequence"), row, strict=True)) for row in rows]


def preemptions() -> int:
    """How often the system has taken a processor from this process: between two calls on a quiet machine, hardly ever."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
