"""Kernel times: parameters are refused before anything runs, what is on record is not timed again, claims read the table."""

import itertools
import json
import math
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import pytest
import torch

from flexq_core.runtime import cpu
from flexq_core.runtime.activations import rms_norm
from flexq_core.sources import paper
from flexq_core.studies import kernels, kernels_claims, kernels_combinations, kernels_compared, kernels_gpu, timing
from flexq_core.studies.kernels import KernelStudy, claims, limits_us, read_shapes
from flexq_core.studies.kernels_compared import speedups
from flexq_core.workbook import figures
from flexq_core.workbook.gpu_tables import kernel_table, kernel_times
from flexq_core.workbook.records import Measurement, RecordError, Records, Skipped, load_records, read_jsonl
from flexq_core.workbook.run import Run
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
    monkeypatch.setattr(timing, "_WARM_UP_S", 0.0)
    monkeypatch.setattr(kernels, "cold_bytes", lambda: 2**16)
    rates = {metric: Measurement(value, "1") for metric, value in MACHINE.items()}
    monkeypatch.setattr(timing, "_measured_limits", lambda device: rates)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "methods",
            "torch-in8",
            r"no method is called 'torch-in8' \(did you mean 'torch-int8'\?\); accepted: default, auto, ref",
        ),
        ("methods", "", "no method is given; accepted: default, auto"),
        (
            "shapes",
            "4096",
            "shapes holds '4096'; accepted: demo, paper, paper-a8, or outputs x features such as 4096x4096",
        ),
        ("shapes", "papr", "shapes holds 'papr'; accepted: demo, paper"),
        ("shapes", "4096x0", "shapes holds '4096x0'; accepted"),
        ("shapes", "64x128,64×128", "shapes holds '64×128'; accepted"),
        ("shapes", "", "shapes holds ''; accepted"),
        ("tokens", "0", "tokens holds '0'; accepted: whole numbers of 1 or more, comma-separated"),
        ("tokens", "1,a", "tokens holds 'a'; accepted"),
        ("tokens", "-1", "tokens holds '-1'; accepted"),
        ("tokens", " , ", "tokens is empty; accepted"),
        ("activation_bits", 9, "activation_bits is 9; accepted: 6, 7, 8"),
        ("activation_bits", 5, "activation_bits is 5; accepted: 6, 7, 8"),
        ("combinations", "w4a9", "combinations holds 'w4a9'; accepted: usual, none, or w and a with 2 to 8 bits each"),
        ("combinations", "w6a6,6x6", "combinations holds '6x6'; accepted"),
        ("combinations", "", "combinations is empty; accepted"),
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
    assert set(read_shapes("demo")) | set(read_shapes("paper-a8")) <= set(read_shapes("paper"))
    assert len(read_shapes("paper-a8")) == 5 and (8192, 28672) in read_shapes("paper-a8")
    assert read_shapes("64x128, 96x200,64x128") == ((64, 128), (96, 200))
    assert read_shapes("64x128,demo") == ((64, 128), *read_shapes("demo"))
    assert read_shapes("paper,paper-a8") == read_shapes("paper")


def test_the_usual_methods_can_stand_beside_others(run):
    usual = KernelStudy(run, **SMALL | {"methods": "default"}).methods
    study = KernelStudy(run, **SMALL | {"methods": "simulate,default"})
    assert study.methods == list(dict.fromkeys(["simulate", *usual]))


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
    for place, name in ((KernelStudy, "_time"), (timing, "_measured_limits")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("computed again"))
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
    for module in (kernels, timing):
        monkeypatch.setattr(module, "provenance", lambda device: {"device": "another"})
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
    monkeypatch.setattr(timing, "_BUDGET_S", 0.0)
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
    ("median", "holds", "detail"),
    [
        ((80, 100), True, "0.89 of"),
        ((100, 120), True, "1.10 of"),
        ((200, 100), False, "1.41 of"),
        ((50, 200), True, "1.00"),
    ],
)
@pytest.mark.parametrize("isa", ["amx", "avx512"])
def test_the_speed_claim_is_on_the_geometric_mean(isa, median, holds, detail, monkeypatch):
    monkeypatch.setattr(cpu, "available_isas", lambda: [isa, "avx2", "portable"])
    claim = claims(times(cpu=median, torch_int8=(100, 100)))[1]
    assert claim[1] is holds and claim[2].startswith(detail)


@pytest.mark.parametrize("median", [(80, 80), (150, 150)])
def test_without_products_of_bytes_speed_is_told_and_not_claimed(median, monkeypatch):
    monkeypatch.setattr(cpu, "available_isas", lambda: ["avx2", "portable"])
    told = f"{median[0] / 100:.2f} of torch-int8's time over 2 shapes; the fastest path of this processor is avx2"
    assert claims(times(cpu=median, torch_int8=(100, 100)))[1][1:] == (None, told)


def test_a_busy_machine_cannot_tell(monkeypatch):
    monkeypatch.setattr(cpu, "available_isas", lambda: ["avx512"])
    table = times(cpu=(200, 200), torch_int8=(100, 100))
    table.loc[0, "preemptions_per_call"] = 2.0
    assert claims(table)[1][1:] == (
        None,
        "2.00 of torch-int8's time over 2 shapes, but other programs took the processors 2.0 times a call: "
        "time anew on a quiet machine",
    )


def test_of_layers_of_ones_own_that_are_small_speed_is_told_and_not_claimed(monkeypatch):
    monkeypatch.setattr(cpu, "available_isas", lambda: ["avx512"])
    table = times(cpu=(200, 200), torch_int8=(100, 100))
    table.loc[table["outputs"] == 4096, "outputs"] = 256
    told = "2.00 of torch-int8's time over 2 shapes; of 1,048,576 weights a call takes longer than they do"
    assert claims(table)[1][1:] == (None, told)


def test_without_the_kernel_speed_is_told_and_not_claimed():
    found = claims(times(reference=(3000, 3000), torch_int8=(100, 100)))[1]
    assert found[1:] == (None, "the CPU kernel was not timed; reference takes 30.00 of torch-int8's time")


