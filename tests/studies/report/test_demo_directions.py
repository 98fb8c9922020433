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


@pytest.mark.parametrize(
    ("w6a6", "direction", "told"),
    [(8.5, "yes", "9.000 > 8.500 > 8.300 > 8.100"), (8.301, "not told apart", "9.000 > 8.301 ≈ 8.300 > 8.100")],
)
def test_what_noise_can_do_is_no_direction(score, w6a6, direction, told):
    score("demo-llama", "w6a6", w6a6)
    found = directions(read_records()).set_index("the paper's direction")
    found = found.loc["perplexity: rtn-w6a6 > w6a6 > flexq > w6a8"]
    assert found.to_dict() == {"on": "demo-llama", "same direction": direction, "here": told}


@pytest.mark.parametrize(("int8", "direction"), [(5.1, "not told apart"), (4.0, "no")])
def test_a_time_that_is_as_long_is_no_direction(record, int8, direction):
    record("03_kernels", "64x128", "torch-int8", {"median_us": int8}, outputs=64, features=128, tokens=1)
    found = directions(read_records()).set_index("the paper's direction")
    assert found.loc["the kernel is faster than INT8", "same direction"] == direction
