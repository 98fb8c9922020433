"""The workbook's command line: run notebooks headless and build the report."""

from __future__ import annotations

import argparse
import ast
import errno
import re
import sys
from pathlib import Path
from typing import Any

from flexq_core.workbook import paths
from flexq_core.workbook.arguments import given
from flexq_core.workbook.execute import DEMO, NotebookError, execute, execute_all, lacking, reproduction
from flexq_core.workbook.records import (
    RecordError,
    current,
    load_records,
    load_reference,
    read_jsonl,
    write_atomically,
    write_jsonl,
)
from flexq_core.workbook.report import accuracy_table, build_report, claims_told, readable, readme_with_results
from flexq_core.workbook.run import ParameterError

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


def main(arguments: list[str] | None = None) -> int:
    """Parse and carry out one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ParameterError, NotebookError, RecordError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        print(
            f"cannot write {error.filename}: {error.strerror}; set FLEXQ_OUTPUTS to a folder that can", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is on record", file=sys.stderr)
        return 130  # as a shell has it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flexq_core.workbook", description=__doc__)
    commands = parser.add_subparsers(required=True)
    demo = commands.add_parser("demo", help="run the notebooks on the demo models and build the report")
    demo.set_defaults(command=_demo)
    whole = commands.add_parser(
        "reproduce", help="run every notebook on one model; what is on record is not computed again"
    )
    whole.add_argument(
        "model", type=given, help="a demo model, a paper model such as llama-2-7b, a hub id or a local folder"
    )
    whole.add_argument("--data-dir", default="", help="a folder that holds the texts and tasks (default: the hub)")
    whole.set_defaults(command=_reproduce)
    about = "Run one notebook. Its parameters stand in its second cell, each with what it means."
    run = commands.add_parser("run", help="run one notebook", description=about)
    run.add_argument("notebook", choices=sorted(path.stem for path in paths.NOTEBOOKS.glob("*.ipynb")))
    run.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter; once for each"
    )
    run.set_defaults(command=_run)
    commands.add_parser("report", help="build outputs/report.html from what has run").set_defaults(command=_report)
    keep = commands.add_parser(
        "reference", help="keep this machine's records in outputs/reference/<machine>/, but those of local folders"
    )
    keep.add_argument("machine", help="a name for it: cpu, h200, ...")
    keep.set_defaults(command=_reference)
    readme = commands.add_parser("readme", help="make the README's results tables anew from outputs/reference/")
    readme.set_defaults(command=_readme)
    return parser


def _demo(_: argparse.Namespace) -> int:
    print("Notebooks on the demo models; what is on record is not computed again.")
    return _finish(execute_all(DEMO))


def _reproduce(options: argparse.Namespace) -> int:
    places = _from_here({"model": options.model, "data_dir": options.data_dir})
    _require_model(places["model"])
    print(f"Notebooks on {options.model}; what is on record is not computed again.")
    without = lacking(**places)
    if without:
        print(f"Left out, since {options.data_dir} has nothing of it: {', '.join(without)}.")
    return _finish(execute_all(reproduction(**places, without=without), first_decides=True))


def _finish(well: bool) -> int:
    """Build the report, print the headline table, or last that something failed, and return the exit status."""
    _report(None)
    if not well:
        print("\nnot all notebooks did well: FAILED stands above where one did not, and why", file=sys.stderr)
        return 1
    records = load_records()
    print("\n" + readable(accuracy_table(records)).to_string(index=False) + "\n\n" + claims_told(records))
    return 0


def _run(options: argparse.Namespace) -> int:
    copy = execute(options.notebook, _from_here({name: _value(value) for name, value in options.p}))
    print(copy)
    return 0


def _report(_: argparse.Namespace | None) -> int:
    page = build_report()
    print(f"\nreport     {page}\nnotebooks  {page.parent / 'notebooks'}\nrecords    {page.parent / 'records'}")
    return 0


_DETAIL = re.compile(r"(loss_nats|relative_error_a\d|sqnr_a\d_db|predicted_kl_a\d_nats)/")
"""Measures of single layers and of parts of a text: thousands of lines from which the others were made."""


def _reference(options: argparse.Namespace) -> int:
    folder, copies = paths.outputs() / "records", 0
    for file in sorted(folder.glob("*.jsonl")):
        kept = [
            record
            for record in current(read_jsonl(file))
            if not Path(record.model).is_absolute() and not _DETAIL.match(record.metric)
        ]
        if kept:
            copy = paths.REFERENCE / paths.model_label(options.machine) / "records" / file.name
            write_jsonl(copy, kept)
            print(f"{copy}: {len(kept)} records")
            copies += 1
    if not copies:
        raise RecordError(f"{folder} has no records of the present source to keep; run the notebooks first: make demo")
    return 0


def _readme(_: argparse.Namespace) -> int:
    readme = paths.ROOT / "README.md"
    write_atomically(readme, readme_with_results(readme.read_text(encoding="utf-8"), load_reference()))
    return 0


_PLACES = {"model": Path.is_dir, "data_dir": Path.is_dir, "records": Path.is_dir, "plan": Path.is_file}
"""Parameters that may name a folder or a file, and whether it is there."""


def _from_here(parameters: dict[str, Any]) -> dict[str, Any]:
    """What lies where the command was given, by its whole path: notebooks run in their own folder.

    A model is a folder where it is written as a path (./mine): a bare name is a model's.
    Raises ParameterError for what is not there.
    """
    found = dict(parameters)
    for name, is_there in _PLACES.items():
        value = found.get(name)
        if not isinstance(value, str) or not value or (name == "model" and "/" not in value):
            continue
        place = Path(value).expanduser()
        if is_there(place):
            found[name] = str(place.resolve())
        elif name in ("data_dir", "records"):
            raise ParameterError(f"{name} is {value!r}; accepted: a folder that exists")
        elif name == "plan" and place.suffix == ".json":
            raise ParameterError(f"plan is {value!r}; accepted: a file that exists, or a plan's name")
        elif name == "model":
            _require_model(value)
    return found


def _require_model(name: str) -> None:
    """Raise ParameterError for what no model is called; nothing is loaded."""
    from flexq_core.sources.models import ModelError, locate_model

    try:
        locate_model(name)
    except ModelError as error:
        raise ParameterError(str(error)) from error


def _value(text: str) -> Any:
    """A parameter's value as papermill's own -p reads it: a literal where it is one, else text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)
    return value if isinstance(value, int | float | bool) else text


if __name__ == "__main__":
    sys.exit(main())
