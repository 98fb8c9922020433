"""What follows from what a machine has: whether the workbook runs, on which backends, what it leaves out, and how to get that."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexq_core.studies.doctor import probes

SUPPORTED = ((3, 11), (3, 13))
"""The first and the last Python that env/requirements.lock holds for."""
LEAST_FREE_GIB = 0.1
"""What a demo run writes, generously."""


@dataclass(frozen=True)
class Backend:
    """A backend of the op on this machine. why: what keeps it from running; of `auto`, what it means here."""

    name: str
    runs: bool
    why: str


@dataclass(frozen=True)
class Notebook:
    """A notebook, and what it does without on this machine: nothing where it runs in full."""

    name: str
    without: list[str]


@dataclass(frozen=True)
class Step:
    """A command that brings what this machine lacks."""

    brings: str
    command: str


def problems() -> list[str]:
    """Why the workbook cannot run at all, each with what to do; none where it can."""
    found = []
    here = sys.version_info[:2]
    if not SUPPORTED[0] <= here <= SUPPORTED[1]:
        found.append(
            f"Python {here[0]}.{here[1]} is not supported: 3.11 to 3.13 are; make PYTHON=/path/to/python3.12 env"
        )
    if not (probes.ROOT / "notebooks").is_dir():
        found.append(f"{probes.ROOT} has no notebooks: run from a checkout of the repository")
        return found
    missing = probes.missing_packages()
    if missing:
        by_itself = "" if _in_conda() else "; every other target of make does it by itself, such as make demo"
        found.append(f"packages are missing ({', '.join(missing)}): {_install()}{by_itself}")
        return found
    try:
        importlib.import_module("torch")
        paths = importlib.import_module("flexq_core.workbook.paths")
    except Exception as error:  # a library that the system lacks, a broken installation
        found.append(f"PyTorch or what is beside it cannot be imported ({probes.said(error)}): {_install()}")
        return found
    outputs = paths.outputs()
    nearest = next(folder for folder in (outputs, *outputs.parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        found.append(f"{probes.short(outputs)} cannot be written: set FLEXQ_OUTPUTS to a folder that can")
    elif probes.free_gib(nearest) < LEAST_FREE_GIB:
        found.append(f"{probes.short(outputs)} has no room left: free some, or set FLEXQ_OUTPUTS to a folder elsewhere")
    return found


def backends() -> list[Backend]:
    """Every backend, those of the GPU on the first card. Nothing is compiled."""
    import torch

    from flexq_core.quant.spec import GROUP_SIZE
    from flexq_core.runtime import cpu, cuda, ops

    def obstacle(name: str) -> str | None:
        if name == "cpu":
            return cpu.obstacle(torch.device("cpu"), 6, GROUP_SIZE)
        return cuda.obstacle(torch.device("cuda", 0), 6, GROUP_SIZE, name) if name in cuda.ORDERS else None

    why_not = {name: obstacle(name) for name in ops.BACKENDS}
    fast = [name for name in (("imma", "wgmma") if torch.cuda.is_available() else ("cpu",)) if not why_not[name]]
    auto = " or ".join(fast) + (", by the layer's shape" if len(fast) > 1 else "") if fast else "reference"
    found = [Backend(name, reason is None, reason or "") for name, reason in why_not.items() if name != "auto"]
    return [Backend("auto", True, f"{auto} on this machine"), *found]


_WITHOUT = (
    ("00_quickstart", "kernel", "a compiled kernel: the definition (`reference`) is compared with itself"),
    ("01_sensitivity", "kernel", "a compiled kernel: scores on `reference`, slower"),
    ("01_sensitivity", "texts", "{texts}: the demo models' text is embedded"),
    ("02_accuracy", "kernel", "a compiled kernel: scores packed weights on `reference`, slower"),
    ("02_accuracy", "texts", "{texts}: the demo models' text is embedded"),
    ("02_accuracy", "tasks", "{tasks}: `continuation` is embedded"),
    ("03_kernels", "kernel", "FlexQ's kernels: torch's own products only"),
    ("03_kernels", "gpu", "a GPU, of which the paper's claims are: a processor's products"),
    ("04_e2e", "kernel", "a compiled kernel: no claim about the time of a token"),
    ("04_e2e", "gpu", "a GPU, of which the paper's claims are: latencies on a processor, no peak memory"),
    ("04_e2e", "models", "pretrained models but the demo and cached ones: `-p weights random` builds any shape"),
    ("05_report", "gpu", "this machine's own verdicts on claims about a GPU: reads outputs/reference/"),
)
"""Notebook, what it may lack, and what it then does without."""


def notebooks(found: list[Backend], data_dir: str, hub_reachable: bool) -> list[Notebook]:
    """What each notebook does without, given the backends, a folder of texts and tasks, and the hub.

    What the hub's cache has runs without the hub as well; which of its files are whole is not looked into.
    """
    import torch

    from flexq_core.sources.data import HUB_TEXTS
    from flexq_core.sources.held import held_by
    from flexq_core.sources.tasks import PAPER_TASKS
    from flexq_core.workbook import paths

    held = held_by(data_dir)
    absent = {
        kind: ", ".join(name for name in names if not hub_reachable and name not in held)
        for kind, names in (("texts", HUB_TEXTS), ("tasks", PAPER_TASKS))
    }
    gpu = torch.cuda.is_available()
    has = {
        "kernel": any(each.runs for each in found if each.name == ("imma" if gpu else "cpu")),
        "gpu": gpu,
        "models": hub_reachable,
        **{kind: not names for kind, names in absent.items()},
    }
    return [
        Notebook(
            file.stem, [told.format(**absent) for name, what, told in _WITHOUT if name == file.stem and not has[what]]
        )
        for file in sorted(paths.NOTEBOOKS.glob("*.ipynb"))
    ]


def steps(found: list[Backend], facts: dict[str, str]) -> list[Step]:
    """How to get what is lacking, the exact commands. facts: of `probes.facts`."""
    if facts["packages"].startswith(probes.MISSING):
        return [Step("pinned packages", _install())]
    wanted = []
    obstacles = dict.fromkeys(each.why for each in found if not each.runs)
    wanted += [
        Step(brings, command())
        for obstacle in obstacles
        for sign, (brings, command) in _REMEDIES.items()
        if sign in obstacle
    ]
    if probes.NOT_BUILT in (facts["CPU kernel"], facts["CUDA kernels"]):
        wanted.append(Step("kernels now", f"{_python()} -m flexq_core doctor --build"))
    if facts["hub"] == probes.OFFLINE:
        wanted.append(Step("the hub", "unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE"))
    elif not facts["hub"].startswith(probes.REACHABLE):
        download = f"{_beside_python('hf')} download meta-llama/Llama-2-7b-hf --local-dir llama-2-7b"
        wanted.append(
            Step("a real model", f"{download}   # where there is a network; bring the folder, name it as the model")
        )
    if facts["hub token"] == probes.NONE:
        wanted.append(
            Step("gated models", f"{_beside_python('hf')} auth login   # once their licence is accepted on the hub")
        )
    return list(dict.fromkeys(wanted))


def _python() -> str:
    return _typed(Path(sys.executable))


def _beside_python(script: str) -> str:
    """A script of this environment, which need not be on the PATH."""
    place = Path(sys.executable).with_name(script)
    return _typed(place) if place.is_file() else script


def _typed(path: Path) -> str:
    """A path as a shell takes it; within quotes it would leave `~` as it is."""
    told = probes.short(path)
    return f"~/{shlex.quote(told[2:])}" if told.startswith("~/") else shlex.quote(told)


def _in_conda() -> bool:
    return sys.prefix == os.environ.get("CONDA_PREFIX")


def _install() -> str:
    return f"{_python()} -m pip install -r env/requirements.lock" if _in_conda() else "make env"


def _of_system(debian: str, fedora: str, conda: str) -> Callable[[], str]:
    """The command that installs a package with what this system has for that."""

    def command() -> str:
        root = "" if os.geteuid() == 0 else "sudo "
        if _in_conda():
            return f"conda install -c conda-forge {conda}"
        if not shutil.which("apt-get") and shutil.which("dnf"):
            return f"{root}dnf install {fedora}"
        return f"{root}apt-get install {debian}"

    return command


_NO_CARD = "an NVIDIA card of compute capability 8.0 or later; on a machine that has one: make env"


def _cuda_torch() -> str:
    if not probes.nvidia_card_seen():
        return _NO_CARD
    return f"{_python()} -m pip uninstall -y torch && {_python()} -m pip install -r env/requirements.lock"


def _driver() -> str:
    return "nvidia-smi   # names the trouble" if probes.nvidia_card_seen() else _NO_CARD


def _nvcc() -> str:
    import torch

    cuda = torch.version.cuda or ""
    if _in_conda() or int(cuda.split(".")[0] or 0) < 13:  # PyPI's packages for CUDA 12 have no nvcc
        return f"conda install -c conda-forge cuda-nvcc={cuda}"
    return f"{_python()} -m pip install 'nvidia-cuda-nvcc=={cuda}.*'"


_VERSION = ".".join(map(str, sys.version_info[:2]))
_REMEDIES: dict[str, tuple[str, Callable[[], str]]] = {
    "no C++ compiler": ("C++ compiler", _of_system("g++", "gcc-c++", "gxx")),
    "Python.h": (
        "Python's headers",
        _of_system(f"python{_VERSION}-dev", f"python{_VERSION}-devel", f"python={_VERSION}"),
    ),
    "ninja was not found": ("ninja", lambda: f"{_python()} -m pip install ninja"),
    "(nvcc) was not found": ("CUDA's compiler", _nvcc),
    "built without CUDA": ("a GPU", _cuda_torch),
    "finds no CUDA GPU": ("a GPU", _driver),
}
"""What the messages of runtime/build.py say is lacking → its name, and the command that brings it."""
