"""Compiling the kernels on first use, and finding them again (torch.utils.cpp_extension).

A build lives under TORCH_EXTENSIONS_DIR, or torch's default cache, in a folder named after the digest of everything that
decides it: all files of the kernel's folder, flags, compiler, torch and Python. What is edited is built anew beside the
old. It is compiled in a folder of its own that takes its final name only when it is complete: what a killed build leaves,
or still writes, is never read. A lock that the operating system releases when its holder dies keeps others from building
the same thing meanwhile.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
CPU_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=off")
CUDA_FLAGS = ("-O3", "-std=c++17")
CUDA_SOURCES = (
    "bindings.cpp",
    "repack.cu",
    "quantize_activation.cu",
    "norm_quantize.cu",
    "w6ax_imma.cu",
    "w6ax_imma_row.cu",
    "w6ax_wgmma.cu",
    "w6ax_bmma.cu",
)
BIT_PLANE_SOURCES = ("bindings.cpp", "w6ax_bmma.cu")
"""Of a build for one width of weights, which `-DFLEXQ_WEIGHT_BITS` names."""
LEAST_CAPABILITY = (8, 0)
"""Of a card: asynchronous copies, and tensor cores for bytes and for bits."""
WAIT_SECONDS = 600


class BuildError(RuntimeError):
    """A kernel that cannot be built here; the message says why and what to do."""


def cpu_kernel_available() -> tuple[bool, str]:
    """Whether the CPU kernel is built or can be built, and why not. Compiles nothing."""
    if cpu_kernel.cache_info().currsize:
        return True, ""
    if "cpu" in _failed:
        return False, _failed["cpu"]
    try:
        _requirements()
    except BuildError as error:
        return False, str(error)
    return True, ""


@functools.cache
def cpu_kernel() -> ModuleType:
    """The CPU kernel's module, compiled if it is not in the cache.

    Raises BuildError, whose message says what is missing and what to do, and remembers it: it is not tried again.
    """
    return _tried_once("cpu", lambda: _load("flexq_cpu", KERNELS / "cpu", ["w6ax_linear.cpp"], CPU_FLAGS))


_failed: dict[str, str] = {}
"""What could not be built in this process, `cpu`, a GPU's architecture or a width of weights and it → why."""


def _tried_once(what: str, load: Callable[[], ModuleType]) -> ModuleType:
    if what in _failed:
        raise BuildError(_failed[what])
    try:
        return load()
    except BuildError as error:
        _failed[what] = str(error)
        raise


