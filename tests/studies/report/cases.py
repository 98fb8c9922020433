"""What the report's tests share: machines, a verdict found by its claim, a run."""

from flexq_core.studies.report.claims import Tolerance, judge, paper_claims
from flexq_core.studies.report.evidence import read_records
from flexq_core.workbook.records import Records
from flexq_core.workbook.run import Run

MACHINE = {"git_commit": None, "dirty": None, "versions": {}, "time": "2026-01-01T00:00:00+00:00"}
CPU = {**MACHINE, "device": "a processor", "driver": None}
GPU = {**MACHINE, "device": "a GPU", "driver": "1.0"}


def verdict(text, tolerance=None):
    found = judge(paper_claims(), read_records(), tolerance or Tolerance())
    (row,) = [row for row in found.itertuples() if text in row.claim]
    return row


def run_of(folder, **parameters):
    return Run("05_report", parameters, "cpu", folder, Records("05_report", folder))
