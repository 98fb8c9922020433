"""What the report's tests share: machines and a verdict found by its claim."""

from flexq_core.studies.report.claims import Tolerance, judge, paper_claims
from flexq_core.studies.report.evidence import read_records

MACHINE = {"git_commit": None, "dirty": None, "versions": {}, "time": "2026-01-01T00:00:00+00:00"}
CPU = {**MACHINE, "device": "a processor", "driver": None}
GPU = {**MACHINE, "device": "a GPU", "driver": "1.0"}


def verdict(text, tolerance=None):
    found = judge(paper_claims(), read_records(), tolerance or Tolerance())
    (row,) = [row for row in found.itertuples() if text in row.claim]
    return row
