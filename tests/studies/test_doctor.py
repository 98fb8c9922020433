"""The doctor: tells what is here, what follows and how to get the rest; whatever a machine lacks, it ends well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexq_core.runtime import build, ops
from flexq_core.studies import doctor
from flexq_core.studies.doctor import consequences, probes
from flexq_core.workbook import paths

SECRET = "hf_not-to-be-told"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test asks the hub, and none looks through the caches of who runs it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No GPU, no compiler, nothing built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probes, "nvidia_card_seen", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "_failed", {})
    build.cpu_kernel.cache_clear()
    yield
    build.cpu_kernel.cache_clear()


def commands(found: doctor.Diagnosis) -> dict[str, str]:
    return {step.brings: step.command for step in found.steps}


def test_it_tells_this_machine_and_that_the_workbook_runs(capsys):
    assert doctor.main([]) == 0
    told = capsys.readouterr().out
    assert told.endswith("The workbook runs here.\n")
    assert "cannot be found out" not in told
    for fact in (torch.__version__, "GiB", "env/requirements.lock", *ops.BACKENDS, "05_report"):
        assert fact in told


def test_json_has_every_fact_backend_and_notebook(capsys, tmp_path):
    assert doctor.main(["--json", "--data-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["runs", "problems", "machine", "backends", "notebooks", "steps"]
    assert found["runs"] is True and found["problems"] == []
    assert {type(value) for value in found["machine"].values()} == {str}
    assert {backend["name"] for backend in found["backends"]} == set(ops.BACKENDS)
    assert {notebook["name"] for notebook in found["notebooks"]} == {
        file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")
    }
    assert all(set(step) == {"brings", "command"} and all(step.values()) for step in found["steps"])


def test_what_it_says_of_a_backend_is_what_happens(monkeypatch):
    for backend in doctor.examine().backends:
        device = "cuda" if backend.name in ("imma", "wgmma", "bmma") else "cpu"
        if backend.runs:
            assert ops.resolve_backend(backend.name, device)
        else:
            with pytest.raises(ValueError, match="cannot run here") as refused:
                ops.resolve_backend(backend.name, device)
            assert backend.why in str(refused.value)


def test_a_machine_without_compiler_or_gpu_still_runs(bare):
    found = doctor.examine()
    assert found.runs
    backends = {backend.name: backend for backend in found.backends}
    assert not any(backends[name].runs for name in ("cpu", "imma", "wgmma", "bmma"))
    assert "no C++ compiler was found" in backends["cpu"].why
    assert backends["auto"].why == "reference on this machine"
    assert found.machine["C++ compiler"] == "none (looked for 'no-such-compiler')"
    assert found.machine["GPU"] == "none"
    assert commands(found)["C++ compiler"].endswith(("install g++", "install gcc-c++", "gxx"))
    assert "an NVIDIA card" in commands(found)["a GPU"]
    without = {notebook.name: " ".join(notebook.without) for notebook in found.notebooks}
    assert "compared with itself" in without["00_quickstart"]
    assert "a GPU" in without["03_kernels"]


def test_nothing_is_compiled_unless_told(bare, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled"))
    if build.cpu_kernel_available()[0]:
        found = doctor.examine()
        assert found.machine["CPU kernel"] == probes.NOT_BUILT
        assert commands(found)["kernels now"].endswith("-m flexq_core doctor --build")
    assert not (tmp_path / "kernels").exists()


def test_told_to_build_it_builds_and_says_how_long_or_why_not(bare, monkeypatch):
    monkeypatch.setattr(build, "_requirements", lambda: sys.executable)
    monkeypatch.setattr(build, "_load", lambda *_: build)
    assert probes.facts(compile_kernels=True)["CPU kernel"] == "built now, in 0 s"
    build.cpu_kernel.cache_clear()

    def fail(*_):
        raise build.BuildError("compiling the kernel failed: so it goes")

    monkeypatch.setattr(build, "_load", fail)
    assert probes.facts(compile_kernels=True)["CPU kernel"] == "compiling the kernel failed: so it goes"


def test_a_card_is_told_and_what_it_cannot_do(bare, monkeypatch):
    card = type("Card", (), {"name": "Card 1000", "major": 7, "minor": 5, "total_memory": 16 * probes.GIB})
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (7, 5),
        "get_device_name": lambda *_: card.name,
        "get_device_properties": lambda *_: card,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = doctor.examine()
    assert found.runs
    assert found.machine["GPU"].startswith("Card 1000 (compute capability 7.5, 16 GiB); driver ")
    (imma,) = (backend for backend in found.backends if backend.name == "imma")
    assert imma.why == "Card 1000 has compute capability 7.5; 8.0 is needed"
    assert not any("a GPU, of which" in told for notebook in found.notebooks for told in notebook.without)


@pytest.mark.parametrize("seen", [True, False])
def test_a_card_that_torch_cannot_use_has_its_own_command(bare, monkeypatch, seen):
    monkeypatch.setattr(probes, "nvidia_card_seen", lambda: seen)
    for cuda, command in (("13.0", "nvidia-smi"), (None, "pip uninstall -y torch")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert (command in commands(doctor.examine())["a GPU"]) is seen


@pytest.mark.parametrize("lacking", ["compiler", "headers", "ninja", "nvcc"])
def test_every_obstacle_to_a_build_has_its_command(bare, monkeypatch, tmp_path, lacking):
    """The commands are found by the words of build.py's own messages."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if lacking != "compiler":
        monkeypatch.setenv("CXX", sys.executable)
    with monkeypatch.context() as patch:
        if lacking == "headers":
            patch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        elif lacking == "ninja":
            patch.setattr(sys, "executable", str(tmp_path / "python"))
            patch.setattr(build.shutil, "which", lambda name: None if name == "ninja" else name)
        elif lacking == "nvcc":
            patch.setattr(build.Path, "is_file", lambda path: False)
        with pytest.raises(build.BuildError) as raised:
            (build.cuda_home if lacking == "nvcc" else build._requirements)()
    obstacle = consequences.Backend("cpu", False, str(raised.value))
    facts = dict.fromkeys(("packages", "CPU kernel", "CUDA kernels", "hub token"), "") | {"hub": probes.REACHABLE}
    (step,) = consequences.steps([obstacle], facts)
    wanted = {"compiler": ("g++", "gxx", "gcc-c++"), "headers": ("-dev",), "ninja": ("ninja",), "nvcc": ("nvcc",)}
    assert any(word in step.command for word in wanted[lacking])


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_token_is_present_and_never_told(place, monkeypatch, tmp_path, capsys):
    if place == "environment":
        monkeypatch.setenv("HF_TOKEN", SECRET)
    else:
        (tmp_path / "token").write_text(SECRET)
    for arguments in ([], ["--json"]):
        doctor.main(arguments)
        captured = capsys.readouterr()
        assert SECRET not in captured.out + captured.err
        assert "present, in " in captured.out
        assert "hf auth login" not in captured.out


