"""Demo models prove nothing of the paper; what they show is told apart."""

import pytest

from flexq_core.studies.report.claims import NOT_MEASURED, Tolerance, judge, paper_claims
from flexq_core.studies.report.demo_directions import directions
from flexq_core.studies.report.evidence import read_records


@pytest.fixture(autouse=True)
def _demo(score, record):
    perplexities = {"rtn-w6a6": 9.0, "smoothquant-w6a6": 8.8, "w6a6": 8.5, "flexq": 8.3, "w6a8": 8.1}
    for method, perplexity in perplexities.items():
        score("demo-llama", method, perplexity)
    score("demo-llama", "fp32", 8.0, backend="torch")
    for kind, kl in (("up_proj", 0.2), ("down_proj", 0.1)):
        record("01_sensitivity", "demo-llama", f"rounded: every {kind}", {"kl_nats": kl}, outliers=0.0)
    shape = {"outputs": 64, "features": 128, "tokens": 1}
    record("03_kernels", "64x128", "cpu", {"median_us": 5.0}, activation_bits=6, **shape)
    record("03_kernels", "64x128", "simulate", {"median_us": 500.0}, activation_bits=6, **shape)
    record("03_kernels", "64x128", "torch-int8", {"median_us": 6.0}, **shape)


def test_they_bear_out_no_claim_of_the_paper():
    found = judge(paper_claims(), read_records(), Tolerance())
    assert set(found["verdict"]) == {NOT_MEASURED} and (found["evidence"] == 0).all()


def test_their_directions_are_told_apart():
    found = directions(read_records()).set_index("the paper's direction")
    assert found["same direction"].to_dict() == {
        "perplexity: rtn-w6a6 > w6a6 > flexq > w6a8": "yes",
        "perplexity: smoothquant-w6a6 > flexq": "yes",
        "down_proj is the most sensitive kind of layer": "no",
        "the kernel is faster than INT8": "yes",
    }
    assert found.loc["the kernel is faster than INT8", "here"] == "in 1 of 1 cases; 1.20× to 1.20×"
