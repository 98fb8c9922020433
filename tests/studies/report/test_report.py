"""The report as a study: its parameters, what it reads, what it keeps, what it claims of itself."""

import pytest

from flexq_core.studies.report import ReportStudy
from flexq_core.studies.report.claims import NOT_REPRODUCED, REPRODUCED, Tolerance, summary
from flexq_core.studies.report.evidence import read_records
from flexq_core.studies.report.own_numbers import FINDINGS, READINGS, findings_table, readings_table
from flexq_core.workbook import paths
from flexq_core.workbook.records import read_jsonl
from flexq_core.workbook.run import declared_parameters
from tests.runs import run_of
from tests.studies.report.cases import verdict


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {"records": "nowhere"},
            "records is 'nowhere', which holds no records/.*accepted: empty, for this workbook",
        ),
        ({"records": "notebooks"}, "records is 'notebooks', which holds no records/"),
        ({"tolerance": -0.1}, "tolerance is -0.1; accepted: 0 or more, less than 1"),
        ({"tolerance": 1.0}, "tolerance is 1.0; accepted"),
        ({"tolerance": float("nan")}, "tolerance is nan; accepted"),
        ({"perplexity_tolerance": -1.0}, "perplexity_tolerance is -1.0; accepted"),
    ],
)
def test_wrong_parameters_are_refused(folder, parameters, text):
    with pytest.raises(ValueError, match=text):
        ReportStudy(run_of("05_report", folder), **parameters)


def test_its_parameters_are_the_notebooks(folder):
    declared = declared_parameters(paths.NOTEBOOKS / "05_report.ipynb")
    ReportStudy(run_of("05_report", folder), **{name: parameter.default for name, parameter in declared.items()})


def test_a_folder_that_is_named_is_read_alone(folder, score, tmp_path):
    score("llama-2-7b", "fp16", 5.47, backend="torch")
    other = tmp_path / "other"
    (other / "records").mkdir(parents=True)
    (other / "records" / "02_accuracy.jsonl").write_text("")
    assert read_records(str(other)).empty
    assert len(read_records()) == 1


def test_references_are_read_too_and_a_copy_counts_once(folder, score, tmp_path):
    score("llama-2-7b", "fp16", 5.47, backend="torch")
    copy = tmp_path / "reference" / "h200" / "records"
    copy.mkdir(parents=True)
    (copy / "02_accuracy.jsonl").write_bytes((folder / "records" / "02_accuracy.jsonl").read_bytes())
    assert len(read_records()) == 1
    (folder / "records" / "02_accuracy.jsonl").unlink()
    assert len(read_records()) == 1


def test_tolerances_decide(folder, score):
    score("llama-2-7b", "fp16", 5.47, backend="torch")
    score("llama-2-7b", "flexq", 5.53)
    text = "llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2"
    assert verdict(text).verdict == REPRODUCED
    assert verdict(text, Tolerance(perplexity=0.0)).verdict == NOT_REPRODUCED


def test_its_own_claims_hold_and_everything_is_kept_for_the_report(folder, score):
    score("llama-2-7b", "fp16", 5.47, backend="torch")
    score("llama-2-7b", "flexq", 5.50)
    study = ReportStudy(run_of("05_report", folder))
    assert all(holds is True for _, holds, _ in study.claims())
    study.keep()
    kept = read_jsonl(folder / "records" / "05_report.jsonl")
    kinds = [record.metric.split("/")[0] for record in kept]
    assert kinds.count("verdict") == len(study.verdicts)
    assert kinds.count("finding") == len(FINDINGS) and kinds.count("reading") == len(READINGS)
    reproduced = [record for record in kept if record.reason.startswith("reproduced: ")]
    assert len(reproduced) == 1 and reproduced[0].value == 1
    assert read_records()["study"].unique().tolist() == ["02_accuracy"]  # never its own


def test_a_verdict_without_a_record_fails_its_claim(folder):
    study = ReportStudy(run_of("05_report", folder))
    study.verdicts.loc[0, "verdict"] = REPRODUCED
    failed = [claim for claim, holds, _ in study.claims() if not holds]
    assert failed == ["no claim counts as reproduced without a record"]


def test_tables_can_be_read(folder):
    study = ReportStudy(run_of("05_report", folder))
    assert summary(study.verdicts).to_numpy().sum() == len(study.verdicts)
    assert len(findings_table(study.findings)) == len(FINDINGS)
    assert len(readings_table()) == len(READINGS)