def test_an_error_beyond_its_bound_fails_the_claim():
    table = times(cpu=(80, 100), torch_int8=(100, 100))
    assert claims(table)[0][1] is True
    one_lacks = table.assign(median_us=table["median_us"].where(table.index != 1))
    assert claims(one_lacks)[1][1:] == (None, "0.80 of torch-int8's time over 1 shape of the 2 timed")
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
    panels = kernels_compared.plot_times(table).axes
    assert [axis.get_title() for axis in panels] == ["4096 × 4096", "11008 × 4096"]
    assert panels[0].get_xlabel() == "tokens" and panels[0].get_ylabel() == "time (µs)"
    figure = kernels_compared.plot_speedups(table)
    assert "speed-up over" in figure.axes[0].get_xlabel()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "1 token, the paper's GPU" in labels
    assert ("1 token, measured" in labels) == (len(speedups(table)) > 0)
    assert "fastest INT8 product found" in kernels_compared.limit_note(table)


def test_the_command_line_times_and_keeps_no_record(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--tokens", "1", "3", "--shapes", "64x128", "--methods", "reference", "torch-fp32", "--repeats", "5"]
    assert kernels.main(arguments) == 0
    assert capsys.readouterr().out.count("torch-fp32") == 2
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        kernels.main(["--activation-bits", "5"])
    assert "choose from 6, 7, 8" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        kernels.main([*arguments, "--outputs", str(tmp_path / "file")])
    assert "file cannot be written: Not a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kernels.main([*arguments, "--outputs", ""])
    assert "--outputs: it is empty; is a variable unset?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kernels.main(["--shapes", "64"])
    assert "shapes holds '64'; accepted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "stopped; with --outputs the same command goes on"),
        (RecordError("a record is not JSON"), 1, "a record is not JSON"),
    ],
)
def test_what_ends_the_command_line_is_one_message(raised, status, text, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(KernelStudy, "table", mock.Mock(side_effect=raised))
    assert kernels.main(["--shapes", "64x128"]) == status
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("method", kernels_gpu.LIBRARIES)
def test_a_gpus_libraries_are_skipped_on_a_processor(run, method):
    (row,) = KernelStudy(run, shapes="64x128", tokens="1", methods=method).table().to_dict("records")
    assert row["skipped"] == f"{method} runs on NVIDIA GPUs only" and math.isnan(row["median_us"])


def test_the_usual_methods_are_the_devices(run):
    assert KernelStudy(run, methods="default").methods[1:] == ["torch-fp32", "torch-bf16", "torch-int8"]
    run.device = "cuda"
    methods = KernelStudy(run, methods="default").methods
    assert (
        methods[:3] == ["imma", "wgmma", "bmma"]
        and set(kernels_gpu.LIBRARIES) < set(methods)
        and "torch-int8" not in methods
    )
    assert set(methods) <= set(kernels_gpu.METHODS)
    assert set(kernels.ERROR_BOUNDS) | set(kernels.ops.BACKENDS) == set(kernels.METHODS)


@pytest.fixture
def card(monkeypatch):
    """A GPU that is not there: what runs on it runs on the processor, FlexQ's kernels as their definition, in no time."""

    def linear(records, tokens, chunks, exponent, bias, bits, backend, out):
        return out.copy_(
            kernels_gpu.ops.w6ax_linear(
                records, chunks, *scales[backend], bias, width(chunks, backend), bits, 128, "reference"
            )
        )

    def linear_of_row(x, chunks, exponent, bias, bits, norm):
        out = x.new_empty(1, len(exponent))
        return linear(rms_norm(x, norm.weight, norm.eps), 1, chunks, exponent, bias, bits, "imma", out), None

    def width(chunks, backend):
        return chunks.shape[1] * 8 // (scales[backend][0].shape[1] * 128)

    def prepare(layer):
        scales[layer.backend] = layer.weight_scale, layer.weight_exponent
        layer._takes_rows = layer.backend == "imma"
        return layer.backend, layer.weight

    def replayed(ways, replays):
        for launches in ways:
            assert len(launches) >= 3 and len({launch().shape for launch in launches}) == 1
        return [torch.linspace(1, 2, replays, dtype=torch.float64) for _ in ways]

    scales = {}
    facts = type("Facts", (), {"L2_cache_size": 2**14, "name": "NVIDIA H200"})
    provenance = {"device": facts.name, "driver": "1", "time": "2026-01-01T00:00:00+00:00"}
    provenance |= {"git_commit": None, "dirty": None, "versions": {}}
    monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda device: provenance)
    monkeypatch.setattr(kernels, "provenance", lambda device: provenance)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels_gpu.ops, "resolve_backend", lambda backend, *_, **__: backend)
    monkeypatch.setattr(kernels_gpu.FlexQLinear, "prepare", prepare)
    monkeypatch.setattr(kernels_gpu.cuda, "quantize_activation", lambda x, bits, backend: x)
    monkeypatch.setattr(kernels_gpu.cuda, "rms_norm_quantize", lambda x, weight, eps, *_: rms_norm(x, weight, eps))
    monkeypatch.setattr(kernels_gpu.cuda, "linear_of_row", linear_of_row)
    monkeypatch.setattr(kernels_gpu.cuda, "linear", linear)
    monkeypatch.setattr(kernels_gpu.cuda, "build_ahead", lambda bits, device: None)
    monkeypatch.setattr(
        kernels_gpu.ops,
        "w6ax_linear_repacked",
        lambda x, chunks, e, b, bits, backend: linear(x, 0, chunks, e, b, bits, backend, x.new_empty(len(x), len(e))),
    )
    monkeypatch.setattr(kernels_gpu, "replayed_us", replayed)
    layers = kernels_gpu.GpuLayers
    monkeypatch.setattr(
        kernels_gpu,
        "GpuLayers",
        lambda shape, method, bits, device, *more: layers(shape, method, bits, "cpu", *more),
    )
    rates = {"read_bandwidth_gbps": 4300.0, "copy_bandwidth_gbps": 4200.0, "int8_rate_gops": 1.3e6}
    measured = {name: Measurement(v, "1") for name, v in rates.items()}
    monkeypatch.setattr(timing, "_measured_limits", lambda device: measured)
    return facts.name


@pytest.fixture
def gpu_run(card, tmp_path):
    return Run("03_kernels", {}, "cuda", tmp_path, Records("03_kernels", tmp_path, "cuda"))


GPU = {"shapes": "64x256,96x384", "tokens": "1,5,33", "methods": "default", "repeats": 5}


