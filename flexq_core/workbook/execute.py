"""Running notebooks headless: papermill with this very Python, one line of progress a notebook."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexq_core.workbook import paths
from flexq_core.workbook.run import ParameterError, check_parameters

KERNEL = "flexq"
PARTIAL = "-partial.ipynb"
"""What the name of an executed copy ends with until all its cells have run."""
_DEMO_MODELS = ("demo-llama", "demo-opt")
_PLAIN = {"windows": 64}
_OUTLIERS = {"outliers": 32.0, "windows": 32, "calibration_windows": 4}
"""The demo models have no outliers of their own, large models do; what they do to plans shows on less text."""
DEMO: tuple[tuple[str, dict[str, Any]], ...] = (
    ("00_quickstart", {"model": "demo-llama"}),
    *(("01_sensitivity", {"model": model, **more}) for more in (_PLAIN, _OUTLIERS) for model in _DEMO_MODELS),
    *(("02_accuracy", {"model": model}) for model in _DEMO_MODELS),
    ("03_kernels", {"shapes": "4096x4096", "tokens": "1,8"}),
    ("04_e2e", {"model": "demo-llama"}),
    ("05_report", {}),
)
"""What `make demo` runs, in order."""

_SECOND_TEXT = "c4"


def lacking(model: str, data_dir: str) -> list[str]:
    """Of the texts and tasks that `reproduction` asks for, those of which a folder has no file; of the hub none.

    Raises ParameterError where it lacks the text that the model is scored on first.
    """
    from flexq_core.sources.data import default_dataset
    from flexq_core.sources.demo import DEMO_MODELS
    from flexq_core.sources.held import held_by
    from flexq_core.sources.tasks import PAPER_TASKS

    if not data_dir:
        return []
    held, is_demo = held_by(data_dir), model in DEMO_MODELS
    first = default_dataset(is_demo)
    if not is_demo and first not in held:
        raise ParameterError(
            f"data_dir is {data_dir!r}, which has no file of {first}: {', '.join(held) or 'nothing'} is there"
        )
    return [name for name in (_SECOND_TEXT, *PAPER_TASKS) if name not in held]


def reproduction(model: str, data_dir: str = "", without: Collection[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """What `make reproduce` runs for any model, in order; 02 scores the plan that 01 writes.

    without: tasks that are left out, and the second text.
    """
    from flexq_core.sources.tasks import PAPER_TASKS

    here = {"model": model, "data_dir": data_dir}
    plan = paths.plan_file({"model": model})
    asked = ",".join(task for task in PAPER_TASKS if task not in without)
    second = ("02_accuracy", {**here, "tasks": "", "dataset": _SECOND_TEXT, "scales": "absmax"})
    return [
        ("00_quickstart", {"model": model}),
        ("01_sensitivity", here),
        ("02_accuracy", {**here, "tasks": asked, "plan": str(plan)}),
        *([] if _SECOND_TEXT in without else [second]),
        ("03_kernels", {"shapes": "paper", "tokens": "1,4,8"}),
        ("03_kernels", {"shapes": "paper", "tokens": "1,4,8", "activation_bits": 8}),
        ("04_e2e", {"model": model, "output_tokens": "128,256,512,1024"}),
        ("05_report", {}),
    ]


class NotebookError(RuntimeError):
    """A notebook that failed; the message is its last error and where the partial copy lies."""


def execute(study: str, parameters: Mapping[str, Any]) -> Path:
    """Run one notebook with these parameters; returns the executed copy under outputs/notebooks/.

    Raises ParameterError before anything runs, NotebookError for a notebook that fails (its copy is kept up to there).
    """
    notebook = paths.NOTEBOOKS / f"{study}.ipynb"
    check_parameters(study, parameters)
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    copy = paths.outputs() / "notebooks" / f"{study}-{paths.run_label(parameters)}.ipynb"
    partial = copy.with_name(copy.stem + PARTIAL)  # until it has done well: the copy of a run before stays
    copy.parent.mkdir(parents=True, exist_ok=True)
    with _this_python_as_kernel():
        try:
            papermill.execute_notebook(
                str(notebook),
                str(partial),
                dict(parameters),
                kernel_name=KERNEL,
                cwd=paths.NOTEBOOKS,
                progress_bar={"desc": f"  {study}", "leave": False} if _is_watched() else False,
                shutdown_kernel="immediate",  # else it is interrupted first, which now and then prints an error
            )
        except PapermillExecutionError as error:
            raise NotebookError(f"{study} failed: {error.ename}: {error.evalue}\npartial copy: {partial}") from None
        except DeadKernelError:
            raise NotebookError(
                f"{study} failed: its Python process died, most likely for want of memory; run again, finished work is not "
                f"repeated\npartial copy: {partial}"
            ) from None
    partial.replace(copy)
    return copy


def _is_watched() -> bool:
    return sys.stderr.isatty()


def execute_all(plan: Sequence[tuple[str, Mapping[str, Any]]], *, first_decides: bool = False) -> bool:
    """Run notebooks one after another, say how each went, and return whether all of them did well.

    first_decides: where the first one fails, the others are left out, and that is said.
    """
    well = True
    for place, (study, parameters) in enumerate(plan):
        title = " ".join([study, *(f"{name}={value}" for name, value in parameters.items() if value != "")])
        title = f"  {title:<84} "
        if not _is_watched():  # where its bar stands meanwhile
            print(title, end="", flush=True)
            title = ""
        start = time.perf_counter()
        try:
            execute(study, parameters)
            print(f"{title}done in {time.perf_counter() - start:.0f} s", flush=True)
        except NotebookError as error:
            well = False
            print(f"{title}FAILED after {time.perf_counter() - start:.0f} s\n{error}", flush=True)
            if first_decides and place == 0:
                print("  left out: " + ", ".join(dict.fromkeys(later for later, _ in plan[1:])), flush=True)
                break
    return well


_ENVIRONMENT = {
    "OMP_PROC_BIND": "true",
    "OMP_PLACES": "cores",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "PYTHONFAULTHANDLER": "1",
}
"""OMP_*: a core for each of torch's threads. Left to itself, a small virtual machine may keep two that spin at each other's
barriers on one core, where every parallel step waits for a time slice: several times slower, for minutes.
MALLOC_*: the C library gives large tensors back to the system at once and has every page of the next one made anew, a fifth of
the time of scoring a text; told so, it keeps up to 1 GiB.
PYTHONFAULTHANDLER: a process that crashes says where, on the error output."""


@contextmanager
def _this_python_as_kernel():
    """A kernel specification for the running interpreter, for this process only: the user's own are left alone."""
    with tempfile.TemporaryDirectory(prefix="flexq-kernel-") as folder:
        spec = Path(folder) / "kernels" / KERNEL
        spec.mkdir(parents=True)
        # Errors only: it warns that its local socket is not encrypted, and means nothing to a reader.
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "FlexQ", "language": "python"}))
        before = {
            name: os.environ.get(name) for name in ("JUPYTER_PATH", "PYTHONPATH", "FLEXQ_HEADLESS", *_ENVIRONMENT)
        }
        for name, entry in (("JUPYTER_PATH", folder), ("PYTHONPATH", str(paths.ROOT))):
            os.environ[name] = os.pathsep.join(filter(None, (entry, before[name])))
        os.environ["FLEXQ_HEADLESS"] = "1"
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