def cuda_kernels_obstacle(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot be built for this card, or None. Compiles nothing."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one that is (env/README.md)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU, or no driver for it (nvidia-smi tells)"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    if _architecture(capability) in _failed:
        return _failed[_architecture(capability)]
    try:
        _requirements()
        cuda_home()
    except BuildError as error:
        return str(error)
    return None


def cuda_kernels(device: torch.device) -> ModuleType:
    """The CUDA kernels' module for this card, compiled if it is not in the cache.

    Raises BuildError, whose message says what is missing and what to do, and remembers it: it is not tried again.
    """
    return _cuda_kernels(torch.cuda.get_device_capability(device))


@functools.cache
def _cuda_kernels(capability: tuple[int, int]) -> ModuleType:
    name = _architecture(capability)
    return _tried_once(name, lambda: _load("flexq_cuda", KERNELS / "cuda", list(CUDA_SOURCES), CUDA_FLAGS, name))


def bit_plane_kernel(device: torch.device, weight_bits: int) -> ModuleType:
    """w6ax_bmma for this card, weights of so many bits and activations of 2 to 8, compiled if it is not in the cache.

    Raises BuildError as `cuda_kernels` does.
    """
    return _bit_plane_kernel(torch.cuda.get_device_capability(device), weight_bits)


@functools.cache
def _bit_plane_kernel(capability: tuple[int, int], weight_bits: int) -> ModuleType:
    name, folder, flags, architecture = _bit_plane_place(capability, weight_bits)
    return _tried_once(
        f"{name} {architecture}", lambda: _load(name, folder, list(BIT_PLANE_SOURCES), flags, architecture)
    )


@functools.cache
def build_bit_plane_kernels(device: torch.device, widths: tuple[int, ...]) -> None:
    """Compile `bit_plane_kernel` for these widths side by side, in processes of their own, where it is not in the cache.

    What cannot be built, or whose process was killed, is built, or said, when it is asked for.
    """
    capability = torch.cuda.get_device_capability(device)
    try:
        missing = [bits for bits in widths if not _place(*_bit_plane_place(capability, bits)).is_dir()]
    except BuildError:
        return
    if len(missing) > 1:
        count = min(len(missing), os.cpu_count() or 1)
        build = functools.partial(_build_bit_plane_kernel, capability)
        with (
            suppress(BrokenProcessPool),
            ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as processes,
        ):
            list(processes.map(build, missing))


def _build_bit_plane_kernel(capability: tuple[int, int], weight_bits: int) -> None:
    with suppress(BuildError):
        _bit_plane_kernel(capability, weight_bits)


def _bit_plane_place(capability: tuple[int, int], weight_bits: int) -> tuple[str, Path, tuple[str, ...], str]:
    """Name, sources' folder, flags and architecture of a build for one width of weights, as `_place` takes them."""
    flags = (*CUDA_FLAGS, f"-DFLEXQ_WEIGHT_BITS={weight_bits}")
    return f"flexq_bmma_w{weight_bits}", KERNELS / "cuda", flags, _architecture(capability)


def _architecture(capability: tuple[int, int]) -> str:
    """As nvcc names it. Hopper's own instructions, wgmma among them, want it with an `a`."""
    return f"{capability[0]}.{capability[1]}" + ("a" if capability[0] == 9 else "")


def is_built(device: torch.device) -> bool:
    """Whether the kernels for this device, as they are now, lie in the cache: then loading them compiles nothing."""
    try:
        if device.type == "cpu":
            return _place("flexq_cpu", KERNELS / "cpu", CPU_FLAGS, None).is_dir()
        architecture = _architecture(torch.cuda.get_device_capability(device))
        return _place("flexq_cuda", KERNELS / "cuda", CUDA_FLAGS, architecture).is_dir()
    except BuildError:
        return False


def cuda_home() -> Path:
    """The folder whose bin/ holds nvcc: the system's, conda's or PyPI's; BuildError says where was looked."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    if on_path:
        places.append(str(Path(on_path).resolve().parents[1]))
    places += [os.environ.get("CONDA_PREFIX"), "/usr/local/cuda"]
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places += [str(folder) for folder in (*sorted(packages.glob("cu[0-9]*")), packages / "cuda_nvcc")]
    for place in places:
        if place and (Path(place) / "bin" / "nvcc").is_file():
            return Path(place)
    raise BuildError(
        "CUDA's compiler (nvcc) was not found on the PATH, in CUDA_HOME, /usr/local/cuda, the conda environment or "
        "PyPI's packages; install it with `conda install -c conda-forge cuda-nvcc` or `pip install nvidia-cuda-nvcc`"
    )


def _load(
    name: str, folder: Path, sources: list[str], flags: tuple[str, ...], architecture: str | None = None
) -> ModuleType:
    """Build or find a module. With an architecture (`9.0a`) the sources are CUDA's, and the flags are nvcc's."""
    place = _place(name, folder, flags, architecture)
    try:
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            with _lock(place.with_suffix(".lock")):
                if not place.is_dir():  # nobody else built it while this one waited
                    files = [str(folder / source) for source in sources]
                    _compile(place.name, files, list(flags), place, architecture)
    except OSError as error:
        raise BuildError(
            f"the kernel's cache {place} cannot be written ({error.strerror or error}); set TORCH_EXTENSIONS_DIR to a "
            "folder that can"
        ) from error
    return _import(place)


def _place(name: str, folder: Path, flags: tuple[str, ...], architecture: str | None) -> Path:
    """Where the build of these sources lies, or would."""
    compiler = _requirements()
    facts = flags
    if architecture is not None:
        nvcc = subprocess.run([cuda_home() / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        facts = (*flags, architecture, nvcc)
    return cache_folder() / f"{name}_{_digest(folder, facts, compiler)}"


def _compile(module: str, sources: list[str], flags: list[str], place: Path, architecture: str | None) -> None:
    from torch.utils import cpp_extension

    for abandoned in place.parent.glob(f"{module}.building-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f"{module}.building-", dir=place.parent))
    what = "the kernel once (about 15 s)" if architecture is None else "the CUDA kernels once (about 30 s)"
    print(f"compiling {what}, cached in {place}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    # ninja is installed beside this Python, which need not be on the PATH.
    environment = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    if architecture is None:
        options = {"extra_cflags": flags, "extra_ldflags": ["-fopenmp"]}
    else:
        environment["TORCH_CUDA_ARCH_LIST"] = architecture
        cpp_extension.CUDA_HOME = str(cuda_home())  # torch looks once, at import, and in fewer places
        macros = [flag for flag in flags if flag.startswith("-D")]
        options = {"extra_cflags": ["-O2", "-std=c++17", *macros], "extra_cuda_cflags": flags, "with_cuda": True}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        cpp_extension.load(name=module, sources=sources, build_directory=str(building), **options)
        building.rename(place)
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        raise BuildError(f"compiling the kernel failed: {_gist(error)}; mend that and run again") from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(building, ignore_errors=True)
    print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _gist(error: Exception) -> str:
    """The line of a build's output that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line or "No space left" in line]
    return (telling or lines[-1:] or [type(error).__name__])[0]


def _import(place: Path) -> ModuleType:
    try:
        (library,) = place.glob("*.so")  # torch numbers the names of what one process builds again
        spec = importlib.util.spec_from_file_location(library.stem, library)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except (ImportError, ValueError) as error:  # cut short by a crash of the machine, say: make room for a fresh one
        shutil.rmtree(place, ignore_errors=True)
        raise BuildError(f"the kernel in {place} cannot be loaded ({error}); it was removed, run again") from error
    return loaded


def _requirements() -> str:
    """The compiler's path; BuildError names the first thing that is missing."""
    from torch.utils import cpp_extension

    compiler = shutil.which(cpp_extension.get_cxx_compiler())
    if compiler is None:
        raise BuildError(
            f"no C++ compiler was found (looked for {cpp_extension.get_cxx_compiler()!r}); install g++, or set CXX"
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise BuildError("Python's headers (Python.h) were not found; install python3-dev")
    beside = Path(sys.executable).parent / "ninja"
    if not beside.is_file() and shutil.which("ninja") is None:
        raise BuildError("ninja was not found; install it with `pip install ninja`")
    if not (KERNELS / "cpu").is_dir():
        raise BuildError(f"the kernels' sources were not found in {KERNELS}; run from a checkout of the repository")
    return compiler


def cache_folder() -> Path:
    """That holds one folder a build, safe to delete."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root) / "flexq"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions" / "flexq"


def _digest(folder: Path, flags: tuple[str, ...], compiler: str) -> str:
    """Twelve digits that change with whatever the build depends on; torch itself looks at the sources only."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    for fact in (*flags, compiler, version, torch.__version__, sys.version, sysconfig.get_config_var("SOABI") or ""):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock, waiting at most `WAIT_SECONDS` for another process's build."""
    with path.open("w") as handle:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"another process has held {path} for {WAIT_SECONDS} s; end it, and run again"
                    ) from None
                time.sleep(0.2)
        yield