def test_every_method_of_a_gpu_is_right_and_timed_alone_and_in_its_layer(gpu_run, monkeypatch):
    monkeypatch.setitem(kernels_gpu.METHODS, "torchao-int8wo", refuse_torchao)
    study = KernelStudy(gpu_run, **GPU)
    table = study.table().set_index("method")
    assert study.card == "NVIDIA H200"
    assert set(table.loc["torchao-int8wo", "skipped"]) == {"torchao is not there"}
    timed = table[table["skipped"] == ""]
    assert set(timed.index) == {"imma", "wgmma", "bmma", "torch-fp16", "torch-bf16", "cublas-int8", "cublaslt-fp8"}
    assert (timed["gemm_us"] == 1.5).all() and (timed["gemm_p10_us"] < timed["gemm_p90_us"]).all()
    assert timed.loc[["cublas-int8", "cublaslt-fp8"], "median_us"].isna().all()
    assert (timed.loc[["imma", "torch-fp16"], "median_us"] == 1.5).all()
    assert timed.loc[["imma", "bmma"], "definition_error"].max() <= kernels_gpu.DEFINITION_BOUND
    assert (timed["error"] > 0).all()
    assert (timed.loc[["imma", "wgmma"], ["norm_us", "norm_quantize_us"]] == 1.5).all(axis=None)
    assert timed.loc[["bmma", "torch-fp16"], ["norm_us", "norm_quantize_us"]].isna().all(axis=None)
    size = 64 * 256 * 6.125 / 8 + 2 * 5 * (64 + 256)
    first = timed[(timed["tokens"] == 5) & (timed["outputs"] == 64)].loc["imma"]
    assert math.isclose(first["byte_limit_us"], size / 4200e9 * 1e6)
    assert math.isclose(first["bandwidth_share"], first["byte_limit_us"] / 1.5)
    assert math.isclose(first["over_limit"], 1.5 / first["limit_us"])


def refuse_torchao(weight, bits, method):
    raise Skipped("torchao is not there")


def test_what_a_gpu_keeps_is_the_table_again_anywhere(gpu_run, monkeypatch):
    monkeypatch.setitem(kernels_gpu.METHODS, "torchao-int8wo", refuse_torchao)
    table = KernelStudy(gpu_run, **GPU).table()
    records = load_records(gpu_run.outputs)
    (((name, bits), kept),) = kernels.recorded(records).items()
    assert (name, bits) == ("NVIDIA H200", 6)
    order = ["method", "outputs", "features", "tokens"]
    timed = table[table["skipped"] == ""]
    pd.testing.assert_frame_equal(
        kept.sort_values(order, ignore_index=True)[timed.columns], timed.sort_values(order, ignore_index=True)
    )
    note = next(
        r.reason for r in read_jsonl(gpu_run.records.path) if r.method == "cublas-int8" and r.metric == "gemm_us"
    )
    assert note.startswith("operands quantised before") and note.endswith(" rows")
    told = kernel_table(records)
    assert told["over cuBLAS INT8"].tolist() == ["1.00× (1.00×)"] * 3 and told["tokens"].tolist() == [1, 5, 33]


def test_a_wrong_product_of_a_gpu_is_not_timed(gpu_run, monkeypatch):
    monkeypatch.setattr(kernels_gpu, "replayed_us", lambda *_: pytest.fail("timed"))
    right = kernels_gpu.cuda.linear
    monkeypatch.setattr(kernels_gpu.cuda, "linear", lambda *operands: right(*operands).mul_(1.001))
    with pytest.raises(RuntimeError, match="imma is wrong at 64x256, 1 tokens: relative error 0.00.* its definition"):
        KernelStudy(gpu_run, **GPU | {"methods": "imma"}).table()
    monkeypatch.setattr(kernels_gpu.cuda, "linear", lambda *operands: operands[-1])  # writes nothing: NaN
    with pytest.raises(RuntimeError, match="relative error nan"):
        KernelStudy(gpu_run, **GPU | {"methods": "bmma"}).table()


