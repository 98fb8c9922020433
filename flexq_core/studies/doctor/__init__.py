"""The doctor: what this machine has, what will therefore run on it, and how to get the rest.

    python -m flexq_core doctor [--data-dir FOLDER] [--build] [--json]

At import only the standard library is needed, so that the doctor can be asked what is missing where nothing is installed
yet. It compiles nothing unless told to, reads no token, and writes the home folder as `~`: what it says can go into a bug
report as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict, dataclass

from flexq_core.studies.doctor import consequences, probes
from flexq_core.studies.doctor.consequences import Backend, Notebook, Step


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor finds.

    problems: why the workbook cannot run at all; empty where it can.  machine: what was looked at → what was found.
    """

    problems: list[str]
    machine: dict[str, str]
    backends: list[Backend]
    notebooks: list[Notebook]
    steps: list[Step]

    @property
    def runs(self) -> bool:
        return not self.problems

    def to_json(self) -> str:
        return json.dumps({"runs": self.runs, **asdict(self)}, indent=2, ensure_ascii=False)

    def to_text(self, width: int = 120) -> str:
        known = [(name, told) for name, told in self.machine.items() if told != probes.UNKNOWN]
        unknown = [name for name, told in self.machine.items() if told == probes.UNKNOWN]
        sections = {
            "This machine": known + [("the rest", f"{', '.join(unknown)}: {probes.UNKNOWN}")] * bool(unknown),
            "Backends": [
                (each.name, f"{'runs' if each.runs else 'does not run'}{f': {each.why}' if each.why else ''}")
                for each in self.backends
            ],
            "Notebooks": [
                (each.name, f"without {'; without '.join(each.without)}" if each.without else "in full")
                for each in self.notebooks
            ],
            "How to get the rest": [(each.brings, each.command) for each in self.steps],
        }
        label = max((len(name) for rows in sections.values() for name, _ in rows), default=0)
        lines = []
        for title, rows in sections.items():
            if rows:
                lines += [title, *(_row(name, told, label, width) for name, told in rows), ""]
        verdict = "The workbook runs here." if self.runs else "The workbook cannot run here yet:"
        return "\n".join([*lines, verdict, *(f"  {problem}" for problem in self.problems)])


def _row(name: str, told: str, label: int, width: int) -> str:
    """One line, or several that hang; a command is never broken within a word."""
    hanging = " " * (label + 4)
    lead = f"  {name:<{label}}  "
    return textwrap.fill(
        told, width, initial_indent=lead, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )


def examine(data_dir: str = "", *, compile_kernels: bool = False) -> Diagnosis:
    """Look at this machine. Raises nothing: each thing that cannot be found out says why.

    data_dir: a folder that should hold texts and tasks, or empty.  compile_kernels: build what can be built, and time it.
    """
    facts = probes.facts(data_dir, compile_kernels=compile_kernels)
    problems, backends, notebooks, steps = [], [], [], []
    try:
        problems += consequences.problems()
        if not problems:
            backends += consequences.backends()
            notebooks += consequences.notebooks(backends, data_dir, facts["hub"].startswith(probes.REACHABLE))
        steps += consequences.steps(backends, facts)
    except Exception as error:
        problems.append(f"what follows from that cannot be told ({probes.said(error)})")
    return Diagnosis(problems, facts, backends, notebooks, steps)


def main(arguments: list[str] | None = None) -> int:
    """Say what `examine` finds; returns 0 where the workbook can run at all, else 1."""
    parser = argparse.ArgumentParser(prog="python -m flexq_core doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="", metavar="FOLDER", help="look for texts and tasks in it as well")
    parser.add_argument(
        "--build", action="store_true", help="compile the kernels that can be, and say how long it took"
    )
    parser.add_argument("--json", action="store_true", help="for bug reports and programs")
    options = parser.parse_args(arguments)
    found = examine(options.data_dir, compile_kernels=options.build)
    print(found.to_json() if options.json else found.to_text(shutil.get_terminal_size((120, 40)).columns))
    return 0 if found.runs else 1
