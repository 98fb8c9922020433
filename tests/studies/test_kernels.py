"""Kernel times: parameters are refused before anything runs, what is on record is not timed again, claims read the table."""

import math

import pandas as pd
import pytest
import torch

from flexq_core.sources import paper
from flexq_core.studies import kernels
from flexq_core.studies.kernels import KernelStudy, claims, limits_us, read_shapes, speedups
from flexq_core.workbook.records import Measurement, Skipped, read_jsonl
from tests.runs import run_of

SMALL = {
    "shapes": "64x128,96x200",
    "tokens": "1,3",
    "methods": "reference,torch-fp32,torch-bf16,torch-int8",
    "repeats": 5,
}
MACHINE = {"read_bandwidth_gbps": 10.0, "int8_rate_gops": 100.0, "fp32_rate_gops": 50.0}


@pytest.fixture
def run(tmp_path):
    return run_of("03_kernels", tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No test depends on a time, so none is spent on making times good."""
    monkeypatch.setattr(kernels, "_WARM_UP_S", 0.0)
    monkeypatch.setattr(kernels, "_cold_bytes", lambda device: 2**16)
    rates = {metric: Measurement(value, "1") for metric, value in MACHINE.items()}
    monkeypatch.setattr(KernelStudy, "_rates", lambda self: rates)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "methods",
            "torch-in8",
            r"no method is called 'torch-in8' \(did you mean 'torch-int8'\?\); accepted: auto, ref",
        ),
        ("methods", "", "no method is given; accepted: auto"),
        ("shapes", "4096", "shapes holds '4096'; accepted: demo, paper, or outputs x features such as 4096x4096"),
        ("shapes", "papr", "shapes holds 'papr'; accepted: demo, paper"),
        ("shapes", "4096x0", "shapes holds '4096x0'; accepted"),
        ("shapes", "64x128,64×128", "shapes holds '64×128'; accepted"),
        ("shapes", "", "shapes holds ''; accepted"),
        ("tokens", "0", "tokens holds '0'; accepted: whole numbers of 1 or more, comma-separated"),
        ("tokens", "1,a", "tokens holds 'a'; accepted"),
        ("tokens", "-1", "tokens holds '-1'; accepted"),
        ("tokens", " , ", "tokens is empty; accepted"),
        ("activation_bits", 7, "activation_bits is 7; accepted: 6, 8"),
        ("repeats", 0, "repeats is 0; accepted: 5 or more"),
        ("threads", -1, "threads is -1; accepted: 0 to "),
        ("threads", 10**6, "threads is 1000000; accepted: 0 to "),
        ("seed", -1, "seed is -1; accepted: 0 or more"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_computed(run, name, value, text):
    with pytest.raises(ValueError, match=text):
        KernelStudy(run, **SMALL | {name: value})
    assert not run.records.path.exists()


def test_shapes_are_the_papers_a_few_or_ones_own():
    assert read_shapes("paper") == paper.kernel_shapes() and len(read_shapes("paper")) == 20
    assert set(read_shapes("demo")) <= set(read_shapes("paper"))
    assert read_shapes("64x128, 96x200,64x128") == ((64, 128), (96, 200))


def test_auto_is_the_fastest_backend_and_is_timed_once(run, monkeypatch):
    monkeypatch.setattr(kernels.ops, "resolve_backend", lambda backend, device: "cpu")
    assert KernelStudy(run, **SMALL | {"methods": "auto,cpu,torch-fp32"}).methods == ["cpu", "torch-fp32"]


def test_every_case_is_a_row_and_its_records(run):
    study = KernelStudy(run, **SMALL)
    table = study.table()
    assert len(table) == len(study.cases()) == 2 * 4 * 2
    assert (table["skipped"] == "").all()
    assert (table["p10_us"] <= table["median_us"]).all() and (table["median_us"] <= table["p90_us"]).all()
    assert table["error"].max() < kernels.FLEXQ_ERROR_BOUND
    assert (table["over_limit"] * table["limit_us"] - table["median_us"]).abs().max() < 1e-6 * table["median_us"].max()
    median = next(r for r in read_jsonl(run.records.path) if r.metric == "median_us" and r.method == "reference")
    assert median.unit == "us" and median.model == "64x128"
    assert {"device", "threads", "activation_bits", "tokens", "repeats"} <= set(median.parameters)


def test_a_second_study_times_nothing_and_finds_the_same(run, monkeypatch):
    first = KernelStudy(run, **SMALL).table()
    for name in ("_time", "_rates"):
        monkeypatch.setattr(KernelStudy, name, lambda *_: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(KernelStudy(run, **SMALL).table(), first)


def test_other_activation_bits_time_flexq_anew_and_torch_not(run, monkeypatch):
    KernelStudy(run, **SMALL).table()
    timed = []
    time = KernelStudy._time
    monkeypatch.setattr(KernelStudy, "_time", lambda self, *case: timed.append(case[1]) or time(self, *case))
    KernelStudy(run, **SMALL | {"activation_bits": 8}).table()
    assert set(timed) == {"reference"} and len(timed) == 4


def test_another_machine_or_number_of_threads_times_anew(run, monkeypatch):
    KernelStudy(run, **SMALL, threads=1).table()
    count = len(read_jsonl(run.records.path))
    monkeypatch.setattr(kernels, "provenance", lambda device: {"device": "another"})
    KernelStudy(run, **SMALL, threads=1).table()
    assert len(read_jsonl(run.records.path)) == 2 * count


def test_threads_and_engine_are_afterwards_what_they_were(run):
    before = torch.get_num_threads(), torch.backends.quantized.engine
    KernelStudy(run, **SMALL, threads=1).table()
    assert (torch.get_num_threads(), torch.backends.quantized.engine) == before


def test_a_wrong_product_is_not_timed(run, monkeypatch):
    reference = kernels.ops._BACKENDS["reference"]
    monkeypatch.setitem(kernels.ops._BACKENDS, "reference", lambda *operands: 1.1 * reference(*operands))
    monkeypatch.setattr(kernels, "_times_us", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="reference is wrong at 64x128, 1 tokens: relative error 0.1"):
        KernelStudy(run, **SMALL).table()


def test_what_the_machine_lacks_is_skipped_with_its_reason(run, monkeypatch):
    monkeypatch.setattr(kernels, "_INT8_ENGINES", ())
    table = KernelStudy(run, **SMALL | {"methods": "reference,torch-int8"}).table()
    skipped = table[table["method"] == "torch-int8"]
    assert (skipped["skipped"] == "this torch has no engine for dynamic INT8").all() and skipped[
        "median_us"
    ].isna().all()
    assert {r.status for r in read_jsonl(run.records.path) if r.method == "torch-int8"} == {"skipped"}
    assert claims(table)[1][1:] == (None, "torch-int8 was not timed with 1 token here")


def test_a_backend_that_cannot_run_is_skipped(monkeypatch):
    def refuse(backend, device):
        raise ValueError("backend 'cpu' cannot run here: no compiler")

    monkeypatch.setattr(kernels.ops, "resolve_backend", refuse)
    with pytest.raises(Skipped, match="no compiler"):
        kernels._ColdLayers((64, 128), "cpu", 6, "cpu", 0)


def test_each_call_takes_the_copy_that_was_used_longest_ago():
    order = []
    layers = [lambda x, index=index: order.append(index) for index in range(4)]
    times, _ = kernels._times_us(layers, torch.zeros(1), 6)
    assert len(times) == 6 and order == [1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_slow_method_is_called_a_few_times_only(monkeypatch):
    monkeypatch.setattr(kernels, "_BUDGET_S", 0.0)
    assert len(kernels._times_us([lambda x: x], torch.zeros(1), 100)[0]) == 5


def test_copies_differ_and_exceed_what_caches_hold():
    layers = kernels._ColdLayers((64, 128), "torch-fp32", 6, "cpu", 0)
    copies, _ = layers.for_input(torch.zeros(1, 128))
    assert (len(copies) - 1) * 64 * 128 * 4 >= 2**16
    assert len({layer.weight.data_ptr() for layer in copies}) == len(copies)


def test_the_limit_is_the_larger_of_reading_and_computing():
    one, many = (limits_us((1024, 2048), tokens, MACHINE) for tokens in (1, 1000))
    size = 1024 * 2048 * 6.125 / 8 + 4 * (1024 + 2048)
    assert math.isclose(one["limit_us"], size / 10e9 * 1e6) and one["limit_us"] == one["byte_limit_us"]
    assert math.isclose(many["limit_us"], 2 * 1000 * 1024 * 2048 / 100e9 * 1e6)


def times(**methods) -> pd.DataFrame:
    """A table of two shapes and 1 token: method → its two medians in µs."""
    rows = [
        {"method": name.replace("_", "-"), "outputs": n, "features": 4096, "tokens": 1, "median_us": median}
        for name, medians in methods.items()
        for n, median in zip((4096, 11008), medians, strict=True)
    ]
    facts = {"error": 1e-6, "preemptions_per_call": 0.0, "limit_us": 50.0}
    return pd.DataFrame(rows).assign(**facts, p10_us=lambda t: t["median_us"], p90_us=lambda t: t["median_us"])


@pytest.mark.parametrize(
    ("cpu", "holds", "detail"),
    [
        ((80, 100), True, "0.89 of"),
        ((100, 120), True, "1.10 of"),
        ((200, 100), False, "1.41 of"),
        ((50, 200), True, "1.00"),
    ],
)
def test_the_speed_claim_is_on_the_geometric_mean(cpu, holds, detail):
    claim = claims(times(cpu=cpu, torch_int8=(100, 100)))[1]
    assert claim[1] is holds and claim[2].startswith(detail)


def test_a_busy_machine_cannot_tell():
    table = times(cpu=(200, 200), torch_int8=(100, 100))
    table.loc[0, "preemptions_per_call"] = 2.0
    assert claims(table)[1][1:] == (
        None,
        "2.00 of torch-int8's time over 2 shapes, but other programs took the processors 2.0 times a call: "
        "time anew on a quiet machine",
    )


def test_without_the_kernel_speed_is_told_and_not_claimed():
    found = claims(times(reference=(3000, 3000), torch_int8=(100, 100)))[1]
    assert found[1:] == (None, "the CPU kernel was not timed; reference takes 30.00 of torch-int8's time")


def test_an_error_beyond_its_bound_fails_the_claim():
    table = times(cpu=(80, 100), torch_int8=(100, 100))
    assert claims(table)[0][1] is True
    table.loc[0, "error"] = 0.07
    assert claims(table)[0][1:] == (False, "nearest to its bound: cpu, 7.00%")
    assert [holds for _, holds, _ in claims(table.assign(median_us=math.nan))] == [None, None]


def test_speed_ups_are_of_the_fastest_backend_over_the_first_baseline_there_is():
    table = times(cpu=(50, 200), reference=(3000, 100), torch_fp32=(400, 400), torch_int8=(100, 100))
    found = speedups(table)
    assert found["speedup"].tolist() == [2.0, 1.0] and found["method"].tolist() == ["cpu", "reference"]
    assert set(speedups(table[table["method"] != "torch-int8"])["baseline"]) == {"torch-fp32"}
    assert speedups(times(cpu=(50, 200))).empty


@pytest.mark.parametrize(
    "table", [times(cpu=(50, 200), torch_int8=(100, 100)), times(cpu=(50, 200)), times(torch_int8=(math.nan, math.nan))]
)
def test_figures_have_units_and_the_papers_marks(table):
    panels = kernels.plot_times(table).axes
    assert [axis.get_title() for axis in panels] == ["4096 × 4096", "11008 × 4096"]
    assert panels[0].get_xlabel() == "tokens" and panels[0].get_ylabel() == "time (µs)"
    figure = kernels.plot_speedups(table)
    assert "speed-up over" in figure.axes[0].get_xlabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "1 token, the paper's GPU" in labels
    assert ("1 token, here" in labels) == (len(speedups(table)) > 0)


def test_the_command_line_times_and_keeps_no_record(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--tokens", "1", "3", "--shapes", "64x128", "--methods", "reference", "torch-fp32", "--repeats", "5"]
    assert kernels.main(arguments) == 0
    assert capsys.readouterr().out.count("torch-fp32") == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        kernels.main(["--shapes", "64"])
    assert "shapes holds '64'; accepted" in capsys.readouterr().err
