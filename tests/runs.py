"""A study's run without its notebook."""

from __future__ import annotations

from pathlib import Path

from flexq_core.workbook.records import Records
from flexq_core.workbook.run import Run


def run_of(study: str, folder: Path, *, device: str = "cpu", **parameters) -> Run:
    """The run of a notebook with these parameters, that writes to `folder`."""
    return Run(study, parameters, device, folder, Records(study, folder))
