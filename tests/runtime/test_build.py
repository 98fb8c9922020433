"""Building on first use: cached, and safe against kills, missing tools, bad sources and caches that cannot be written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flexq_core.runtime import build

ROOT = Path(__file__).resolve().parents[2]
AVAILABLE, REASON = build.cpu_kernel_available()
needs_compiler = pytest.mark.skipif(not AVAILABLE, reason=f"nothing can be built here: {REASON}")

SOURCE = """
#include <Python.h>
#include "answer.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "answer", nullptr, -1, nullptr};
#define INIT(name) PyInit_##name
#define INIT_OF(name) INIT(name)
PyMODINIT_FUNC INIT_OF(TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
"""

# Builds in a process of its own and prints the answer and the seconds it took.
BUILD = """
import sys, time
from pathlib import Path
from flexq_core.runtime import build
start = time.perf_counter()
try:
    module = build._load("answer", Path(sys.argv[1]), ["answer.cpp"], ("-O0",))
    print(module.answer, time.perf_counter() - start)
except build.BuildError as error:
    sys.exit(f"BuildError: {error}")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sources of a small module, with an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text(SOURCE)
    (sources / "answer.h").write_text("#define ANSWER 42\n")
    return sources


def load(folder):
    return build._load("answer", folder, ["answer.cpp"], ("-O0",))


def start(folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slow_compiler(folder: Path, tmp_path: Path) -> Path:
    """A compiler that stops in mid-build for as long as the file `hold` exists, leaving half an object behind."""
    compiler = tmp_path / "slow-c++"
    real = shutil.which(os.environ.get("CXX", "c++"))
    compiler.write_text(f"""#!/bin/sh
case "$*" in
  *" -c "*) ;;
  *) exec {real} "$@" ;;  # asked for its version
esac
if [ -e {tmp_path}/hold ]; then
  echo half > answer.o
  touch {tmp_path}/started
  while [ -e {tmp_path}/hold ]; do sleep 0.05; done
fi
exec {real} "$@"
""")
    compiler.chmod(0o755)
    (tmp_path / "hold").touch()
    return compiler


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear in {seconds} s"
        time.sleep(0.02)


def finish(process, seconds: float = 60) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the build hangs: nothing after {seconds} s")


@needs_compiler
def test_builds_once_says_so_and_leaves_nothing_else(folder, tmp_path, capfd):
    assert load(folder).answer == 42
    said = capfd.readouterr().err
    (place,) = (path for path in (tmp_path / "cache" / "flexq").iterdir() if path.is_dir())
    assert f"compiling the kernel once (about 15 s), cached in {place}" in said
    assert len(list(place.glob("*.so"))) == 1
    assert load(folder).answer == 42
    assert "compiling" not in capfd.readouterr().err


@needs_compiler
def test_a_cached_kernel_loads_in_under_two_seconds_in_a_new_process(folder):
    load(folder)
    out, _ = finish(start(folder))
    answer, seconds = out.split()
    assert answer == "42"
    assert float(seconds) < 2


@needs_compiler
def test_an_edited_header_is_built_anew(folder):
    assert load(folder).answer == 42
    (folder / "answer.h").write_text("#define ANSWER 43\n")
    assert load(folder).answer == 43


@needs_compiler
def test_flags_and_compiler_decide_the_name(folder, tmp_path):
    compiler = shutil.which("c++") or build._requirements()
    other = tmp_path / "other-c++"
    other.symlink_to(compiler)
    names = {
        build._digest(folder, flags, cxx)
        for flags in (("-O0",), ("-O1",), ("-O0", "-g"))
        for cxx in (compiler, str(other))
    }
    assert len(names) == 6


@needs_compiler
@pytest.mark.parametrize("whole_group", [False, True], ids=["python-alone", "with-its-compiler"])
def test_a_killed_build_neither_hangs_nor_spoils_the_next(folder, tmp_path, whole_group):
    compiler = slow_compiler(folder, tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT,
        env=os.environ | {"CXX": str(compiler)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(tmp_path / "started")
    if whole_group:
        os.killpg(first.pid, signal.SIGKILL)
    else:
        first.kill()
    first.wait()
    assert list((tmp_path / "cache" / "flexq").glob("*.building-*/lock")), "torch's lock is what the next build meets"
    (tmp_path / "hold").unlink()  # an orphaned compiler goes on now, beside the next build
    out, err = finish(start(folder, CXX=str(compiler)))
    assert out.split()[:1] == ["42"], err
    assert not list((tmp_path / "cache" / "flexq").glob("*.building-*"))


@needs_compiler
def test_two_processes_build_once(folder, tmp_path):
    compiler = slow_compiler(folder, tmp_path)
    both = [start(folder, CXX=str(compiler)) for _ in range(2)]
    wait_for(tmp_path / "started")
    time.sleep(0.5)
    (tmp_path / "hold").unlink()
    said = [finish(process) for process in both]
    assert [out.split()[0] for out, _ in said] == ["42", "42"]
    assert sum("compiling the kernel once" in err for _, err in said) == 1


@needs_compiler
def test_waiting_for_another_build_ends(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "WAIT_SECONDS", 0.3)
    path = tmp_path / "a.lock"
    with (
        build._lock(path),
        pytest.raises(build.BuildError, match=r"another process has held .*a\.lock for 0.3 s; end it"),
        build._lock(path),
    ):
        pass


@needs_compiler
def test_a_source_that_does_not_compile_names_the_compilers_error(folder, tmp_path):
    (folder / "answer.h").write_text("#error no such luck\n")
    with pytest.raises(build.BuildError, match="compiling the kernel failed: .*no such luck.*run again"):
        load(folder)
    (folder / "answer.h").write_text("#define ANSWER 44\n")
    assert load(folder).answer == 44


@needs_compiler
def test_a_damaged_library_is_removed_and_built_anew(folder, tmp_path):
    finish(start(folder))
    (library,) = (tmp_path / "cache" / "flexq").glob("*/*.so")
    library.write_bytes(b"not a library")
    with pytest.raises(build.BuildError, match="cannot be loaded .*it was removed, run again"):
        load(folder)
    assert load(folder).answer == 42


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(
        build.BuildError, match=r"cache .*file/flexq/answer_\w+ cannot be written .*TORCH_EXTENSIONS_DIR"
    ):
        load(folder)


@needs_compiler
def test_a_full_disk_is_named(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.tempfile, "mkdtemp", full)
    with pytest.raises(build.BuildError, match="cannot be written .No space left on device.; set TORCH_EXTENSIONS_DIR"):
        load(folder)


@pytest.fixture
def fresh(monkeypatch):
    """The module as it is before anything was built in this process."""
    monkeypatch.setattr(build, "_failed", {})
    build.cpu_kernel.cache_clear()
    yield
    build.cpu_kernel.cache_clear()


def test_no_compiler_is_said_before_and_when_building(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = "no C++ compiler was found (looked for 'no-such-compiler'); install g++, or set CXX"
    assert build.cpu_kernel_available() == (False, message)
    with pytest.raises(build.BuildError) as raised:
        build.cpu_kernel()
    assert str(raised.value) == message


@needs_compiler
def test_no_python_headers_are_said(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    available, reason = build.cpu_kernel_available()
    assert not available
    assert "Python's headers (Python.h) were not found; install python3-dev" in reason


@needs_compiler
def test_no_ninja_is_said(fresh, monkeypatch, tmp_path):
    compiler = build._requirements()
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert build.cpu_kernel_available() == (False, "ninja was not found; install it with `pip install ninja`")


@needs_compiler
def test_a_failure_is_remembered_and_not_tried_again(fresh, monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        raise build.BuildError("compiling the kernel failed: so it goes")

    monkeypatch.setattr(build, "_load", fail)
    for _ in range(2):
        with pytest.raises(build.BuildError, match="so it goes"):
            build.cpu_kernel()
    assert len(tries) == 1
    assert build.cpu_kernel_available() == (False, "compiling the kernel failed: so it goes")


def test_kernels_of_several_widths_are_built_together_where_they_are_missing(fresh, monkeypatch, tmp_path):
    built = []

    def kernel(capability, weight_bits):
        built.append((capability, weight_bits))
        if weight_bits == 3:
            raise build.BuildError("no room")

    def pool(count, mp_context):
        counts.append(count)
        return ThreadPoolExecutor(count)

    counts = []
    monkeypatch.setattr(build, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(build, "_bit_plane_kernel", kernel)
    monkeypatch.setattr(build, "_place", lambda name, *_: tmp_path / name)
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda device: (9, 0))
    (tmp_path / "flexq_bmma_w4").mkdir()
    build.build_bit_plane_kernels(torch.device("cuda"), (2, 3, 4))
    assert sorted(built) == [((9, 0), 2), ((9, 0), 3)]  # and what failed is said by who asks for it
    build.build_bit_plane_kernels(torch.device("cuda"), (2, 4))
    assert len(built) == 2  # one alone is built by who asks for it
    build.build_bit_plane_kernels(torch.device("cuda"), (2, 3, 5))
    assert counts == [2, 2] and len(built) == 5  # no more processes than cores


def test_a_killed_build_of_several_widths_is_left_to_who_asks_for_it(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_build_bit_plane_kernel", _killed)
    monkeypatch.setattr(build, "_place", lambda name, *_: tmp_path / name)
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda device: (9, 0))
    build.build_bit_plane_kernels(torch.device("cuda"), (2, 3))  # and raises nothing


def _killed(capability, weight_bits):
    os.kill(os.getpid(), signal.SIGKILL)


def test_importing_the_package_compiles_nothing(tmp_path):
    code = "import flexq_core, flexq_core.runtime.ops, sys; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert not list(tmp_path.iterdir())
