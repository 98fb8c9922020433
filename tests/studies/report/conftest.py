"""Records as the studies write them, in a folder of the test's own."""

import pytest

from flexq_core.studies.report.evidence import paper_kernel_ratios
from flexq_core.workbook import paths
from flexq_core.workbook.records import Measurement, Records
from tests.studies.report.cases import CPU, GPU


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An outputs folder of this workbook's own, and no references beside it."""
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr("flexq_core.workbook.records.source_digest", lambda study, _card: study)
    return tmp_path / "out"


@pytest.fixture
def record(folder, monkeypatch):
    def write(study, model, method, measured, machine=CPU, **parameters):
        monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda _: machine)
        measurements = {m: v if isinstance(v, Measurement) else Measurement(v, "1") for m, v in measured.items()}
        Records(study, folder).replace(model=model, method=method, parameters=parameters, seed=0, measured=measurements)

    return write


@pytest.fixture
def score(record):
    def write(model, method, perplexity, backend="simulate", dataset="wikitext2", windows=166, **more):
        inputs = {"backend": backend, "dataset": dataset, "windows": windows, "window_length": 2048, "outliers": 0.0}
        record("02_accuracy", model, method, {"perplexity": perplexity}, **(inputs | more))

    return write


@pytest.fixture
def time_kernels(record):
    def write(speedup=None, cases=None, rival="cublas-int8", machine=GPU):
        for row in paper_kernel_ratios().itertuples():
            if cases is None or (row.outputs, row.features, row.tokens) in cases:
                shape = {"outputs": row.outputs, "features": row.features, "tokens": row.tokens, "threads": 2}
                shape["device"] = machine["device"]
                model, time = f"{row.outputs}x{row.features}", "gemm_us"
                record("03_kernels", model, rival, {time: 100.0 * (speedup or row.flexq)}, machine, **shape)
                shape["activation_bits"] = row.activation_bits
                record("03_kernels", model, "flexq", {time: 100.0}, machine, **shape)

    return write
