"""The README's tables of GPUs are what their records say, of each card apart."""

import pandas as pd
import pytest

from flexq_core.workbook import gpu_tables
from flexq_core.workbook.records import Measurement, Records, load_records
from flexq_core.workbook.report import README_MARKS, readme_with_results

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
US = {"imma": 12.0, "wgmma": 11.0, "bmma": 1.0, "torch-fp16": 33.0, "cublaslt-fp8": 20.0}
"""Method → the product's time with one token on an H100; bit planes are the fastest, and nothing that `auto` takes."""


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A function that records measurements of a case on a card; the card of none is a processor."""

    def record(study, card, model, method, measured, hour=0, **parameters):
        facts = {"git_commit": None, "dirty": None, "versions": {}, "device": card or "a processor"}
        facts |= {"driver": "1" if card else None, "time": f"2026-01-01T0{hour}:00:00+00:00"}
        monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda _: facts)
        values = {m: v if isinstance(v, Measurement) else Measurement(v, "") for m, v in measured.items()}
        case = {"model": model, "method": method, "seed": hour, "parameters": parameters | {"device": card}}
        Records(study, tmp_path / (card or "cpu")).once(**case, compute=lambda: values)

    return record


@pytest.fixture
def tables(tmp_path):
    """A function that gives all sections of what was recorded: what is told → the table."""

    def tables():
        loaded = [load_records(folder) for folder in sorted(tmp_path.iterdir())] or [load_records(tmp_path)]
        return dict(gpu_tables.sections(pd.concat(loaded, ignore_index=True)))

    return tables


def time_kernels(record, card, tokens, slower=1.0, shapes=((8192, 8192), (4096, 4096)), **changed):
    for outputs, features in shapes:
        for method, us in (US | changed).items():
            bits = {"activation_bits": 6} if "mma" in method else {}
            larger = outputs / 4096
            time = us * slower * larger
            layer = {"median_us": time + larger, "norm_us": time + 3, "norm_quantize_us": time + 2 * larger}
            measured = {"gemm_us": time} | (layer if bits else {})
            shape = {"outputs": outputs, "features": features, "tokens": tokens}
            record("03_kernels", card, f"{outputs}x{features}", method, measured, **shape, **bits)


def test_every_card_has_its_rows_with_few_tokens_and_with_many(record, tables):
    for card, slower in ((H100, 1.0), (H200, 0.5)):
        time_kernels(record, card, 1, slower)
        time_kernels(record, card, 4096, 100 * slower, **{"torch-fp16": 16.5})
    decode, prefill = tables().values()
    assert decode["GPU"].tolist() == prefill["GPU"].tolist() == [H100, H200]
    assert decode["tokens"].tolist() == [1, 1] and prefill["tokens"].tolist() == [4096, 4096]
    # Products of 11 and 22 µs against 33 and 66, layers of one and of two more; of the H200 half as long but for that.
    assert decode["over cuBLAS FP16"].tolist() == ["3.00× (2.75×)", "3.00× (2.54×)"]
    assert decode["quantising (µs)"].tolist() == ["1.5 (≤ 2.0)"] * 2
    assert decode["fused with a norm (µs)"].tolist() == ["0.0 (≤ 1.0)"] * 2
    assert not {"quantising (µs)", "fused with a norm (µs)"} & set(prefill)
    assert decode["over cuBLAS INT8"].tolist() == ["–"] * 2
    assert prefill["over cuBLAS FP16"].tolist() == ["1.50× (1.50×)"] * 2
    assert prefill["over cuBLASLt FP8"].tolist() == ["1.82× (1.82×)", "1.82× (1.81×)"]
    assert "TOP/s" not in decode and set(decode["shapes"]) == {2}
    # 2 * 4096 * 4096² operations in 1100 µs, and four times as many in 2200
    assert prefill["TOP/s"].tolist() == ["125 to 250", "250 to 500"]


def test_what_a_fused_norm_adds_is_told_where_it_was_timed(record, tables):
    shape = {"outputs": 4096, "features": 4096, "tokens": 1, "activation_bits": 6}
    record("03_kernels", H100, "4096x4096", "imma", {"gemm_us": 5.0, "median_us": 6.0}, **shape)
    (table,) = tables().values()
    assert table[["quantising (µs)", "fused with a norm (µs)"]].values.tolist() == [["1.0 (≤ 1.0)", "–"]]


def test_a_table_is_there_where_its_records_are(record, tables):
    assert tables() == {}
    time_kernels(record, H100, 4096)
    (only,) = tables().values()
    assert "TOP/s" in only
    record("03_kernels", None, "8x8", "cpu", {"median_us": 1.0}, tokens=1, outputs=8, features=8, activation_bits=6)
    record("03_kernels", H100, "8192x8192", "bmma", {"gemm_us": 1.0}, tokens=1, outputs=8, features=8, weight_bits=2)
    record("04_e2e", H100, "machine", "limits", {"copy_bandwidth_gbps": 3000.0})
    assert len(tables()) == 1


def time_model(record, card, method, tpot_ms, model="llama-13b", hour=0, **parameters):
    measured = {"tpot_ms": tpot_ms, "ttft_ms": 20.04, "limit_ms": 3.361, "weights_mib": 9650.4}
    parameters = {"batch_size": 1, "prompt_tokens": 128, "layers": 0} | parameters
    record("04_e2e", card, model, method, measured, hour, **parameters)


def test_models_stand_beside_fp16_of_the_same_card_and_setting(record, tables):
    for card, ms in ((H100, 10.0), (H200, 8.0)):
        time_model(record, card, "fp16", ms)
        time_model(record, card, "flexq", 4.0)
    time_model(record, H100, "flexq", 4.5, batch_size=4)
    (table,) = tables().values()
    shown = table[["GPU", "batch", "method", "TPOT (ms)", "over FP16"]].values.tolist()
    assert shown == [
        [H100, 1, "fp16", "10.00", "1.00×"],
        [H100, 1, "flexq", "4.00", "2.50×"],
        [H100, 4, "flexq", "4.50", "–"],
        [H200, 1, "fp16", "8.00", "1.00×"],
        [H200, 1, "flexq", "4.00", "2.00×"],
    ]
    assert table.loc[0, ["prompt", "TTFT (ms)", "limit (ms)", "weights (MiB)"]].tolist() == [
        128,
        "20.0",
        "3.36",
        "9650",
    ]


def test_what_is_run_otherwise_is_another_row_and_nothing_is_compared_with_it(record, tables):
    time_model(record, H100, "fp16", 10.0, output_tokens=[32, 128], weights="random", compile_mode="default")
    time_model(record, H100, "flexq", 4.0, output_tokens=[128], weights="random", compile_mode="default")
    time_model(record, H100, "flexq", 5.0, output_tokens=[128, 1024], weights="random", compile_mode="default", hour=1)
    ((told, table),) = tables().items()
    assert "models with random weights," in told and list(table)[3:6] == ["prompt", "outputs", "method"]
    assert table[["outputs", "method", "over FP16"]].values.tolist() == [
        [128, "fp16", "1.00×"],
        [128, "flexq", "2.50×"],
        [1024, "flexq", "–"],
    ]
    time_model(
        record, H100, "flexq", 3.0, output_tokens=[128], weights="pretrained", compile_mode="none", backend="imma"
    )
    time_model(
        record, H100, "flexq", 2.0, output_tokens=[128], weights="pretrained", compile_mode="none", backend="bmma"
    )
    ((told, table),) = tables().items()
    assert "random" not in told
    assert table.tail(1)[["outputs", "compile_mode", "weights"]].values.tolist() == [[1024, "default", "random"]]
    otherwise = table[table["compile_mode"] == "none"]
    assert otherwise[["weights", "backend", "TPOT (ms)", "over FP16"]].values.tolist() == [
        ["pretrained", "imma", "3.00", "–"],
        ["pretrained", "bmma", "2.00", "–"],
    ]


def test_each_method_is_shown_in_its_fastest_mode(record, tables):
    for method, ms in {"fp16": (10.0, 9.0), "flexq": (4.0, 4.5)}.items():
        for mode, tpot in zip(("default", "best"), ms, strict=True):
            time_model(record, H100, method, tpot, compile_mode=mode)
    (table,) = tables().values()
    assert table[["compile_mode", "method", "TPOT (ms)", "over FP16"]].values.tolist() == [
        ["best", "fp16", "9.00", "1.00×"],
        ["default", "flexq", "4.00", "2.25×"],
    ]


def test_the_mode_that_was_chosen_is_shown_and_of_the_same_the_newest_run(record, tables):
    for hour, asked, ran, tpot_ms in ((1, "best", "default", 7.0), (2, "default", "default", 7.5)):
        measured = {"tpot_ms": tpot_ms, "captured": Measurement(1, "1", f"compiled: {ran}")}
        case = {"batch_size": 1, "prompt_tokens": 128, "compile_mode": asked}
        record("04_e2e", H100, "llama-13b", "fp16", measured, hour, **case)
    measured = {"tpot_ms": 4.0, "captured": Measurement(1, "1", "compiled: max-autotune")}
    record("04_e2e", H100, "llama-13b", "flexq", measured, hour + 1, **case | {"compile_mode": "best"})
    (table,) = tables().values()
    assert table[["compile_mode", "method", "TPOT (ms)"]].values.tolist() == [
        ["default", "fp16", "7.50"],
        ["max-autotune", "flexq", "4.00"],
    ]


def test_the_readme_shows_the_card_that_was_measured_last(record, tmp_path):
    record("02_accuracy", None, "demo", "fp32", {"perplexity": 8.0}, backend="torch", dataset="pydoc")
    for hour, card in enumerate((H200, H100)):
        time_model(record, card, "flexq", 5.0 + hour, hour=hour)
    loaded = pd.concat([load_records(folder) for folder in tmp_path.iterdir()], ignore_index=True)
    shown = readme_with_results("".join(README_MARKS), loaded)
    assert f"**{H100}.** Whole models" in shown and H200 not in shown and "| 6.00 " in shown


def test_a_rows_metrics_are_those_of_one_run(record, tables):
    time_model(record, H100, "flexq", 5.0, hour=1)
    record("04_e2e", H100, "llama-13b", "flexq", {"tpot_ms": 4.0}, 2, batch_size=1, prompt_tokens=128, layers=0)
    record("04_e2e", H100, "llama-13b", "flexq", {"ttft_ms": 1.0}, 3, batch_size=1, prompt_tokens=128, layers=0)
    (table,) = tables().values()
    assert table[["TPOT (ms)", "TTFT (ms)", "limit (ms)"]].values.tolist() == [["4.00", "–", "–"]]


def test_the_newest_of_a_whole_model_on_one_card_is_shown(record, tables):
    time_model(record, H100, "flexq", 5.0, hour=1)
    time_model(record, H100, "flexq", 4.0, hour=2)
    time_model(record, H100, "flexq", 1.0, hour=3, layers=2)
    time_model(record, H100, "flexq", 1.0, hour=3, processes=2)
    time_model(record, None, "flexq", 1.0, hour=3)
    (table,) = tables().values()
    assert table["TPOT (ms)"].tolist() == ["4.00"]