def test_without_a_token_it_says_how_to_log_in():
    found = doctor.examine()
    assert found.machine["hub token"] == "none"
    assert "hf auth login" in commands(found)["gated models"]


class Hub:
    """What huggingface_hub asks through, with one answer to everything."""

    def __init__(self, answer: int | Exception) -> None:
        self.answer, self.asked = answer, []

    def head(self, url: str, timeout: float) -> object:
        self.asked.append((url, timeout))
        if isinstance(self.answer, Exception):
            raise self.answer
        return type("Response", (), {"status_code": self.answer})


def test_offline_the_hub_is_not_asked(monkeypatch):
    hub = Hub(200)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: hub)
    found = doctor.examine()
    assert hub.asked == []
    assert found.machine["hub"] == probes.OFFLINE
    assert commands(found)["the hub"].startswith("unset HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (200, "reachable: mirror.example answered in "),
        (404, "reachable: mirror.example answered in "),
        (503, "mirror.example is out of order (HTTP 503)"),
        (OSError(f"no route to {SECRET}"), "mirror.example cannot be reached (OSError)"),
    ],
    ids=str,
)
def test_the_hub_is_asked_shortly_and_its_password_not_told(monkeypatch, answer, told):
    from huggingface_hub import constants

    hub = Hub(answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"https://user:{SECRET}@mirror.example")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: hub)
    found = doctor.examine()
    assert hub.asked == [(constants.ENDPOINT, probes.HUB_SECONDS)]
    assert found.machine["hub"].startswith(told)
    assert SECRET not in found.to_json()
    reachable = told.startswith(probes.REACHABLE)
    assert ("a real model" in commands(found)) is not reachable
    (without,) = (notebook.without for notebook in found.notebooks if notebook.name == "02_accuracy")
    assert any("wikitext2" in lacking for lacking in without) is not reachable


