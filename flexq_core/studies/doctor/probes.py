"""What this machine has, one probe a fact. A probe that fails says so in its own line, and the others go on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[3]
REACHABLE, OFFLINE = "reachable", "not asked: HF_HUB_OFFLINE is set"
MISSING, NOT_BUILT, NONE = "not installed", "not built yet: compiled on first use", "none"
HUB_SECONDS = 3
CACHE_SECONDS = 5
GIB = 2**30
_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi", "amx_tile", "amx_int8",
)  # fmt: skip
"""Of /proc/cpuinfo, those that the CPU kernel's paths ask for (kernels/cpu/*.h, `available`)."""


def facts(data_dir: str = "", *, compile_kernels: bool = False) -> dict[str, str]:
    """What was looked at → what was found, in the order in which it is told."""
    probes: dict[str, Callable[[], str]] = {
        "workbook": _workbook,
        "Python": lambda: f"{platform.python_version()} at {short(sys.executable)}",
        "system": lambda: (
            f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}"
        ),
        "packages": _packages,
        "PyTorch": _torch,
        "C++ compiler": _compiler,
        "CUDA compiler": _nvcc,
        "GPU": _cards,
        "processor": _processor,
        "CPU kernel": lambda: _kernels(["cpu"], compile_kernels),
        "CUDA kernels": lambda: _kernels(_one_card_an_architecture(), compile_kernels),
        "instructions": _instructions,
        "memory": _memory,
        "outputs": _outputs,
        "kernel cache": lambda: _within(CACHE_SECONDS, _kernel_cache),
        "hub cache": lambda: _within(CACHE_SECONDS, _hub_cache),
        "hub": lambda: _within(HUB_SECONDS + 1, _hub),
        "hub token": _hub_token,
    }
    if data_dir:
        probes["data_dir"] = lambda: _data_dir(data_dir)
    return {what: _told(probe) for what, probe in probes.items()}


def said(error: Exception) -> str:
    """An exception in one line."""
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])


def short(path: str | Path) -> str:
    """A path as it is told and typed: from the repository's root, or from `~`, where it lies below one of them."""
    path = Path(path)
    for above, name in ((ROOT, ""), (Path.home(), "~/")):
        if path.is_relative_to(above) and path != above:
            return f"{name}{path.relative_to(above)}"
    return str(path)


UNKNOWN = "known once the packages are installed"