def test_what_a_gpu_cannot_replay_or_refuses_is_skipped(gpu_run, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("K must be a multiple of 16\nat a.cpp")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    table = KernelStudy(gpu_run, shapes="64x256", tokens="1", methods="reference,torch-int8,cublaslt-fp8").table()
    reasons = table.set_index("method")["skipped"]
    assert "no CUDA graph can replay it" in reasons["reference"] and "on processors" in reasons["torch-int8"]
    assert reasons["cublaslt-fp8"] == "cublaslt-fp8 refuses 64x256: K must be a multiple of 16"
    assert claims(table, gpu_run.device)[0][1] is None


def test_copies_of_a_gpus_weights_exceed_twice_its_cache(card):
    layers = kernels_gpu.GpuLayers((64, 256), "torch-fp16", 6, "cuda", 0)
    assert len(layers.copies) == 3 and len({copy.data_ptr() for copy in layers.copies}) == 3
    small = kernels_gpu.GpuLayers((16, 128), "torch-fp16", 6, "cuda", 0)
    assert (len(small.copies) - 1) * 16 * 128 * 2 >= 2 * 2**14


def gpu_times(shapes=None, tokens=(1, 4, 8, 16), **methods) -> pd.DataFrame:
    """A GPU's table: method → µs a byte limit's µs, the product; FlexQ's layers take a microsecond more."""
    machine = {"read_bandwidth_gbps": 4300.0, "copy_bandwidth_gbps": 4200.0, "int8_rate_gops": 1.3e6}
    rows = [
        {"method": name.replace("_", "-"), "outputs": n, "features": k, "tokens": count, "gemm_us": us, "error": 1e-3}
        | {"gemm_p10_us": us, "gemm_p90_us": us}
        | ({"median_us": us + 1, "p10_us": us, "p90_us": us + 1, "definition_error": 1e-5} if "mma" in name else {})
        for n, k in shapes or paper.kernel_shapes()
        for name, over in methods.items()
        for count in tokens
        for us in [over * limits_us((n, k), count, machine)["limit_us"]]
    ]
    return kernels.tabulate(rows, machine)


ALL = (1, 4, 8, 16, 64, 128)  # of which none lacks for a claim
H200 = {"imma": 1.05, "bmma": 1.2, "torch_fp16": 2.7, "cublaslt_fp8": 1.5, "cublas_int8": 2.0}


def verdicts(table, card="NVIDIA H200"):
    return [holds for _, holds, _ in claims(table, card)]


@pytest.fixture
def auto_takes_imma(monkeypatch):
    """With few tokens, whatever was measured last."""
    monkeypatch.setattr(kernels.auto, "wgmma_from", lambda *_: 129)


@pytest.mark.usefixtures("auto_takes_imma")
@pytest.mark.parametrize("card", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_claims_of_hopper_are_means_over_shapes_and_the_bandwidth_of_the_largest(card):
    found = claims(gpu_times(tokens=ALL, **H200), card)
    assert [holds for _, holds, _ in found] == [True] * 7
    assert all(text.endswith(f" on {card}") for text, _, _ in found[1:])
    assert found[1][2].startswith("1.43× over 20 shapes and 1, 4, 8 tokens; 1.3") and "quantisation" in found[1][2]
    assert found[4][2].startswith("least 95.2%, ") and found[4][2].endswith("; 8 of 8 cases")
    assert verdicts(gpu_times(tokens=ALL, **H200 | {"imma": 1.35})) == [True, False, False, False, False, True, True]
    assert verdicts(gpu_times(tokens=ALL, **H200).assign(definition_error=1e-3)) == [False] + [True] * 6


@pytest.mark.usefixtures("auto_takes_imma")
def test_other_cards_and_shapes_have_numbers_and_no_verdict():
    found = claims(gpu_times(tokens=ALL, **H200), "NVIDIA A100")
    assert [holds for _, holds, _ in found] == [True] + [None] * 6
    assert all("claimed of an H100 or H200, this is NVIDIA A100" in detail for _, _, detail in found[1:])
    assert found[1][2].startswith("1.43×")
    other = claims(gpu_times(shapes=[(64, 128)], **H200), "NVIDIA H200")
    assert [holds for _, holds, _ in other] == [True] + [None] * 6
    lacking = "cuBLASLt FP8 or FlexQ was not timed on them with so many tokens here"
    assert other[1][2] == lacking and other[4][2] == "these shapes were not timed here"
    assert claims(gpu_times(imma=1.05), "NVIDIA H200")[1][1:] == (None, lacking)
    with_others = gpu_times(shapes=[*paper.kernel_shapes(), (64, 128)], tokens=ALL, **H200)
    with_others.loc[with_others["outputs"] == 64, "gemm_us"] *= 1000
    assert claims(with_others, "NVIDIA H200")[1:] == claims(gpu_times(tokens=ALL, **H200), "NVIDIA H200")[1:]


@pytest.mark.usefixtures("auto_takes_imma")
@pytest.mark.parametrize(
    ("lacking", "holds", "told"),
    [
        (
            {"outputs": 4096},
            [None, None, None, True, None, None],
            {1: "54 of its 60 cases were timed", 5: " 18 shapes"},
        ),
        ({"outputs": 28672, "features": 8192}, [None] * 6, {1: "57 of its 60 cases were timed", 4: "4 of 8 cases"}),
        ({"tokens": 8}, [None] * 4 + [True, True], {1: "40 of its 60 cases were timed", 4: "6 of 8 cases"}),
        ({"tokens": 16}, [True] * 3 + [None, True, True], {4: "6 of 8 cases"}),
        ({"method": "torch-fp16", "outputs": 4096}, [True, None, True, True, None, True], {2: "54 of its 60"}),
    ],
    ids=str,
)
def test_part_of_the_cases_bears_out_no_claim(lacking, holds, told):
    table = gpu_times(tokens=ALL, **H200)
    kept = table[(table[list(lacking)] != pd.Series(lacking)).any(axis=1)]
    found = claims(kept, "NVIDIA H200")
    assert [verdict for _, verdict, _ in found[1:]] == holds
    assert all(text in found[index][2] for index, text in told.items())


@pytest.mark.usefixtures("auto_takes_imma")
def test_part_of_the_cases_refutes_a_claim_about_all_of_them():
    one = gpu_times(shapes=[(28672, 8192)], **H200 | {"imma": 3.0})
    assert verdicts(one) == [True, None, None, None, False, False, None]


def test_bars_of_prefill_are_told_and_not_claimed():
    table = gpu_times(tokens=(256, 1024, 4096), shapes=[(28672, 8192)], imma=1.25, torch_fp16=1.5)
    found = kernels_claims.prefill_bars({"a": table, "b": gpu_times(**H200)})
    assert list(found) == ["tokens", "shape", "what", "bar", "a"]  # b was not timed with so many
    told = found[found["shape"] == "28672 × 8192"].set_index(["tokens", "bar"])["a"]
    assert told.to_dict() == {
        (4096, "at least 1050"): "1040, missed",  # of 1300
        (256, "at least 1.20"): "1.20",
        (1024, "at least 1.40"): "1.20, missed",
        (4096, "at most 6%"): "0.1%",
    }
    assert set(found.loc[found["shape"] == "8192 × 28672", "a"]) == {"not timed"}
    slow = table.assign(median_us=1.07 * table["gemm_us"])
    assert kernels_claims.prefill_bars({"a": slow})["a"].tolist()[6:] == ["7.0%, missed", "not timed"]
    names = " ".join(text for text, _, _ in claims(table, "NVIDIA H200"))
    assert "TOP/s" not in names and verdicts(table)[1:4] == [None] * 3


def test_a_library_that_is_faster_with_more_rows_is_told_with_its_fewest_too():
    table = gpu_times(**H200)
    padded = table["method"] == "cublas-int8"
    detail = claims(table.assign(fewest_rows_us=(1.5 * table["gemm_us"]).where(padded)), "NVIDIA H200")[3][2]
    assert detail.startswith("1.90× over 20 shapes") and "; 2.86× over its fewest rows" in detail
    alone = (claims(table.assign(fewest_rows_us=us), "NVIDIA H200")[3][2] for us in (math.nan, table["gemm_us"]))
    assert not any("fewest" in detail for detail in alone)
    mixed = table["gemm_us"].where(table["tokens"] == 1, 1.5 * table["gemm_us"]).where(padded)
    (_, told), (_, clipped) = (
        claims(table.assign(fewest_rows_us=us), "NVIDIA H200")[3][2].split("activation quantisation")
        for us in (mixed, mixed.where(table["tokens"] != 1, 0.9 * mixed))
    )
    assert told == clipped  # of fewer rows that were the fastest, too, another quantile may have been taken


def swept(changes, tokens=(1, 64, 128, 1024)):
    """A table of one shape in which `auto` takes imma up to 64 tokens, then wgmma.  changes: (method, tokens) → µs."""
    times = {"imma": (10, 11, 30, 200), "wgmma": (12, 12, 12, 60), "torch-fp16": (20, 20, 22, 80)}
    rows = [
        {"method": method, "outputs": 28672, "features": 8192, "tokens": count, "error": 1e-3}
        | dict.fromkeys(("gemm_us", "median_us"), float(changes.get((method, count), us)))
        for method, mine in times.items()
        for count, us in zip(tokens, mine, strict=True)
    ]
    return pd.DataFrame(rows).assign(bandwidth_share=1.0)


@pytest.mark.parametrize(
    ("changes", "holds", "fp16", "larger"),
    [
        ({}, (True, True), "0.55 of its time, 28672 × 8192, 64 tokens, imma; 2 cases, 1 shapes with up", "0.92 of"),
        ({("wgmma", 1): 500, ("imma", 1024): 1}, (True, True), "0.55 of", "0.92 of"),  # auto takes the others there
        ({("torch-fp16", 1024): 1}, (True, True), "0.55 of", "0.92 of"),  # of many tokens it is not claimed
        ({("torch-fp16", 64): 10.5}, (True, True), "1.05 of its time, 28672 × 8192, 64 tokens, imma", "0.92 of"),
        ({("torch-fp16", 64): 10.4}, (False, True), "1.06 of its time, 28672 × 8192, 64 tokens, imma", "0.92 of"),
        ({("imma", 64): 12.5}, (True, True), "0.62 of", "1.04 of its time, 28672 × 8192, 64 tokens, imma; 3 cases"),
        ({("imma", 64): 13}, (True, False), "0.65 of", "1.08 of its time, 28672 × 8192, 64 tokens, imma; 3 cases"),
        ({("imma", 1): 61}, (False, False), "3.05 of its time, 28672 × 8192, 1 tokens, imma", "5.55 of"),
    ],
)
def test_a_cliff_is_a_number_of_tokens_that_takes_longer_than_fp16_or_than_a_larger_one(
    monkeypatch, changes, holds, fp16, larger
):
    monkeypatch.setattr(kernels.auto, "wgmma_from", lambda *_: 65)
    monkeypatch.setattr(kernels_claims, "_SHAPES", 1)
    found = claims(swept(changes), "NVIDIA H100 80GB HBM3")[-2:]
    assert tuple(verdict for _, verdict, _ in found) == holds
    assert found[0][2].startswith(f"at worst {fp16}") and found[1][2].startswith(f"at worst {larger}")


def test_without_its_kernel_or_fp16_no_cliff_can_be_told(monkeypatch):
    monkeypatch.setattr(kernels.auto, "wgmma_from", lambda *_: 65)
    monkeypatch.setattr(kernels_claims, "_SHAPES", 1)
    table = swept({})
    for lacking in (table["method"] != "torch-fp16", ~table["method"].isin(kernels.auto.CHOICES)):
        found = claims(table[lacking], "NVIDIA H200")[-2:]
        assert None in [holds for _, holds, _ in found]
        assert all(detail == "there is nothing to compare here" for _, holds, detail in found if holds is None)


@pytest.mark.parametrize("tokens", [[1, 64], [1, 64, 128], [64, 128, 1024], [1]])
def test_no_cliff_is_ruled_out_by_few_numbers_of_tokens(monkeypatch, tokens):
    monkeypatch.setattr(kernels.auto, "wgmma_from", lambda *_: 65)
    monkeypatch.setattr(kernels_claims, "_SHAPES", 1)
    table = swept({})
    over_fp16, over_itself = (holds for _, holds, _ in claims(table[table["tokens"].isin(tokens)], "NVIDIA H200")[-2:])
    assert over_fp16 is (True if 64 in tokens else None)
    assert over_itself is (True if 128 in tokens else None)


def test_on_a_gpu_a_cases_backend_is_the_faster_of_those_that_auto_chooses_from():
    table = gpu_times(shapes=[(64, 128)], imma=1.2, wgmma=1.3, bmma=1.1, torch_fp16=2.4)
    table.loc[(table["method"] == "wgmma") & (table["tokens"] == 8), ["gemm_us", "median_us"]] /= 3
    found = speedups(table, "torch-fp16").set_index("tokens")
    assert found["method"].to_dict() == {tokens: "wgmma" if tokens == 8 else "imma" for tokens in found.index}


def crossing(fp16) -> pd.DataFrame:
    """A table of one shape on which FlexQ's product takes 100 µs.  fp16: cuBLAS's µs with 1, 4, 8, 16 tokens."""
    table = gpu_times(shapes=[(64, 128)], imma=1.2, torch_fp16=2.4).sort_values("tokens", kind="stable")
    table.loc[table["method"] == "torch-fp16", "gemm_us"] = fp16
    table.loc[table["method"] == "imma", "gemm_us"] = 100.0
    return table


@pytest.mark.parametrize(
    ("fp16", "slower"),
    [
        ([200, 200, 200, 200], "never"),
        ([99, 99, 99, 99], "1 to 16"),
        ([200, 99, 200, 200], "4"),
        ([200, 99, 200, 99], "4, 16"),
        ([99, 200, 99, 99], "1, 8 to 16"),
        ([100, 100, 100, 99], "16"),
    ],
)
def test_crossovers_say_with_which_tokens_flexq_is_slower(fp16, slower):
    (row,) = kernels_compared.crossovers(crossing(fp16)).to_dict("records")
    assert row == {
        "shape": "64 × 128",
        "timed with": "1 to 16",
        "slower than cuBLAS FP16": slower,
        "slower than cuBLASLt FP8": "–",
        "slower than cuBLAS INT8": "–",
    }


def rings(axis):
    """Where crossings are marked, of all lines of a panel."""
    return [
        x for line in axis.lines if line.get_marker() == "o" and line.get_markersize() == 7 for x in line.get_xdata()
    ]


@pytest.mark.parametrize(
    ("fp16", "expected"),
    [
        ([200, 200, 200, 200], []),
        ([200, 50, 200, 200], [2, math.sqrt(32)]),  # half-way on a logarithmic axis
        ([50, 200, 50, 200], [2, math.sqrt(32), math.sqrt(128)]),
        ([200, 100, 50, 50], [4]),
    ],
)
def test_crossovers_are_drawn_with_every_crossing(fp16, expected):
    table = crossing(fp16)
    figure = kernels_compared.plot_crossovers(table)
    panels = figure.axes
    assert [axis.get_title() for axis in panels] == [
        "cuBLAS FP16's time over FlexQ's",
        "cuBLASLt FP8's time over FlexQ's",
        "cuBLAS INT8's time over FlexQ's",
    ]
    (line,) = [line for line in panels[0].lines if line.get_label() == "64 × 128"]
    assert line.get_ydata().tolist() == [us / 100 for us in fp16] and line.get_xdata().tolist() == [1, 4, 8, 16]
    assert rings(panels[0]) == pytest.approx(expected) and not rings(panels[1])


def test_of_many_shapes_four_are_told_apart_and_all_are_drawn():
    figure = kernels_compared.plot_crossovers(gpu_times(**H200))
    lines = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 4]
    assert len(lines) == 20 and len({line.get_color() for line in lines}) == 5
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 6 and labels[-2:] == ["crosses 1", "other shapes"]


SWEPT = [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


@pytest.mark.parametrize(
    "plot", [kernels_compared.plot_times, kernels_compared.plot_rates, kernels_compared.plot_crossovers]
)
def test_labels_of_many_numbers_of_tokens_do_not_overlap(plot):
    figures.use_style()
    figure = plot(gpu_times(tokens=SWEPT, shapes=paper.kernel_shapes()[:4], **H200))
    figure.canvas.draw()
    for axis in figure.axes:
        labels = [label for label in axis.get_xticklabels() if label.get_visible() and label.get_text()]
        boxes = [label.get_window_extent() for label in labels]
        assert all(a.x1 + 2 < b.x0 for a, b in itertools.pairwise(boxes))
    assert labels[0].get_text() == "1" and len(labels) >= 3


def test_lines_go_from_few_tokens_to_many_in_whatever_order_they_were_measured():
    table = gpu_times(tokens=(1, 8, 64, 256), shapes=[(64, 128)], **H200)
    shuffled = table.sample(frac=1, random_state=0)
    for line in kernels_compared.plot_times(shuffled).axes[0].lines:
        assert list(line.get_xdata()) == sorted(line.get_xdata())


def test_a_method_looks_the_same_whatever_is_beside_it():
    table = gpu_times(shapes=[(64, 128)], **H200)
    alone = table[table["method"] == "torch-fp16"]
    (line,) = [line for line in kernels_compared.plot_rates(alone).axes[0].lines if len(line.get_xdata())]
    beside = [line for line in kernels_compared.plot_rates(table).axes[0].lines if line.get_label() == "cuBLAS FP16"]
    assert [(line.get_color(), line.get_marker())] == [(found.get_color(), found.get_marker()) for found in beside]


def test_few_numbers_of_tokens_are_all_labelled():
    axis = kernels_compared.plot_times(gpu_times(tokens=(1, 8, 64), shapes=[(64, 128)], **H200)).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "8", "64"]


def test_what_is_faster_than_the_limit_is_in_sight_and_the_limit_is_named():
    table = gpu_times(shapes=[(64, 128)], **H200 | {"cublaslt_fp8": 0.625})
    figure = kernels_compared.plot_rates(table)
    low, high = figure.axes[1].get_ylim()
    assert low == 0 and high > max(figure.axes[1].lines[3].get_ydata()) == pytest.approx(160)
    assert "limit: bandwidth, cuBLAS INT8" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "cuBLAS's INT8" in kernels_compared.limit_note(table)
    assert "cuBLAS's INT8" in next(kernels_compared.gpu_figures(table, "here"))[2]
    nothing = kernels_compared.plot_rates(table.assign(gemm_us=math.nan))  # all was skipped
    assert len(nothing.axes[0].lines) == 1


def test_rates_are_drawn_where_the_most_numbers_of_tokens_were_measured():
    table = gpu_times(shapes=[(64, 128), (128, 128)], imma=1.2, torch_fp16=2.4)
    few = table[(table["outputs"] == 64) | (table["tokens"] == 8)]
    figure = kernels_compared.plot_rates(few)
    assert [axis.get_title() for axis in figure.axes] == ["64\n× 128", ""]
    drawn = figure.axes[0].lines[0].get_ydata()
    mine = few[(few["outputs"] == 64) & (few["method"] == "imma")].sort_values("tokens")
    assert list(drawn) == list(mine["gops"] / 1e3)


def test_a_gpus_figures_fit_half_a_page_and_show_the_papers_marks():
    table = gpu_times(**H200)
    assert len(kernels_compared.plot_times(table).axes) == 4
    rates, crossovers, *made = kernels_compared.gpu_figures(table, "here")
    assert crossovers[1] == "crossovers" and crossovers[0].get_size_inches()[0] <= 4.6
    assert rates[1] == "rates" and rates[0].get_size_inches()[0] <= 4.6 and len(rates[0].axes) == 8
    assert [name for _, name, _ in made] == [
        "speedups-torch-fp16",
        "speedups-cublaslt-fp8",
        "speedups-cublas-int8",
        "bandwidth",
    ]
    for figure, _, caption in made:
        assert figure.get_size_inches()[0] <= 4.6 and "here" in caption
        assert figure.axes[0].get_yticklabels()[0].get_text() == "12288 × 4096"
    for rival, (figure, _, caption) in zip(kernels_compared.RIVALS, made, strict=False):
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert "8 tokens, measured" in labels and "16 tokens, measured" not in labels
        as_paper = rival == "cublas-int8"  # what the paper's marks are over
        assert as_paper == ("8 tokens, the paper's GPU" in labels) == ("hollow" in caption)
    assert "bandwidth reached, 1 token (% of copying)" in made[3][0].axes[0].get_xlabel()


def test_the_auto_table_holds_from_where_on_wgmma_is_faster_for_good(tmp_path):
    path = tmp_path / "auto.json"
    path.write_text('[{"card": "another", "wgmma_from": 7}, {"card": "NVIDIA H200", "wgmma_from": 1}]')

    def rows(features, imma, wgmma):
        return [
            {"outputs": 64, "features": features, "tokens": tokens, "method": method, "median_us": time}
            for method, times in (("imma", imma), ("wgmma", wgmma))
            for tokens, time in zip((1, 8, 64), times, strict=True)
        ]

    table = pd.DataFrame(
        rows(128, (1, 5, 9), (2, 6, 8)) + rows(256, (1, 2, 3), (0.5, 3, 4)) + rows(512, (2, 2, 2), (1, 1, 1))
    )
    found = kernels.write_auto_table({("NVIDIA H200", 6): table}, path)
    assert [(row["features"], row["wgmma_from"]) for row in found] == [(128, 64), (256, None), (512, 1)]
    assert json.loads(path.read_text()) == [{"card": "another", "wgmma_from": 7}, *found]
    other = pd.DataFrame(rows(128, (2, 6, 9), (1, 5, 8)) + rows(1024, (2, 6, 9), (1, 5, 8)))
    both = kernels.write_auto_table({("NVIDIA H200", 4): other, ("NVIDIA H200", 6): table}, path)
    assert (
        both[: len(found)] == found and both[len(found) :][0]["features"] == 1024
    )  # others than 6 bits fill what is left


def test_the_command_line_keeps_a_gpus_records_and_makes_the_table_from_them(card, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels.auto, "PATH", tmp_path / "auto.json")
    (tmp_path / "auto.json").write_text("[]")
    monkeypatch.setattr(kernels.write_auto_table, "__defaults__", (tmp_path / "auto.json",))
    folder = str(tmp_path / "h200")
    arguments = [
        "--outputs",
        folder,
        "--shapes",
        "64x256",
        "--tokens",
        "1",
        "8",
        "--methods",
        "imma",
        "wgmma",
        "torch-fp16",
    ]
    assert kernels.main([*arguments, "--repeats", "7"]) == 0
    told = capsys.readouterr().out
    assert "NVIDIA H200, 6-bit activations, weights cold" in told and "cannot tell" in told and "cuBLAS FP16" in told
    first = read_jsonl(tmp_path / "h200" / "records" / "03_kernels.jsonl")
    again = [argument.replace("h200", "{card}") for argument in arguments]
    assert kernels.main([*again, "--repeats", "7", "--activation-bits", "6", "8"]) == 0
    both = read_jsonl(tmp_path / "h200" / "records" / "03_kernels.jsonl")
    assert both[: len(first)] == first
    assert {(r.method, r.parameters["activation_bits"]) for r in both[len(first) :]} == {("imma", 8), ("wgmma", 8)}
    monkeypatch.setattr("flexq_core.workbook.records.source_digest", lambda *_: "other source")
    assert kernels.main([*arguments, "--repeats", "9"]) == 0
    kept = read_jsonl(tmp_path / "h200" / "records" / "03_kernels.jsonl")
    assert {r.parameters.get("repeats", 9) for r in kept} == {9}  # what an older source measured is gone
    assert kernels.main(["--outputs", folder, "--write-auto-table"]) == 0
    assert [row["outputs"] for row in json.loads((tmp_path / "auto.json").read_text())] == [64]
    with pytest.raises(SystemExit):
        kernels.main(["--write-auto-table"])
    assert "needs --outputs with records of a GPU" in capsys.readouterr().err


def test_combinations_of_bits_are_timed_once_on_the_largest_shape_and_kept_apart(gpu_run, monkeypatch):
    study = KernelStudy(gpu_run, **GPU | {"combinations": "w2a2,w3a8,w6a6,w8a8"})
    table = study.combination_table()
    assert table["combination"].unique().tolist() == ["W2A2", "W3A8", "W6A6", "W8A8"] and len(table) == 4 * 3
    assert (table["outputs"] == 96).all() and (table["gemm_us"] == 1.5).all()
    assert (table["definition_error"] <= kernels_gpu.DEFINITION_BOUND).all()
    errors = table[table["tokens"] == 33].set_index("combination")["error"]
    assert errors.is_monotonic_decreasing and errors["W2A2"] > 0.3 and errors["W8A8"] < 0.02
    limits = table[table["tokens"] == 1].set_index("combination")["byte_limit_us"]
    size = 96 * 384 * (2 + 16 / 128) / 8 + 2 * (96 + 384)
    assert math.isclose(limits["W2A2"], size / 4200e9 * 1e6) and limits["W2A2"] < limits["W3A8"] < limits["W6A6"]
    assert kernel_times(load_records(gpu_run.records.folder)).empty
    figure = kernels_combinations.plot_combinations(table)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["W2A2", "W3A8", "W6A6", "W8A8"]
    assert figure.axes[0].get_ylabel() == "time (µs)"
    monkeypatch.setattr(kernels_gpu, "GpuLayers", lambda *_: pytest.fail("made again"))
    pd.testing.assert_frame_equal(study.combination_table(), table)


def test_combinations_wrong_by_the_definition_are_not_timed(gpu_run, monkeypatch):
    linear = kernels_gpu.cuda.linear
    monkeypatch.setattr(kernels_gpu.cuda, "linear", lambda *operands: linear(*operands).mul_(1.01))
    with pytest.raises(RuntimeError, match="bmma is wrong at 96x384, 1 tokens: relative error 0.0.* against its defin"):
        KernelStudy(gpu_run, **GPU | {"combinations": "w2a2"}).combination_table()


def test_combinations_are_skipped_once_without_a_gpu(run):
    table = KernelStudy(run, **SMALL).combination_table()
    (record,) = read_jsonl(run.records.path)
    assert record.status == "skipped" and record.reason == "bit planes are multiplied on NVIDIA GPUs only"
    assert table["skipped"].tolist() == [record.reason]
    assert kernels_combinations.read_combinations("none") == ()
    usual = kernels_combinations.read_combinations("usual")
    more = kernels_combinations.read_combinations("w5a5,usual,w4a8")
    assert [(each.weight_bits, each.activation_bits) for each in more[:1]] == [(5, 5)] and more[1:] == usual


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs that run nothing: their numbers as they are replayed, and what each pair of events says has elapsed."""
    fake = {name: mock.MagicMock() for name in ("current_stream", "stream", "graph", "_sleep", "synchronize", "Event")}
    made, replayed = itertools.count(), []
    fake["CUDAGraph"] = lambda: mock.Mock(replay=partial(replayed.append, next(made)))
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels_gpu, "_capture_stream", lambda device: mock.Mock())
    monkeypatch.setattr(kernels_gpu, "_WARM_UP_S", 0.0)
    return SimpleNamespace(replayed=replayed, elapsed=fake["Event"].return_value.elapsed_time)


@pytest.mark.parametrize(("launch_ms", "rounds"), [(0.01, 6), (0.1, 3), (5.4, 1)])
def test_a_graph_launches_every_copy_in_turn_and_times_are_a_launchs(graphs, launch_ms, rounds):
    order = []
    graphs.elapsed.side_effect = [launch_ms, *[launch_ms * rounds * 9] * 7]
    (times,) = kernels_gpu.replayed_us([[lambda index=index: order.append(index) for index in range(9)]], 7)
    assert order == [0, 1, 2, 0] + [*range(9)] * rounds  # to see how long one takes, then what was captured
    assert graphs.replayed == [0] * 7
    assert torch.allclose(times, torch.full((7,), 1e3 * launch_ms, dtype=torch.float64))


def test_a_product_and_its_layer_are_replayed_in_turn(graphs):
    graphs.elapsed.side_effect = [5.0, 6.0, *[15.0] * 4, *[18.0] * 4]  # a launch of each, then replays of three
    product, layer = kernels_gpu.replayed_us([[lambda: None] * 3] * 2, 4)
    assert graphs.replayed == [0, 1] * 4
    assert product.tolist() == [5000.0] * 4 and layer.tolist() == [6000.0] * 4


def test_a_layer_is_timed_in_one_pass_with_its_product_and_after_a_norm_in_another(card, monkeypatch):
    passes = []
    monkeypatch.setattr(
        kernels_gpu,
        "replayed_us",
        lambda ways, _: passes.append(ways) or [torch.tensor([1.0 + i]) for i in range(len(ways))],
    )
    layers = kernels_gpu.GpuLayers((64, 256), "imma", 6, "cuda", 0)
    found = layers.measure(torch.randn(kernels_gpu.NORMED_TOKENS, 256), 1, 0.06)
    order = ("gemm_us", "norm_us", "norm_quantize_us", "median_us")
    assert [found[metric].value for metric in order] == [1, 1, 2, 2] and [len(ways) for ways in passes] == [2, 2]
    many = layers.measure(torch.randn(kernels_gpu.NORMED_TOKENS + 1, 256), 1, 0.06)
    assert (many["gemm_us"].value, many["median_us"].value) == (1, 2) and "norm_us" not in many
    monkeypatch.setattr(kernels_gpu.cuda, "MOST_NORM_FEATURES", 255)
    assert "norm_us" not in layers.measure(torch.randn(5, 256), 1, 0.06)


def wrong_row(row):
    return lambda *operands: (row(*operands)[0] * 1.1, None)


def no_norm(_):
    return lambda x, *_: x


def nothing_after_the_first_two(linear):
    """Those are the product alone and after torch's norm; the third is fused, and what it was to write stays as it was."""
    calls = itertools.count(1)
    return lambda *operands: linear(*operands) if next(calls) < 3 else operands[-1]


@pytest.mark.parametrize(
    ("tokens", "kernel", "wrong", "metric"),
    [
        (1, "linear_of_row", wrong_row, "norm_quantize_us"),
        (5, "rms_norm_quantize", no_norm, "norm_us"),
        (5, "linear", nothing_after_the_first_two, "norm_quantize_us"),
    ],
)
def test_a_layer_that_is_wrong_after_a_norm_is_not_timed(card, tokens, kernel, wrong, metric, monkeypatch):
    monkeypatch.setattr(kernels_gpu, "replayed_us", lambda *_: pytest.fail("timed"))
    layers = kernels_gpu.GpuLayers((64, 256), "imma", 6, "cuda", 0)
    monkeypatch.setattr(kernels_gpu.cuda, kernel, wrong(getattr(kernels_gpu.cuda, kernel)))
    with pytest.raises(RuntimeError, match=rf"at 64x256, {tokens} tokens: .* against float32, for {metric}, bound"):
        layers.measure(torch.randn(tokens, 256), 1, 0.06)


def test_of_many_tokens_some_of_every_tile_are_checked(gpu_run, monkeypatch):
    tokens = 3 * kernels_gpu.CHECKED_TOKENS
    study = KernelStudy(gpu_run, **GPU | {"methods": "imma", "shapes": "64x256", "tokens": str(tokens)})
    assert study.table()["error"][0] > 0
    right = kernels_gpu.cuda.linear
    for first, factor, text in ((tokens - 8, 1.1, "relative error 0.0"), (1, math.inf, "wrong at 64x256")):

        def wrong(*operands, first=first, factor=factor):
            y = right(*operands)
            y[first : first + 8 if factor < 2 else first + 1] *= factor
            return y

        monkeypatch.setattr(kernels_gpu.cuda, "linear", wrong)
        with pytest.raises(RuntimeError, match=text):
            kernels_gpu.GpuLayers((64, 256), "imma", 6, "cuda", 0).measure(torch.randn(tokens, 256), 5, 0.06)


def test_int8_weights_of_torchao_are_compiled_for_few_tokens_only():
    made = kernels_gpu._TorchaoInt8.__new__(kernels_gpu._TorchaoInt8)
    assert len(made.products(torch.zeros(kernels_gpu.COMPILED_TOKENS, 128))) == 1
    with pytest.raises(Skipped, match="meant for few tokens; up to 8 are timed"):
        made.products(torch.zeros(kernels_gpu.COMPILED_TOKENS + 1, 128))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method", ["imma", "bmma", "torch-fp16", "torch-bf16", "torch-fp32", "cublas-int8", "cublaslt-fp8"]
)
@pytest.mark.parametrize("tokens", [1, 17])
def test_on_this_card_a_method_is_timed(method, tokens):
    layers = kernels_gpu.GpuLayers((1024, 2048), method, 6, "cuda", 0)
    with torch.no_grad():
        found = layers.measure(
            torch.randn(tokens, 2048), 7, kernels.ERROR_BOUNDS.get(method, kernels.FLEXQ_ERROR_BOUND)
        )
    assert 0 < found["gemm_p10_us"].value <= found["gemm_us"].value <= found["gemm_p90_us"].value
    assert ("median_us" in found) == ("mma" in method)