def test_what_gives_no_answer_is_not_waited_for(monkeypatch):
    import threading

    never = threading.Event()
    monkeypatch.setattr(probes, "CACHE_SECONDS", 0.05)
    monkeypatch.setattr(probes, "_hub_cache", lambda: str(never.wait(30)))
    assert probes.facts()["hub cache"] == "no answer within 0.05 s"
    never.set()


def test_a_folder_of_data_is_told_and_what_is_missing_follows(tmp_path):
    for name in ("wikitext2_test.parquet", "piqa/validation.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = doctor.examine(str(tmp_path))
    assert found.machine["data_dir"] == f"{tmp_path} has wikitext2, piqa"
    (without,) = (notebook.without for notebook in found.notebooks if notebook.name == "02_accuracy")
    assert any(told.startswith("c4, ptb:") for told in without)
    assert any(told.startswith("arc_easy, arc_challenge, boolq, hellaswag, winogrande:") for told in without)
    assert "is no folder" in doctor.examine(str(tmp_path / "none")).machine["data_dir"]


@pytest.mark.parametrize("error", [OSError("broken"), RuntimeError(""), ValueError("one\ntwo")])
def test_a_probe_that_fails_is_told_in_its_line_and_the_others_go_on(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(probes, "_memory", fail)
    found = doctor.examine()
    assert found.machine["memory"].startswith(f"cannot be found out ({type(error).__name__}")
    assert found.runs and found.backends


def test_what_cannot_be_concluded_is_a_problem_and_no_exception(monkeypatch, capsys):
    def fail():
        raise RuntimeError("broken")

    monkeypatch.setattr(consequences, "backends", fail)
    assert doctor.main([]) == 1
    assert "what follows from that cannot be told (RuntimeError: broken)" in capsys.readouterr().out


def test_where_nothing_is_installed_it_says_so_and_ends_with_status_1(tmp_path):
    """A Python without any of the packages: only the standard library is imported."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, "-S", "-m", "flexq_core", "doctor"]
    done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert "not installed: torch, transformers" in done.stdout
    assert "packages are missing (torch, " in done.stdout and ": make env" in done.stdout


def test_a_python_that_is_not_supported_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    found = doctor.examine()
    assert not found.runs
    assert found.problems[0].startswith("Python 3.9 is not supported: 3.11 to 3.13 are")


def test_outputs_that_cannot_be_written_are_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path / "file" / "out"))
    (problem,) = doctor.examine().problems
    assert problem.endswith("cannot be written: set FLEXQ_OUTPUTS to a folder that can")


def test_a_full_disk_is_named(monkeypatch):
    monkeypatch.setattr(probes, "free_gib", lambda _: 0.01)
    (problem,) = doctor.examine().problems
    assert "has no room left" in problem


def test_the_home_folder_is_not_told(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home-of/someone"))
    assert probes.short("/home-of/someone/.cache/x") == "~/.cache/x"
    assert probes.short(paths.ROOT / "notebooks" / "a.ipynb") == "notebooks/a.ipynb"
    assert probes.short("/usr/bin/c++") == "/usr/bin/c++"


def test_a_command_is_typed_as_it_stands(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    script = tmp_path / "my envs" / "hf"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho logged in")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    command = commands(doctor.examine())["gated models"]
    assert command.startswith("~/'my envs/hf' auth login")
    done = subprocess.run(["sh", "-c", command], env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout == "logged in\n"