def _told(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except ModuleNotFoundError:
        return UNKNOWN
    except Exception as error:
        return f"cannot be found out ({said(error)})"


def _within(seconds: float, probe: Callable[[], str]) -> str:
    """The probe's answer, or that there was none in time: neither looking up a name nor walking a folder can be broken off."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(_told(probe)), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer within {seconds} s"


def _workbook() -> str:
    import flexq_core
    from flexq_core.workbook.machine import provenance
    from flexq_core.workbook.run import commit_text

    return f"{flexq_core.__version__}, {commit_text(provenance('cpu'))}"


def missing_packages() -> list[str]:
    """What env/requirements.in asks for, but to develop the workbook, and is not installed."""
    needed = (ROOT / "env" / "requirements.in").read_text(encoding="utf-8").split("# What keeps it well")[0]
    names = [match[0] for line in needed.splitlines() if (match := re.match(r"[A-Za-z][\w.-]*", line))]
    return [name for name in names if not _version(name)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> str:
    missing = missing_packages()
    if missing:
        return f"{MISSING}: {', '.join(missing)}"
    lock = (ROOT / "env" / "requirements.lock").read_text(encoding="utf-8")
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE)
    wanted: dict[str, set[str]] = {}
    for name, version in pins:
        wanted.setdefault(name, set()).add(version)
    others = [
        f"{name} {have} (pinned: {' or '.join(sorted(versions))})"
        for name, versions in wanted.items()
        if (have := _version(name)) and have.split("+")[0] not in versions
    ]
    return f"other than env/requirements.lock: {', '.join(others)}" if others else "as in env/requirements.lock"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, " + (f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")


def _compiler() -> str:
    try:
        from torch.utils import cpp_extension

        wanted = cpp_extension.get_cxx_compiler()
    except ModuleNotFoundError:
        wanted = os.environ.get("CXX", "c++")  # what torch will look for
    place = shutil.which(wanted)
    if place is None:
        return f"none (looked for {wanted!r})"
    version = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    return f"{short(place)}: {version[0] if version else 'tells no version'}"


def _nvcc() -> str:
    try:
        from flexq_core.runtime import build

        nvcc = build.cuda_home() / "bin" / "nvcc"
    except ModuleNotFoundError:
        nvcc = shutil.which("nvcc")
    except build.BuildError:
        nvcc = None
    if not nvcc:
        return "none"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20).stdout
    release = re.search(r"release ([\d.]+)", told)
    return f"{short(nvcc)}: {f'CUDA {release[1]}' if release else 'tells no version'}"


def nvidia_card_seen() -> bool:
    """Whether the system knows of an NVIDIA card, whatever torch can do with it."""
    return any(Path(place).exists() for place in ("/proc/driver/nvidia/gpus", "/dev/nvidia0")) or bool(
        shutil.which("nvidia-smi")
    )


def _cards() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        return "one of NVIDIA's" if nvidia_card_seen() else "none"
    from flexq_core.workbook.machine import driver

    if not torch.cuda.is_available():
        return "one that torch cannot use" if nvidia_card_seen() else "none"
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(f"{card.name} (compute capability {card.major}.{card.minor}, {card.total_memory / GIB:.0f} GiB)")
    return f"{', '.join(cards)}; driver {driver() or 'unknown'}"


def _processor() -> str:
    import torch

    from flexq_core.workbook.machine import processor_name

    return f"{processor_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _one_card_an_architecture() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = {torch.cuda.get_device_capability(index): f"cuda:{index}" for index in reversed(range(count))}
    return list(cards.values())


def _kernels(devices: list[str], compile_kernels: bool) -> str:
    """Whether the kernels for these devices are built; compiles them if told to."""
    import torch

    from flexq_core.runtime import build

    told = []
    for device in map(torch.device, devices):
        if device.type == "cpu":
            load, obstacle = build.cpu_kernel, build.cpu_kernel_available()[1]
        else:
            load, obstacle = lambda device=device: build.cuda_kernels(device), build.cuda_kernels_obstacle(device)
        if obstacle:
            told.append(f"cannot be built: {obstacle}")
        elif build.is_built(device):
            told.append("built")
        elif not compile_kernels:
            told.append(NOT_BUILT)
        else:
            start = time.perf_counter()
            try:
                load()
                told.append(f"built now, in {time.perf_counter() - start:.0f} s")
            except build.BuildError as error:
                told.append(str(error))
    return "; ".join(told) or "no card to build them for"


def _instructions() -> str:
    """What the CPU kernel can use, asked of it where it is built; else what the processor lists of that."""
    import torch

    from flexq_core.runtime import build, cpu

    if build.is_built(torch.device("cpu")):
        return f"{', '.join(cpu.available_isas())} (the CPU kernel's paths, fastest first)"
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    listed = [flag for flag in _FLAGS if flags and flag in flags[1].split()]
    return f"{', '.join(listed) or 'none of them'} by /proc/cpuinfo; the CPU kernel's own answer once it is built"


def _memory() -> str:
    amounts = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE))
    total, free = (int(amounts[name]) * 1024 / GIB for name in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    allowed = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    most = (
        ""
        if allowed == "max" or int(allowed) / GIB >= total
        else f", at most {int(allowed) / GIB:.1f} for this process"
    )
    return f"{total:.1f} GiB, {free:.1f} free{most}"


def free_gib(folder: Path) -> float:
    """Disk space where `folder` is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB


def _outputs() -> str:
    from flexq_core.workbook import paths

    return f"{short(paths.outputs())}, {_size(paths.outputs())}; {free_gib(paths.outputs()):.1f} GiB free"


def _size(folder: Path) -> str:
    """Of all files in a folder; links, of which the hub's cache is full, take no room."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return f"{total / GIB:.1f} GiB" if total >= GIB / 10 else f"{total / 2**20:.1f} MiB"


def _kernel_cache() -> str:
    from flexq_core.runtime import build

    folder = build.cache_folder()
    builds = sum(place.is_dir() for place in folder.iterdir()) if folder.is_dir() else 0
    return f"{short(folder)}: {builds} {'build' if builds == 1 else 'builds'}, {_size(folder)}; {free_gib(folder):.1f} GiB free"


def _hub_cache() -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    kept = [place.name.split("--")[0] for place in folder.glob("*--*")]
    counts = f"{kept.count('models')} models, {kept.count('datasets')} datasets"
    return f"{short(folder)}: {counts}, {_size(folder)}; {free_gib(folder):.1f} GiB free"


def _hub() -> str:
    """Begins with REACHABLE where the hub answers. Nothing is asked where it is told to stay offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    from huggingface_hub.utils import get_session  # with the proxies and certificates of real downloads

    host = urlsplit(constants.ENDPOINT).hostname  # a mirror's address may hold a password, and so may an error's text
    start = time.perf_counter()
    try:
        status = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code
    except Exception as error:
        return f"{host} cannot be reached ({type(error).__name__})"
    if status >= 500:
        return f"{host} is out of order (HTTP {status})"
    return f"{REACHABLE}: {host} answered in {time.perf_counter() - start:.1f} s"


def _hub_token() -> str:
    """Whether there is one. It is not read."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"present, in {name}"
    file = Path(constants.HF_TOKEN_PATH)
    return f"present, in {short(file)}" if file.is_file() and file.stat().st_size else NONE


def _data_dir(folder: str) -> str:
    if not Path(folder).expanduser().is_dir():
        return f"{folder!r} is no folder"
    from flexq_core.sources.held import held_by

    return f"{short(folder)} has {', '.join(held_by(folder)) or 'none of the texts and tasks'}"
