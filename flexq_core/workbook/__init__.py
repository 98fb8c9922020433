"""The workbook's machinery: parameters and provenance, records, figures, execution, the report."""

from flexq_core.workbook.records import Measurement, Skipped, load_records, load_reference
from flexq_core.workbook.run import ClaimFailedError, ParameterError, Run, start

__all__ = [
    "ClaimFailedError",
    "Measurement",
    "ParameterError",
    "Run",
    "Skipped",
    "load_records",
    "load_reference",
    "start",
]
